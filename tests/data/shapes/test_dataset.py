"""The built-in data set: its scenes, captions, images and shards."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from dalle1.data import shapes
from dalle1.data.shapes import checker as shapes_checker
from dalle1.data.shapes import dataset


def test_samples_are_pure() -> None:
    """Hidden state: a sample that depends on what was drawn before it, or on the side."""
    first = shapes.make(3, 77, "test")
    for index in range(20):
        shapes.make(3, index, "test")
    again, large = shapes.make(3, 77, "test"), shapes.make(3, 77, "test", side=64)
    assert (first.key, first.caption, first.scene) == (again.key, again.caption, again.scene)
    assert np.array_equal(first.image, again.image)
    assert (large.caption, large.scene) == (first.caption, first.scene)
    assert large.image.shape == (64, 64, 3)


def test_streams_differ() -> None:
    """Seeds or splits that share their random numbers, so that "test" repeats "train"."""
    drawn = [shapes.make(s, i, split) for s in (0, 1) for split in shapes.SPLITS for i in range(50)]
    assert len({sample.scene for sample in drawn}) == len(drawn)


def test_first_captions_stay() -> None:
    """A change of the data set that nobody meant: trained models and figures refer to it."""
    assert [shapes.make(0, index).caption for index in range(3)] == [
        "there is a small cyan cross",
        "a picture of a blue cross on the right of a large green square",
        "a picture of a big cyan square above a large cyan cross",
    ]


def test_held_out_pairs_do_not_leak() -> None:
    """A held-out pair in training, which would turn the generalization figure into recall."""
    assert len(shapes.HELD_OUT) == 4
    assert len({c for c, _ in shapes.HELD_OUT}) == len({s for _, s in shapes.HELD_OUT}) == 4
    for split in shapes.SPLITS:
        seen: set[tuple[str, str]] = set()
        for index in range(2000):
            sample = shapes.make(0, index, split, side=16)
            pairs = {(thing.color, thing.shape) for thing in sample.scene.things}
            claimed = shapes_checker.parse(sample.caption).objects
            assert pairs == {(said.color, said.shape) for said in claimed}
            assert bool(pairs & shapes.HELD_OUT) == (split == "heldout")
            seen |= pairs
        assert len(seen) == (32 if split == "heldout" else 28)


def test_scenes_are_plain() -> None:
    """Things cut by the edge or touching, and relations a person would not call so."""
    rng = np.random.default_rng(6)
    for number in range(4000):
        scene = shapes.draw_scene(rng, held_out=number % 2 == 1)
        for thing in scene.things:
            low = dataset.MARGIN + thing.extent - 1e-9
            assert low <= thing.x <= 1 - low and low <= thing.y <= 1 - low
            assert thing.radius == shapes.SIZES[thing.size]
        if scene.relation is None:
            assert len(scene.things) == 1
            continue
        first, second = scene.things
        assert (first.color, first.shape) != (second.color, second.shape)
        across, down = second.x - first.x, second.y - first.y
        along, aside = {
            "left of": (across, down),
            "right of": (-across, down),
            "above": (down, across),
            "below": (-down, across),
        }[scene.relation]
        assert along >= first.extent + second.extent + dataset.MIN_GAP - 1e-9
        assert abs(aside) <= dataset.MAX_OFFSET + 1e-9


def test_palette_is_well_apart() -> None:
    """Two colors, or a color and a background, that a blurred image would confuse."""
    palette = {**shapes.COLORS, **shapes.BACKGROUNDS}
    for one, other in itertools.combinations(palette, 2):
        distance = np.linalg.norm(np.subtract(palette[one], palette[other]))
        assert distance >= 100, (one, other, distance)


def test_shapes_have_about_the_same_area() -> None:
    """A size that could be told from the shape: a big cross no larger than a small square."""
    for radius in shapes.SIZES.values():
        x, y = dataset.grid(256)
        areas = [
            shapes.coverage(s, x - 0.5, y - 0.5, radius, 1 / 256).mean() for s in shapes.SHAPES
        ]
        assert max(areas) < 1.3 * min(areas)


def test_images_are_anti_aliased() -> None:
    """Jagged edges, which waste a small decoder's capacity, or a scene that shifts with scale."""
    blends = 0
    for index in range(100):
        sample = shapes.make(8, index)
        small, large = sample.image, shapes.make(8, index, side=64).image
        averaged = large.reshape(32, 2, 32, 2, 3).astype(float).mean((1, 3))
        difference = np.abs(averaged - small)
        assert difference.mean() < 1 and difference.max() < 50
        flat = 1 + len({thing.color for thing in sample.scene.things})
        blends += len(np.unique(small.reshape(-1, 3), axis=0)) > flat
    assert blends == 100


def test_shards_equal_the_samples(tmp_path: Path) -> None:
    """Shards with lost, reordered or altered samples, or whose bytes change between writings."""
    wds = pytest.importorskip("webdataset")
    paths = shapes.write_shards(tmp_path / "a", "heldout", 25, seed=9, samples_per_shard=10)
    assert [path.name for path in paths] == [f"heldout-0000{number}.tar" for number in range(3)]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [p.name for p in paths]
    read = list(wds.WebDataset([str(path) for path in paths], shardshuffle=False).decode("rgb8"))
    assert len(read) == 25
    for index, entry in enumerate(read):
        sample = shapes.make(9, index, "heldout")
        assert entry["__key__"] == sample.key
        assert np.array_equal(entry["png"], sample.image)
        assert entry["txt"] == sample.caption
        details = entry["json"]
        assert (details["seed"], details["split"], details["index"]) == (9, "heldout", index)
        assert details["caption"] == sample.caption
        assert details["scene"] == json.loads(json.dumps(asdict(sample.scene)))

    again = shapes.write_shards(tmp_path / "b", "heldout", 25, seed=9, samples_per_shard=10)
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]


def test_leftover_shards_are_refused(tmp_path: Path) -> None:
    """A smaller data set written over a larger one, so that a reader mixes the two."""
    shapes.write_shards(tmp_path, "test", 4, samples_per_shard=2)
    shapes.write_shards(tmp_path, "train", 1)
    shapes.write_shards(tmp_path, "test", 4, samples_per_shard=2)
    with pytest.raises(ValueError, match=r"test-00001\.tar"):
        shapes.write_shards(tmp_path, "test", 2, samples_per_shard=2)


def test_mistakes_are_named(tmp_path: Path) -> None:
    """A user's slip that surfaces far from its cause, or not at all."""
    with pytest.raises(ValueError, match="split must be one of train, test, heldout, not 'val'"):
        shapes.make(0, 0, "val")
    with pytest.raises(ValueError, match="side must be 16 pixels or more, not 8"):
        shapes.make(0, 0, side=8)
    with pytest.raises(ValueError, match="index=-1"):
        shapes.make(0, -1)
    with pytest.raises(ValueError, match="count: expected 1 or more, got 0"):
        shapes.write_shards(tmp_path / "none", "train", 0)
    with pytest.raises(ValueError, match="samples_per_shard: expected 1 or more, got 0"):
        shapes.write_shards(tmp_path / "none", "train", 1, samples_per_shard=0)
    assert not (tmp_path / "none").exists()

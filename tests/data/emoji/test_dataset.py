"""Scenes of emoji, their captions and what training never shows."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle1.data.emoji import HELD_OUT_SPLITS, SPLITS, EmojiDataset, read_emoji, write_shards
from dalle1.data.emoji.captions import with_article
from dalle1.data.emoji.dataset import base_code
from dalle1.data.emoji.pictures import BACKGROUNDS

from .packages import write_packages


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> EmojiDataset:
    packages, names = write_packages(tmp_path_factory.mktemp("packages"))
    return EmojiDataset(read_emoji(packages, names))


def shown(dataset: EmojiDataset, split: str, count: int = 400) -> list:  # type: ignore[type-arg]
    return [dataset.make(0, i, split, 32).scene for i in range(count)]


def test_a_sample_is_a_function_of_its_arguments(dataset: EmojiDataset) -> None:
    """A picture that depends on what was drawn before it, or a caption on the picture's size."""
    first = [dataset.make(3, i, "train") for i in range(20)]
    again = [dataset.make(3, i, "train") for i in reversed(range(20))][::-1]
    large = [dataset.make(3, i, "train", 96) for i in range(20)]
    for a, b, c in zip(first, again, large, strict=True):
        assert np.array_equal(a.image, b.image) and a.image.shape == (48, 48, 3)
        assert c.image.shape == (96, 96, 3)
        assert a.caption == b.caption == c.caption and a.scene == b.scene == c.scene
    others = {dataset.make(4, i, "train").caption for i in range(20)}
    assert others != {s.caption for s in first}
    assert {s.key for s in first}.isdisjoint({dataset.make(3, i, "test").key for i in range(20)})


def test_training_never_shows_what_is_held_out(dataset: EmojiDataset) -> None:
    """A benchmark of what the model has seen: emoji, styles or pairs that leak into training."""
    unseen = {base_code(p.code) for s in shown(dataset, "heldout_emoji") for p in s.pieces}
    styles = {
        (base_code(s.pieces[-1].code), s.pieces[-1].style) for s in shown(dataset, "heldout_styles")
    }
    assert unseen and styles
    for split in ("train", "test", "heldout_pairs", "contrasts"):
        for scene in shown(dataset, split, 1500):
            bases = [base_code(p.code) for p in scene.pieces]
            assert not unseen & set(bases)
            assert not styles & {(b, p.style) for b, p in zip(bases, scene.pieces, strict=True)}
            if scene.relation not in (None, "twice"):
                held_out = dataset.is_held_out_pair(bases[0], bases[1])
                assert held_out == dataset.is_held_out_pair(bases[1], bases[0])
                assert held_out == (split == "heldout_pairs") and bases[0] != bases[1]


def test_held_out_styles_are_known_in_others(dataset: EmojiDataset) -> None:
    """An emoji that training shows in no style, of which nothing could be transferred."""
    trained = {base_code(p.code) for s in shown(dataset, "train", 4000) for p in s.pieces}
    for scene in shown(dataset, "heldout_styles"):
        assert base_code(scene.pieces[0].code) in trained
        if scene.relation == "twice":  # the known style is above, to complete from
            upper, lower = scene.pieces
            assert upper.code == lower.code and upper.style != lower.style
            assert upper.style in dataset.styles(dataset.by_code[upper.code])


def test_what_is_held_out_stays_when_emoji_are_added(dataset: EmojiDataset) -> None:
    """A newer package that moves emoji from the test into the training data."""
    fewer = EmojiDataset(list(dataset.by_code.values())[::2])
    for code in fewer.by_code:
        unseen = code not in {e for e in dataset.by_code if base_code(e) in dataset._seen}
        assert unseen == (base_code(code) in fewer._unseen)


def test_relations_hold_in_the_picture(dataset: EmojiDataset) -> None:
    """A caption that says left of and a picture that shows right of."""
    found: Counter[str | None] = Counter()
    for scene in shown(dataset, "train", 1500):
        found[scene.relation] += 1
        for piece in scene.pieces:
            assert min(piece.x, piece.y) >= 0 and max(piece.x, piece.y) + piece.side <= 1
        if scene.relation is None:
            continue
        a, b = scene.pieces[:2]
        assert {
            "left of": a.x + a.side <= b.x,
            "right of": b.x + b.side <= a.x,
            "above": a.y + a.side <= b.y,
            "below": b.y + b.side <= a.y,
            "twice": a.y + a.side <= 0.5 <= b.y,
            "framed by": len(scene.pieces) == 13 and len({p.code for p in scene.pieces[1:]}) == 1,
        }[scene.relation]
    assert len(found) == 7 and 0.6 < found[None] / 1500 < 0.8


def test_contrasts_differ_in_one_thing(dataset: EmojiDataset) -> None:
    """Pairs of which a ranker learns nothing: the same scene twice, or two that share nothing;
    a change of style, emoji or places that never comes."""
    found: Counter[str] = Counter()
    for i in range(0, 600, 2):
        one, other = (dataset.make(0, n, "contrasts", 32) for n in (i, i + 1))
        a, b = one.scene, other.scene
        assert a != b and a.background == b.background and a.relation == b.relation
        pairs = list(zip(a.pieces, b.pieces, strict=True))
        assert all((p.x, p.y, p.side) == (q.x, q.y, q.side) for p, q in pairs)
        codes = [{p.code for p in s.pieces} for s in (a, b)]
        if any(p.style != q.style for p, q in pairs):
            swapped = [p.style for p in a.pieces] == [q.style for q in reversed(b.pieces)]
            found["swapped styles" if swapped and a.relation == "twice" else "style"] += 1
            assert codes[0] == codes[1]
        else:
            found["places" if codes[0] == codes[1] else "emoji"] += 1
            assert len(codes[0] - codes[1]) <= 1
        # Captions of what differs differ.
        names = [Counter(dataset.by_code[p.code].name for p in s.pieces) for s in (a, b)]
        assert names[0] != names[1] or one.caption != other.caption
    assert len(found) == 4 and min(found.values()) > 10, found


def test_captions_name_what_the_picture_shows(dataset: EmojiDataset) -> None:
    """A caption without the name, the style or the relation; a background that is another one."""
    for split in SPLITS:
        for i in range(200):
            sample = dataset.make(1, i, split, 32)
            names = [dataset.by_code[p.code].name for p in sample.scene.pieces[:2]]
            assert all(name in sample.caption for name in names), sample.caption
            assert all(p.style in sample.caption for p in sample.scene.pieces)
            said = [b for b in BACKGROUNDS if f"on {b}" in sample.caption]
            said += [b for b in BACKGROUNDS if f"{b} background" in sample.caption]
            assert set(said) <= {sample.scene.background}
            assert sample.caption == sample.caption.lower() and "  " not in sample.caption


def test_the_picture_is_the_pieces_on_the_background(dataset: EmojiDataset) -> None:
    """Black where a picture is see-through, a picture at another place or of another style."""
    for i in range(50):
        sample = dataset.make(2, i, "train", 128)
        inside = np.zeros((128, 128), bool)
        for piece in sample.scene.pieces:
            x, y, side = (round(v * 128) for v in (piece.x, piece.y, piece.side))
            inside[y : y + side, x : x + side] = True
            path = dataset.by_code[piece.code].pictures[piece.style]
            picture = Image.open(path).convert("RGB")
            color = picture.getpixel((picture.width // 2, picture.height // 2))
            middle = sample.image[y + side // 2, x + side // 2].astype(int)
            assert np.abs(middle - np.array(color)).max() <= 2
        assert (sample.image[~inside] == BACKGROUNDS[sample.scene.background]).all()


def test_shards_hold_the_samples_and_are_the_same_every_time(
    dataset: EmojiDataset, tmp_path: Path
) -> None:
    """Shards that a second machine writes otherwise, or a scene that the judge cannot read."""
    first = write_shards(dataset, tmp_path / "a", "test", 5, samples_per_shard=2)
    again = write_shards(dataset, tmp_path / "b", "test", 5, samples_per_shard=2)
    assert [p.name for p in first] == ["test-00000.tar", "test-00001.tar", "test-00002.tar"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
    sample = dataset.make(0, 2, "test")
    with tarfile.open(first[1]) as tar:
        image = Image.open(tar.extractfile(f"{sample.key}.png"))  # type: ignore[arg-type]
        assert np.array_equal(np.asarray(image), sample.image)
        details = json.load(tar.extractfile(f"{sample.key}.json"))  # type: ignore[arg-type]
    assert details["caption"] == sample.caption
    assert details["scene"]["pieces"][0]["code"] == sample.scene.pieces[0].code
    with pytest.raises(ValueError, match=r"holds test-00001\.tar of a larger data set"):
        write_shards(dataset, tmp_path / "a", "test", 2, samples_per_shard=2)


def test_shards_of_another_seed_are_written_over(dataset: EmojiDataset, tmp_path: Path) -> None:
    """Old shards that stay under the names of new ones, as if they were of the new seed."""
    (old,) = write_shards(dataset, tmp_path / "a", "test", 2, seed=0)
    before = old.read_bytes()
    (new,) = write_shards(dataset, tmp_path / "a", "test", 2, seed=1)
    (alone,) = write_shards(dataset, tmp_path / "b", "test", 2, seed=1)
    assert new.read_bytes() == alone.read_bytes() != before


def test_bad_arguments_are_named(dataset: EmojiDataset, tmp_path: Path) -> None:
    """An empty split or a picture of no pixels, found after an hour."""
    with pytest.raises(ValueError, match=r"split: expected one of train, .* got 'tests'"):
        dataset.make(0, 0, "tests")
    with pytest.raises(ValueError, match="seed, index: expected 0 or more, got 0 and -1"):
        dataset.make(0, -1)
    with pytest.raises(ValueError, match="side: expected at least 32 pixels, got 8"):
        dataset.make(0, 0, side=8)
    with pytest.raises(ValueError, match="count: expected 1 or more, got 0"):
        write_shards(dataset, tmp_path, "train", 0)
    with pytest.raises(ValueError, match="emoji: expected at least 2 for training, got 0"):
        EmojiDataset([])
    two = EmojiDataset([e for e in dataset.by_code.values() if e.code in dataset._seen][:2])
    for split in HELD_OUT_SPLITS[:1]:
        with pytest.raises(ValueError, match=f"split: {split} has no emoji among these 2"):
            two.make(0, 0, split)


def test_a_picture_that_is_none_is_named(tmp_path: Path) -> None:
    """A traceback from the image library that does not say which of 11,000 files is broken."""
    packages, names = write_packages(tmp_path)
    emoji = read_emoji(packages, names)
    for e in emoji:
        for path in e.pictures.values():
            path.write_bytes(b"none")
    with pytest.raises(ValueError, match=r"1f3\d\d[^ ]*: no picture: "):
        EmojiDataset(emoji).make(0, 0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("red apple", "a red apple"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("orange circle", "an orange circle"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("upwards button", "an upwards button"),
        ("european castle", "a european castle"),
        ("grapes", "grapes"),
        ("skis", "skis"),
        ("glass of milk", "a glass of milk"),
        ("cactus", "a cactus"),
        ("two hearts", "two hearts"),
        ("women holding hands", "women holding hands"),
        ("flag of japan", "the flag of japan"),
        ("cloud with rain", "a cloud with rain"),
    ],
)
def test_names_get_their_article(name: str, said: str) -> None:
    """Captions that no reader of English would type."""
    assert with_article(name) == said

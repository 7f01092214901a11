"""The reader: order, splitting, resuming, dirt."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle1.data import shapes
from dalle1.data.images import augment_dalle, augment_dvae, read_image, resize_area
from dalle1.data.shards import Batches, find_shards, raw_samples, read_captions


def encoded(number: int, kind: str = "PNG", mode: str = "RGB", side: int = 20) -> bytes:
    buffer = io.BytesIO()
    pixels = np.full((side, side + 4, 3), number % 250, np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(samples):
            for extension, data in sample.items():
                entry = tarfile.TarInfo(f"{path.stem}-{i:04d}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> str:
    for shard in range(3):
        rows = [
            {"png": encoded(10 * shard + i), "txt": f"number {10 * shard + i}".encode()}
            for i in range(10)
        ]
        write_tar(tmp_path / f"{shard:04d}.tar", rows)
    return str(tmp_path / "{0000..0002}.tar")


def captions(batches: Batches, count: int, workers: int = 0) -> list[list[str]]:
    loader = batches.loader(workers)
    return [next(loader).captions for _ in range(count)]


def made(data: str, **settings: object) -> Batches:
    return Batches(
        data,
        **({"batch_size": 6, "image_size": 16, "augmentation": augment_dvae, "seed": 3} | settings),  # type: ignore[arg-type]
    )


def test_an_epoch_has_every_sample_once(shards: str) -> None:
    """Samples lost at shard ends or in the shuffle buffer, or an order that is no shuffle."""
    epoch = [c for batch in captions(made(shards, buffer=8), 5) for c in batch]
    assert sorted(epoch) == sorted(f"number {i}" for i in range(30))
    assert epoch != sorted(epoch)
    second = [c for batch in captions(made(shards, buffer=8, first=5), 5) for c in batch]
    assert sorted(second) == sorted(epoch) and second != epoch


def test_order_depends_on_the_seed_alone(shards: str) -> None:
    """Runs that differ by hidden state, or seeds that make no difference."""
    assert captions(made(shards), 4) == captions(made(shards), 4)
    assert captions(made(shards), 4) != captions(made(shards, seed=4), 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_and_workers_change_nothing(shards: str, workers: int) -> None:
    """Batches that are repeated or left out after a stop, or reordered by worker processes."""
    whole = made(shards).loader()
    wanted = [next(whole) for _ in range(7)][3:]
    resumed = made(shards, first=3).loader(workers)
    for batch in wanted:
        again = next(resumed)
        assert again.captions == batch.captions and again.seeds == batch.seeds
        assert torch.equal(again.images, batch.images)


def test_ranks_share_a_batch(shards: str) -> None:
    """Ranks that train on the same samples, or on other ones than a single process would."""
    whole = captions(made(shards), 3)
    parts = [captions(made(shards, rank=r, ranks=2), 3) for r in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    with pytest.raises(ValueError, match="batch_size 6"):
        made(shards, ranks=4)


def test_folder_of_pairs(tmp_path: Path) -> None:
    """Pictures matched with another's caption, or those without a caption taken along."""
    for i, kind in enumerate(("png", "jpg", "webp")):
        encoder = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[kind]
        (tmp_path / f"p{i}.{kind}").write_bytes(encoded(40 * i, encoder))
        (tmp_path / f"p{i}.txt").write_text(f"picture {i}\n")
    (tmp_path / "lonely.png").write_bytes(encoded(9))
    loader = made(str(tmp_path), batch_size=3).loader()
    batch = next(loader)
    assert sorted(batch.captions) == ["picture 0", "picture 1", "picture 2"]
    for caption, image in zip(batch.captions, batch.images, strict=True):
        assert abs(float(image.float().mean()) - 40 * int(caption[-1])) < 3


def test_caption_under_a_key_of_the_json(tmp_path: Path) -> None:
    """caption_key ignored, so that the txt (or nothing) is trained on."""
    rows = [
        {"jpg": encoded(i, "JPEG"), "txt": b"no", "json": json.dumps({"alt": f"é {i}"}).encode()}
        for i in range(4)
    ]
    write_tar(tmp_path / "a.tar", rows)
    data = str(tmp_path / "a.tar")
    batch = next(made(data, batch_size=4, caption_key="alt").loader())
    assert sorted(batch.captions) == ["é 0", "é 1", "é 2", "é 3"]
    assert read_captions(data, "alt", 2) == ["é 0", "é 1"]


def test_bad_samples_are_replaced_and_counted(tmp_path: Path) -> None:
    """One broken picture that ends a run, or shrinks a batch without a word."""
    rows = [{"png": encoded(i), "txt": f"good {i}".encode()} for i in range(9)]
    rows += [
        {"png": b"no picture", "txt": b"bad"},
        {"png": encoded(1), "txt": b"  "},
        {"txt": b"bad"},
    ]
    write_tar(tmp_path / "a.tar", rows)
    batch = next(made(str(tmp_path / "a.tar"), batch_size=12).loader())
    assert len(batch.captions) == len(batch.images) == 12
    assert all(caption.startswith("good") for caption in batch.captions)
    assert batch.dropped.total() == 3


def test_a_truncated_shard_costs_its_rest_only(tmp_path: Path) -> None:
    """A download cut short that ends the run."""
    rows = [{"png": encoded(i, side=64), "txt": f"good {i}".encode()} for i in range(20)]
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", rows)
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: len(data) // 2 + 700])
    with pytest.warns(UserWarning, match="damaged"):
        read = list(raw_samples(str(tmp_path), None))
    assert 20 < len(read) < 40


def test_hardly_a_good_sample_is_an_error(tmp_path: Path) -> None:
    """A wrong caption_key that trains on one sample over and over."""
    write_tar(tmp_path / "a.tar", [{"png": encoded(1), "txt": b"x"}] * 8)
    with pytest.raises(ValueError, match="caption_key"):
        next(made(str(tmp_path / "a.tar"), batch_size=4, caption_key="alt").loader())


@pytest.mark.parametrize("data", ["no/{0..2}.tar", "no.tar"])
def test_missing_shards_are_named(data: str) -> None:
    """A misspelt path found out by a worker process an hour later."""
    with pytest.raises(ValueError, match="does not exist"):
        find_shards(data)


def test_empty_folder(tmp_path: Path) -> None:
    """A reader that waits for ever on a folder without samples."""
    with pytest.raises(ValueError, match="neither"):
        next(made(str(tmp_path)).loader())


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA"])
def test_picture_modes(mode: str) -> None:
    """Grey, palette, transparent or CMYK pictures refused, or read with shifted channels."""
    kind = "TIFF" if mode in ("CMYK", "LA") else "PNG"
    pixels = read_image(encoded(102, kind, mode))  # 102 is a level of the palette
    assert pixels.shape == (20, 24, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - 102).max() <= 3


def test_area_resize_against_exact_means() -> None:
    """Point sampling in place of areas, or weights that do not sum to 1."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 18, 3), dtype=np.uint8)
    half = resize_area(image, 6, 9)
    exact = image.reshape(6, 2, 9, 2, 3).astype(float).mean((1, 3))
    assert np.abs(half - exact).max() <= 0.5 + 1e-4
    # 3 -> 2 pixels: each is one whole neighbour and half of the middle one.
    row = np.array([[[30] * 3, [60] * 3, [90] * 3]], np.uint8)
    assert resize_area(row, 1, 2)[0, :, 0].tolist() == [40, 80]


@pytest.mark.parametrize("augment", [augment_dvae, augment_dalle])
@pytest.mark.parametrize("size", [(40, 40), (100, 70), (33, 90), (20, 25)])
def test_augmentations_give_the_models_size(augment: object, size: tuple[int, int]) -> None:
    """A crop that runs over the edge for some aspect ratio, also of pictures that are too small."""
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    for _ in range(20):
        assert augment(image, 32, rng).shape == (32, 32, 3)  # type: ignore[operator]


def test_only_the_dvae_flips() -> None:
    """Mirrored text and relations in the transformer's pictures (listing 2 has no flip)."""
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16] = 255
    rng = np.random.default_rng(2)
    for augment, flips in ((augment_dvae, True), (augment_dalle, False)):
        seen = {bool(augment(image, 32, rng)[0, 0, 0]) for _ in range(30)}
        assert seen == ({True, False} if flips else {True})


def test_builtin_shards_read_like_any(tmp_path: Path) -> None:
    """A private path for the built-in data that hides faults of the reader."""
    shapes.write_shards(tmp_path, "train", 12, side=16, samples_per_shard=5)
    batch = next(made(str(tmp_path), batch_size=12, augmentation=augment_dalle).loader())
    wanted = {shapes.make(0, i, "train", 16).caption for i in range(12)}
    assert set(batch.captions) == wanted

"""Square crops of a folder of photographs, as shards to train on and as unseen images.

Every fifth photograph is kept for unseen crops: two crops of one photograph may overlap.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle1.common.files import name_text
from dalle1.common.images import to_tensor
from dalle1.data.generated import write_generated
from dalle1.data.samples import BadSample
from dalle1.data.transforms import read_image

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
EVERY = 5  # one photograph of so many is unseen
LEAST = 5  # photographs
SHARES = (0.1, 0.5)  # side of a crop / shorter side of its photograph, smallest and largest
SHARD = 1000


@dataclass(frozen=True)
class Crop:
    """Where a sample comes from."""

    photograph: str
    left: int
    top: int
    side: int


@dataclass(frozen=True, eq=False)
class CropSample:
    """An image (uint8 [side, side, 3]) and what a sample of a generated data set has besides."""

    key: str
    image: np.ndarray
    caption: str
    scene: Crop


def photographs_in(folder: Path) -> list[Path]:
    """Image files below a folder, by name."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    return sorted(found, key=lambda path: name_text(path.relative_to(folder)))


def digest_of(folder: Path) -> str:
    """12 digits that change with the names or sizes of the images in a folder."""
    names = [
        f"{name_text(p.relative_to(folder))} {p.stat().st_size}" for p in photographs_in(folder)
    ]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def missing(folder: Path | None) -> str | None:
    """What a user has to do before crops can be made; None where the folder will do."""
    if folder is not None and len(photographs_in(folder)) >= LEAST:
        return None
    got = "none" if folder is None else f"{str(folder)!r}"
    return (
        f"--photographs: expected a folder of at least {LEAST} images ({', '.join(ENDINGS)}), got "
        f"{got}; docs/findings.md names packages that hold some"
    )


def write_crops(photographs: Path, folder: Path, count: int, side: int) -> None:
    """Writes about `count` crops of the photographs to train on, as shards."""
    crops = _crops(_split(photographs, unseen=False), count, side, 0)
    # Crops of one photograph lie in different shards.
    order = np.random.default_rng(0).permutation(len(crops))
    write_generated(lambda i: crops[order[i]], folder, "train", len(crops), 0, SHARD)


def unseen_crops(photographs: Path, count: int, side: int) -> Tensor:
    """About `count` crops of the unseen photographs: float [n, 3, side, side] in [0, 1]."""
    crops = _crops(_split(photographs, unseen=True), count, side, 1)
    return torch.stack([to_tensor(sample.image) for sample in crops])


def _split(folder: Path, unseen: bool) -> list[Path]:
    paths = photographs_in(folder)
    return [p for i, p in enumerate(paths) if (i % EVERY == EVERY - 1) == unseen]


def _crops(paths: list[Path], count: int, side: int, seed: int) -> list[CropSample]:
    """As many crops of each photograph as of any other; photographs that cannot be read, or are
    too small, give none.

    Raises ValueError where none can be used.
    """
    samples: list[CropSample] = []
    for number, path in enumerate(paths):
        rng = np.random.default_rng([seed, number])
        try:
            pixels = read_image(path.read_bytes())
        except BadSample:
            continue
        shorter = min(pixels.shape[:2])
        if shorter < 2 * side:
            continue
        image = Image.fromarray(pixels)
        for _ in range(-(-count // len(paths))):
            size = int(shorter * rng.uniform(*SHARES))
            size = min(max(size, side), shorter)
            left = int(rng.integers(image.width - size + 1))
            top = int(rng.integers(image.height - size + 1))
            box = (left, top, left + size, top + size)
            crop = np.asarray(image.resize((side, side), Image.Resampling.BOX, box=box))
            key = f"crop-{number:05d}-{len(samples):08d}"
            samples.append(
                CropSample(key, crop, "a photograph", Crop(name_text(path), left, top, size))
            )
    if not samples:
        raise ValueError(
            f"--photographs: expected images of at least {2 * side} pixels a side, got none among "
            f"{len(paths)}; name another folder"
        )
    return samples

"""Dead leaves: images of disks that hide one another, with the statistics of photographs.

Radii are drawn with a density of r^-3, which gives edges at all scales, as photographs have (Lee,
Mumford and Huang 2001). So no two tokens of an image are alike. On the built-in shapes nearly all
are the same background, and the paper's dVAE then collapses to a few codes (docs/dvae.md).

Dimensions: R side, d disks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dalle1.common.images import to_tensor
from dalle1.data.generated import write_generated

SPLITS = ("train", "test")
DISKS = 200
FINE = 2  # an image is rendered with so many times its side
RADII = (1.5, 24.0)  # smallest and largest, in pixels of 32
GRAIN = 0.02  # sigma of the noise that cameras add
SHADE = 0.12  # largest change of brightness across a disk


@dataclass(frozen=True)
class Scene:
    """Where an image comes from."""

    seed: int
    index: int


@dataclass(frozen=True, eq=False)
class LeavesSample:
    """An image (uint8 [R, R, 3]) and what a sample of a generated data set has besides."""

    key: str
    image: np.ndarray
    caption: str
    scene: Scene


def make(seed: int, index: int, split: str = "train", side: int = 32) -> LeavesSample:
    """A sample of a split: always the same one for the same arguments."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}; name another")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    return LeavesSample(
        f"{split}-{index:08d}", _render(rng, side), "dead leaves", Scene(seed, index)
    )


def write_leaves(folder: Path, count: int, side: int = 32) -> None:
    """Writes samples 0 ... count - 1 of the training split as shards."""
    write_generated(lambda index: make(0, index, "train", side), folder, "train", count, 0, 1000)


def unseen_leaves(count: int, side: int = 32) -> Tensor:
    """Images of the test split: float [count, 3, side, side] in [0, 1]."""
    return torch.stack([to_tensor(make(0, i, "test", side).image) for i in range(count)])


def _render(rng: np.random.Generator, side: int) -> np.ndarray:
    fine = side * FINE
    low, high = (r * fine / 32 for r in RADII)
    # The inverse of the distribution function of a density of r^-3.
    u = rng.random(DISKS)
    radius = (low**-2 + u * (high**-2 - low**-2)) ** -0.5
    x, y = rng.uniform(-high / 2, fine + high / 2, (2, DISKS))
    at = np.arange(fine) + 0.5
    dx, dy = at[None, :] - x[:, None], at[None, :] - y[:, None]  # [d, R]
    inside = dx[:, None, :] ** 2 + dy[:, :, None] ** 2 < radius[:, None, None] ** 2  # [d, R, R]
    inside[-1] = True  # behind all others
    front = inside.argmax(axis=0)  # [R, R]: the first disk that covers a pixel
    # Colors of an image are alike, and differ more in brightness than in hue.
    mean = rng.uniform(0.2, 0.8, 3)
    colors = mean + 0.22 * rng.standard_normal((DISKS, 1)) + 0.09 * rng.standard_normal((DISKS, 3))
    angle = rng.uniform(0, 2 * np.pi, DISKS)
    rows, columns = np.indices((fine, fine))
    along = (columns + 0.5 - x[front]) * np.cos(angle)[front]
    along += (rows + 0.5 - y[front]) * np.sin(angle)[front]
    shade = SHADE * np.clip(along / radius[front], -1, 1)
    pixels = colors[front] + shade[..., None]
    pixels = pixels.reshape(side, FINE, side, FINE, 3).mean(axis=(1, 3))
    pixels += GRAIN * rng.standard_normal(pixels.shape)
    result: np.ndarray = np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8)
    return result

"""Both augmentations against the listings' numbers (paper, appendix A.2 and B.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dalle1.data import transforms as images
from dalle1.data.transforms import Augmentation, augment_dalle, augment_dvae

SIDE = 32


def coordinates(height: int, width: int) -> np.ndarray:
    """An image whose pixel (y, x) is (y, x, 0)."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, np.zeros_like(y)], axis=2).astype(np.uint8)


def offsets(augment: Augmentation, height: int, width: int) -> set[tuple[int, int]]:
    """Upper left corners of the first crop, where neither the resize nor the second crop acts."""
    rng = np.random.default_rng(0)
    corners = set()
    for _ in range(3000):
        out = augment(coordinates(height, width), SIDE, rng)
        assert out.shape == (SIDE, SIDE, 3)
        y, x, _ = out[0, min((0, -1), key=lambda i, out=out: int(out[0, i, 1]))]
        corners.add((int(y), int(x)))
    return corners


def test_listing_1_crops_anywhere() -> None:
    """A crop near the middle alone, or one that misses an end of the slack."""
    assert offsets(augment_dvae, SIDE, SIDE + 40) == {(0, x) for x in range(41)}
    assert offsets(augment_dvae, SIDE + 40, SIDE) == {(y, 0) for y in range(41)}


def test_listing_2_crops_near_the_middle() -> None:
    """An offset outside of [3/8, 5/8] of the slack, or always the middle."""
    assert offsets(augment_dalle, SIDE, SIDE + 80) == {(0, x) for x in range(30, 51)}
    assert offsets(augment_dalle, SIDE + 80, SIDE) == {(y, 0) for y in range(30, 51)}


@pytest.mark.parametrize(
    ("augment", "short", "low", "high"),
    [
        (augment_dvae, 500, 36, 48),  # 9/8 and 12/8 of the side
        (augment_dvae, 40, 36, 40),  # no more than the image has
        (augment_dvae, 34, 34, 34),
        (augment_dalle, 500, 32, 36),  # the side and 9/8 of it
        (augment_dalle, 34, 32, 34),
        (augment_dvae, 20, 32, 32),  # ours: a smaller image is enlarged
        (augment_dalle, 20, 32, 32),
    ],
)
def test_resize(
    augment: Augmentation,
    short: int,
    low: int,
    high: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A range of sides that is another listing's, or that leaves out an end."""
    seen = set()
    resize = images.resize_area

    def recorded(image: np.ndarray, height: int, width: int, *window: Any) -> np.ndarray:
        assert image.shape[:2] == (short, short) and height == width
        seen.add(height)
        return resize(image, height, width, *window)

    monkeypatch.setattr(images, "resize_area", recorded)
    rng = np.random.default_rng(0)
    image = np.zeros((short, short + 3, 3), np.uint8)
    for _ in range(300):
        assert augment(image, SIDE, rng).shape == (SIDE, SIDE, 3)
    assert seen == set(range(low, high + 1))


@pytest.mark.parametrize(("augment", "slack"), [(augment_dvae, 16), (augment_dalle, 4)])
def test_second_crop(augment: Augmentation, slack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last crop that is the middle's, or that misses a row or column of the slack."""

    def whole(
        image: np.ndarray, height: int, width: int, rows: tuple[int, int], columns: tuple[int, int]
    ) -> np.ndarray:
        return coordinates(height, width)[slice(*rows), slice(*columns)]

    monkeypatch.setattr(images, "resize_area", whole)
    rng = np.random.default_rng(0)
    rows, columns = set(), set()
    for _ in range(6000):
        out = augment(np.zeros((500, 500, 3), np.uint8), SIDE, rng)
        rows.add(int(out[0, 0, 0]))
        columns.add(min(int(out[0, 0, 1]), int(out[0, -1, 1])))
    assert rows == columns == set(range(slack + 1))

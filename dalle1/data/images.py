"""Decoding and augmentation of pictures (paper listings 1 and 2).

Dimensions: h w of a picture, s = min(h, w), R the model's side. Pictures are uint8 [h, w, 3].
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image

from dalle1.pictures import to_rgb

Pixels = np.ndarray  # uint8 [h, w, 3]
Augmentation = Callable[[Pixels, int, np.random.Generator], Pixels]


def read_image(data: bytes) -> Pixels:
    """Pixels of an encoded picture of any mode, see `to_rgb`.

    Raises what PIL raises (OSError and others) when the bytes are no picture.
    """
    with Image.open(io.BytesIO(data)) as image:
        return np.array(to_rgb(image))


@lru_cache(maxsize=256)
def _area_weights(length: int, target: int) -> np.ndarray:
    """Share of source pixel j in target pixel i: float32 [target, length], rows sum to 1."""
    edges = np.linspace(0, length, target + 1)
    start, end = edges[:-1, None], edges[1:, None]
    pixel = np.arange(length)[None]
    overlap = np.clip(np.minimum(end, pixel + 1) - np.maximum(start, pixel), 0, None)
    shares: np.ndarray = (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)
    return shares


def resize_area(image: Pixels, height: int, width: int) -> Pixels:
    """Each new pixel is the mean of the area it covers, then rounded to 8 bits."""
    if image.shape[:2] == (height, width):
        return image
    rows = _area_weights(image.shape[0], height)
    columns = _area_weights(image.shape[1], width)
    mixed = np.einsum("yh,hwc,xw->yxc", rows, image.astype(np.float32), columns, optimize=True)
    rounded: Pixels = np.clip(np.round(mixed), 0, 255).astype(np.uint8)
    return rounded


def _crop(image: Pixels, top: int, left: int, side: int) -> Pixels:
    return image[top : top + side, left : left + side]


def _resized_crop(
    image: Pixels, low: int, high: int, side: int, rng: np.random.Generator
) -> Pixels:
    """A square picture to a random side in [low, high], then a random side x side crop."""
    # A picture smaller than the model's is enlarged; the listings assume that none is.
    target = max(side, int(rng.integers(low, high + 1)))
    image = resize_area(image, target, target)
    top, left = rng.integers(0, target - side + 1, size=2)
    return _crop(image, int(top), int(left), side)


def middle_square(image: Pixels, side: int) -> Pixels:
    """The largest square in the middle, scaled to `side`: what a picture is compared by."""
    h, w = image.shape[:2]
    s = min(h, w)
    return resize_area(_crop(image, (h - s) // 2, (w - s) // 2, s), side, side)


def augment_dvae(image: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    """Listing 1: random square crop, random resize, random crop, random horizontal flip."""
    h, w = image.shape[:2]
    s = min(h, w)
    image = _crop(image, int(rng.integers(0, h - s + 1)), int(rng.integers(0, w - s + 1)), s)
    image = _resized_crop(image, min(s, side * 9 // 8), min(s, side * 12 // 8), side, rng)
    return image[:, ::-1] if rng.random() < 0.5 else image


def augment_dalle(image: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    """Listing 2: a square crop from near the middle, random resize, random crop, no flip."""
    h, w = image.shape[:2]
    s = min(h, w)
    # Offsets in [3/8, 5/8] of the slack.
    top, left = ((length - s) * rng.uniform(3 / 8, 5 / 8) for length in (h, w))
    image = _crop(image, round(top), round(left), s)
    return _resized_crop(image, min(s, side), min(s, side * 9 // 8), side, rng)

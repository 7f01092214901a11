"""Decoding and augmentation of images (paper listings 1 and 2).

Dimensions: h w of an image, s = min(h, w), R the model's side. Images are uint8 [h, w, 3].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
from einops import rearrange
from PIL import Image

from dalle1.common.image_files import TooManyPixels, open_encoded
from dalle1.common.images import to_rgb
from dalle1.data.samples import (
    EXTREME_ASPECT,
    IMAGE_TOO_LARGE,
    MAX_ASPECT,
    MAX_PIXELS,
    UNREADABLE,
    BadSample,
)

Pixels = np.ndarray  # uint8 [h, w, 3]
Augmentation = Callable[[Pixels, int, np.random.Generator], Pixels]
Bands = list[tuple[int, int, int, int, np.ndarray]]
# What images of the web are, whatever their names say; PIL starts programs for some other formats.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
BAND = 16  # new rows at a time; each is a mix of a few neighboring old ones


@contextmanager
def opened_image(
    data: bytes, max_pixels: int | None = MAX_PIXELS, max_aspect: float | None = MAX_ASPECT
) -> Iterator[Image.Image]:
    """An encoded image within the limits, as PIL has it before its pixels are decoded.

    Args:
        data: the encoded image.
        max_pixels: of an image that is decoded; None: any.
        max_aspect: longer side / shorter side; None: any.

    Raises:
        BadSample: it is beyond a limit, or unreadable. Whatever a decoder raises inside the block
            counts as unreadable, too: bad data cost one sample and no more.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's guesses
            with open_encoded(data, max_pixels, FORMATS) as image:
                w, h = image.size
                if max_aspect is not None and max(w, h) > max_aspect * min(w, h):
                    raise BadSample(EXTREME_ASPECT)
                yield image
    except BadSample:
        raise
    except (TooManyPixels, MemoryError) as error:
        raise BadSample(IMAGE_TOO_LARGE) from error
    except Exception as error:
        raise BadSample(UNREADABLE) from error


def read_image(
    data: bytes, max_pixels: int | None = MAX_PIXELS, max_aspect: float | None = MAX_ASPECT
) -> Pixels:
    """Pixels of an encoded image of any mode, see `to_rgb`; limits and errors of `opened_image`."""
    with opened_image(data, max_pixels, max_aspect) as image:
        return np.asarray(to_rgb(image))


@lru_cache(maxsize=512)  # a square crop of a few sizes is resized to a few sizes
def _bands(length: int, target: int) -> Bands:
    """Shares of source pixels in target pixels, BAND of these at a time: (start and end among the
    targets, start and end of the sources that they cover, float32 [targets, sources], rows sum to
    1)."""
    edges = np.arange(target + 1) * (length / target)
    low = edges[:-1].astype(np.int64)
    pixel = low[:, None] + np.arange(-(-length // target) + 1)  # more than one covers
    right = np.minimum(edges[1:, None], length)
    shares = np.clip(np.minimum(right, pixel + 1) - np.maximum(edges[:-1, None], pixel), 0, None)
    shares /= shares.sum(axis=1, keepdims=True)
    # Each target's row begins where its band begins.
    starts = low[::BAND]
    column = pixel - np.repeat(starts, BAND)[:target, None]
    dense = np.zeros((target, int(column.max()) + 1), np.float32)
    dense[np.arange(target)[:, None], column] = shares
    bands = []
    for i, first in zip(range(0, target, BAND), starts.tolist(), strict=True):
        last, stop = min(i + BAND, target), min(first + dense.shape[1], length)
        bands.append((i, last, first, stop, dense[i:last, : stop - first]))
    return bands


def _within(bands: Bands, first: int, last: int) -> Bands:
    """Those of the targets [first, last), which count from 0."""
    found = []
    for i, end, low, high, shares in bands:
        start, stop = max(i, first), min(end, last)
        if start < stop:
            found.append((start - first, stop - first, low, high, shares[start - i : stop - i]))
    return found


def resize_area(
    image: Pixels,
    height: int,
    width: int,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
) -> Pixels:
    """An image of another size, each pixel the mean of the area it covers, rounded to 8 bits.

    Args:
        image: uint8 [h, w, 3].
        height: rows of the new image.
        width: its columns.
        rows: first and last + 1 of those of the new image that are wanted; None: all.
        columns: the same.

    Returns:
        uint8 [rows, columns, 3].
    """
    (top, bottom), (left, right) = rows or (0, height), columns or (0, width)
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return image[top:bottom, left:right]
    down, across = _within(_bands(h, height), top, bottom), _within(_bands(w, width), left, right)
    # Only what the window covers, and each color by itself: products of small dense matrices.
    low, high = across[0][2], max(band[3] for band in across)
    planes = np.ascontiguousarray(rearrange(image[:, low:high], "h w c -> c h w"))
    source = planes.astype(np.float32)  # faster than both at once
    mixed = np.empty((3, bottom - top, high - low), np.float32)
    for start, end, a, b, shares in down:
        np.matmul(shares, source[:, a:b], out=mixed[:, start:end])
    result = np.empty((3, bottom - top, right - left), np.float32)
    for start, end, a, b, shares in across:
        np.matmul(mixed[:, :, a - low : b - low], shares.T, out=result[:, :, start:end])
    rounded: Pixels = np.rint(result, out=result).astype(np.uint8)
    return rearrange(rounded, "c h w -> h w c")


def _crop(image: Pixels, top: int, left: int, side: int) -> Pixels:
    return image[top : top + side, left : left + side]


def _resized_crop(
    image: Pixels, low: int, high: int, side: int, rng: np.random.Generator
) -> Pixels:
    """A square image to a random side in [low, high], then a random side x side crop."""
    # An image smaller than the model's is enlarged; the listings assume that none is.
    target = max(side, int(rng.integers(low, high + 1)))
    top, left = (int(start) for start in rng.integers(0, target - side + 1, size=2))
    return resize_area(image, target, target, (top, top + side), (left, left + side))


def middle_square(image: Pixels, side: int) -> Pixels:
    """uint8 [side, side, 3]: the largest square in the middle, scaled."""
    h, w = image.shape[:2]
    s = min(h, w)
    return resize_area(_crop(image, (h - s) // 2, (w - s) // 2, s), side, side)


def no_augmentation(image: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    """`middle_square`, always the same one."""
    return middle_square(image, side)


def augment_dvae(image: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    """uint8 [side, side, 3] by listing 1: a random square crop, resize, crop and flip."""
    h, w = image.shape[:2]
    s = min(h, w)
    image = _crop(image, int(rng.integers(0, h - s + 1)), int(rng.integers(0, w - s + 1)), s)
    image = _resized_crop(image, min(s, side * 9 // 8), min(s, side * 12 // 8), side, rng)
    return image[:, ::-1] if rng.random() < 0.5 else image


def augment_dalle(image: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    """uint8 [side, side, 3] by listing 2: a square crop from near the middle, a random resize and
    crop, no flip."""
    h, w = image.shape[:2]
    s = min(h, w)
    # Offsets in [3/8, 5/8] of the slack.
    top, left = ((length - s) * rng.uniform(3 / 8, 5 / 8) for length in (h, w))
    image = _crop(image, round(top), round(left), s)
    return _resized_crop(image, min(s, side), min(s, side * 9 // 8), side, rng)

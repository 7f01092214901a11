"""Encoded images as PIL opens them, under our own limit of pixels.

`PIL.Image.open` warns above `PIL.Image.MAX_IMAGE_PIXELS`, and refuses above twice of it. That
number belongs to the program that uses this library and counts for all of its images. So it is
neither asked nor changed here: PIL's plugins are called as `PIL.Image.open` calls them, with our
limit in place of PIL's.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import Any

from PIL import Image, UnidentifiedImageError

from dalle1.common.files import expand_home
from dalle1.common.images import to_rgb

CHECK = "_decompression_bomb_check"  # what PIL's plugins call before they take memory
PREFIX = 16  # bytes that tell a format


class TooManyPixels(ValueError):
    """An image beyond a limit of pixels."""


class UnreadableImage(ValueError):
    """Data that are no image of the formats that are taken, or a damaged one."""


def open_encoded(
    data: bytes, max_pixels: int | None = None, formats: Sequence[str] | None = None
) -> Image.Image:
    """An encoded image as PIL has it before its pixels are decoded; to be closed.

    Args:
        data: the encoded image.
        max_pixels: of an image that is opened; None: any.
        formats: those that are tried, by PIL's names; None: all that PIL knows.

    Raises:
        TooManyPixels: it is beyond the limit.
        UnidentifiedImageError: it is of none of the formats. A decoder may raise anything else.
    """
    if formats is None or not set(formats) <= set(Image.OPEN):
        Image.init()  # loads the plugins
    for name in Image.ID if formats is None else formats:
        factory, accepts = Image.OPEN.get(name, (None, None))
        if factory is None:
            continue
        try:
            accepted = accepts is None or accepts(data[:PREFIX])
            if not accepted or isinstance(accepted, str):  # a text says what the plugin lacks
                continue
            image: Image.Image = _limited(factory, max_pixels)(io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # plugins say so: not theirs
            continue
        _check(image.size, max_pixels)
        return image
    raise UnidentifiedImageError("cannot identify image file")


def read_encoded(data: bytes, max_pixels: int, formats: Sequence[str]) -> Image.Image:
    """An image that somebody has sent, as RGB; arguments as for `open_encoded`.

    Raises:
        TooManyPixels: it is beyond the limit.
        UnreadableImage: it is of none of the formats, or damaged.
    """
    try:
        with open_encoded(data, max_pixels, formats) as image:
            return to_rgb(image)
    except TooManyPixels:
        raise
    except Exception as error:  # malformed data make PIL raise more than its own errors
        raise UnreadableImage(f"expected an image as {', '.join(formats)}, got another") from error


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """An image file of a user's, of any size, as RGB; ValueError that names it if it cannot be
    read."""
    try:
        with open_encoded(Path(expand_home(path)).read_bytes()) as image:
            return to_rgb(image)
    except MemoryError as error:
        raise ValueError(f"image {path}: cannot be read: it is too large for the memory") from error
    except Exception as error:  # malformed data make PIL raise more than its own errors
        raise ValueError(f"image {path}: cannot be read: {error}") from error


def _check(size: tuple[int, int], max_pixels: int | None) -> None:
    if max_pixels is not None and size[0] * size[1] > max_pixels:
        raise TooManyPixels(f"{size[0]} x {size[1]} pixels: expected at most {max_pixels:,}")


class _Limited:
    """The module `PIL.Image` as a plugin sees it, with our limit."""

    def __init__(self, max_pixels: int | None) -> None:
        self.max_pixels = max_pixels

    def __getattr__(self, name: str) -> Any:
        return getattr(Image, name)

    def _decompression_bomb_check(self, size: tuple[int, int], **_: Any) -> None:
        _check(size, self.max_pixels)


@lru_cache(maxsize=64)
def _limited(factory: Any, max_pixels: int | None) -> Any:
    """A plugin whose methods ask for our limit wherever they ask for PIL's; most do nowhere."""
    if not isinstance(factory, type):
        return factory
    methods: dict[str, Any] = {}
    for name, method in vars(factory).items():
        if isinstance(method, FunctionType) and CHECK in method.__code__.co_names:
            seen = {**method.__globals__, "Image": _Limited(max_pixels)}
            methods[name] = FunctionType(
                method.__code__, seen, name, method.__defaults__, method.__closure__
            )
            methods[name].__kwdefaults__ = method.__kwdefaults__
    return type(factory.__name__, (factory,), methods) if methods else factory

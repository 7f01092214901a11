"""Pictures of emoji: read once, scaled once for each size, drawn where they can be seen.

Colors of a scaled picture are multiplied by their opacity, so that what is see-through leaves no
seam of its hidden color around the emoji.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "grey": (160, 160, 160),
    "black": (24, 24, 24),
    "blue": (120, 170, 240),
    "green": (150, 210, 150),
    "yellow": (250, 230, 130),
    "pink": (245, 190, 205),
    "orange": (250, 190, 120),
}
LARGEST_PICTURE = 64  # pixels of a side that are kept of a source
# An emoji stands out where this share of it differs by so much, of 255, in one of the colors: a
# yellow heart on orange does not.
LEAST_SHARE, LEAST_DIFFERENCE = 0.125, 48
CACHED = 16384  # pictures: 190 MB at most; of scaled ones, of 16 to 56 pixels, about as much


def draw(canvas: np.ndarray, path: Path, x: int, y: int, size: int) -> None:
    """Draws a picture of `size` pixels onto a canvas (uint8 [height, width, 3]), in place.

    Raises ValueError where the file is no picture.
    """
    colors, see_through = _scaled(path, size)
    below = canvas[y : y + size, x : x + size]
    below[:] = colors + (below * see_through + 127) // 255


@lru_cache(maxsize=CACHED)
def stands_out_from(path: Path) -> frozenset[str]:
    """The backgrounds on which a picture can be seen."""
    side = LARGEST_PICTURE // 2
    pixels = np.asarray(read_picture(path).resize((side, side), Image.Resampling.BOX)).astype(
        np.int16
    )
    solid = pixels[..., 3] >= 128
    colors = pixels[solid][:, :3]
    least = LEAST_SHARE * max(len(colors), 1)
    backgrounds = np.array(list(BACKGROUNDS.values()), np.int16)[:, None]  # [8, 1, 3]
    red, green, blue = np.moveaxis(np.abs(colors - backgrounds) > LEAST_DIFFERENCE, -1, 0)
    seen = (red | green | blue).sum(1) >= least
    return frozenset(name for name, enough in zip(BACKGROUNDS, seen, strict=True) if enough)


@lru_cache(maxsize=CACHED)
def _scaled(path: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture's colors times its opacity (uint8 [size, size, 3]), and 255 less the opacity
    (uint16 [size, size, 1])."""
    picture = read_picture(path).convert("RGBa")
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS))
    opacity = pixels[..., 3:]
    return np.minimum(pixels[..., :3], opacity), 255 - opacity.astype(np.uint16)


@lru_cache(maxsize=CACHED)
def read_picture(path: Path) -> Image.Image:
    """A picture as RGBA of at most 64 pixels; ValueError where it is none."""
    try:
        with Image.open(path) as image:
            image.load()
            picture = image.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: no picture: {error}") from error
    if max(picture.size) > LARGEST_PICTURE:
        size = (LARGEST_PICTURE, LARGEST_PICTURE)
        picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2)
    return picture

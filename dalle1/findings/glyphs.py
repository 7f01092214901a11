"""Images of one colored glyph: a data set whose numbers of colors and of shapes are settings.

A shape is a pattern of 4 x 4 pixels. An image of 8 x 8 pixels shows one in one color, at one of
nine places, on black. A caption is two words, the color and the shape, each of them one token. Of
each shape, some colors are never shown in training.

Dimensions: n images, t text positions (3), 8 x 8 pixels.
"""

from __future__ import annotations

import colorsys
from functools import lru_cache

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from dalle1.common.config import Section
from dalle1.tokenizer import padding_id

SIDE, GLYPH, LATTICE = 8, 4, 2  # of an image, of a glyph, of the places; in pixels
TEXT_LENGTH = 3  # color, shape, and a place for the end of the caption
PLACES = tuple(
    (y, x) for y in range(0, SIDE - GLYPH + 1, LATTICE) for x in range(0, SIDE - GLYPH + 1, LATTICE)
)
DENSITY = 0.55  # of a glyph's pixels
MAX_SHAPES = 1024
GLYPHS_SEED = 7  # all runs have the same shapes


class GlyphSettings(Section):
    """What a data set of glyphs shows."""

    colors: int = Field(8, ge=2, le=64, description="colors")
    shapes: int = Field(32, ge=2, le=MAX_SHAPES, description="shapes")
    held_out: int = Field(1, ge=1, description="colors of each shape that training never shows")
    shades: int = Field(1, ge=1, le=4, description="of a color; each pixel has one by chance")

    @model_validator(mode="after")
    def _check(self) -> GlyphSettings:
        if self.held_out >= self.colors:
            raise ValueError(f"held_out: expected less than {self.colors}, got {self.held_out}")
        return self

    @property
    def text_vocab(self) -> int:
        """Tokens: the end of the caption, colors, shapes."""
        return 1 + self.colors + self.shapes


def pairs_of(settings: GlyphSettings, held_out: bool) -> np.ndarray:
    """All (color, shape) that training shows, or all that it does not: int64 [n, 2].

    The colors of the held-out pairs go round, so that every color and every shape is shown.
    """
    color, shape = np.divmod(np.arange(settings.colors * settings.shapes), settings.shapes)
    out = (shape - color) % settings.colors < settings.held_out
    pairs: np.ndarray = np.stack([color, shape], axis=1)[out == held_out]
    return pairs


def draw_images(settings: GlyphSettings, pairs: np.ndarray, rng: np.random.Generator) -> Tensor:
    """An image of each (color, shape), anywhere: int64 [n, 2] -> float32 [n, 3, 8, 8] in [0, 1]."""
    n = len(pairs)
    values = np.zeros((n, SIDE, SIDE), np.int64)  # 0 is black, then colors, each with its shades
    patterns, places = glyphs(settings.shapes), np.array(PLACES)[rng.integers(len(PLACES), size=n)]
    shades = rng.integers(settings.shades, size=(n, GLYPH, GLYPH))
    for i, ((color, shape), (y, x)) in enumerate(zip(pairs, places, strict=True)):
        ink = 1 + color * settings.shades + shades[i]
        values[i, y : y + GLYPH, x : x + GLYPH] = patterns[shape] * ink
    return torch.from_numpy(palette(settings)[values]).movedim(-1, 1).contiguous()


def read_images(settings: GlyphSettings, images: Tensor) -> np.ndarray:
    """The (color, shape) of images, float [n, 3, 8, 8] -> int64 [n, 2].

    -1 stands for a color where there are several or none, and for a shape where the pixels that are
    not black are no glyph at any of the places.
    """
    rgb = images.movedim(1, -1)[..., None, :].numpy()  # [n, 8, 8, 1, 3]
    values = np.square(rgb - palette(settings)).sum(-1).argmin(-1)
    known = _places_of(settings.shapes)
    found = []
    for image in values:
        colors = np.unique((image[image > 0] - 1) // settings.shades)
        color = int(colors[0]) if len(colors) == 1 else -1
        found.append((color, known.get((image > 0).tobytes(), -1)))
    return np.array(found, np.int64).reshape(-1, 2)


def encode_captions(settings: GlyphSettings, pairs: np.ndarray) -> Tensor:
    """Captions as tokens: int64 [n, 2] -> int64 [n, t]."""
    color, shape = torch.from_numpy(pairs).unbind(1)
    padding = torch.full_like(color, padding_id(settings.text_vocab, TEXT_LENGTH - 1))
    return torch.stack([1 + color, 1 + settings.colors + shape, padding], dim=1)


@lru_cache(maxsize=8)
def glyphs(count: int) -> np.ndarray:
    """The first shapes: bool [count, 4, 4], all different, each with a pixel in all four outer
    rows and columns, so that none is another one at another place."""
    rng = np.random.default_rng(GLYPHS_SEED)
    found: dict[bytes, np.ndarray] = {}
    while len(found) < count:
        glyph = rng.random((GLYPH, GLYPH)) < DENSITY
        if all(edge.any() for edge in (glyph[0], glyph[-1], glyph[:, 0], glyph[:, -1])):
            found.setdefault(glyph.tobytes(), glyph)
    patterns = np.stack(list(found.values()))
    patterns.flags.writeable = False
    return patterns


@lru_cache(maxsize=8)
def _places_of(shapes: int) -> dict[bytes, int]:
    """The shape by its pixels in an image, at all places."""
    found = {}
    for shape, glyph in enumerate(glyphs(shapes)):
        for y, x in PLACES:
            image = np.zeros((SIDE, SIDE), bool)
            image[y : y + GLYPH, x : x + GLYPH] = glyph
            found[image.tobytes()] = shape
    return found


def palette(settings: GlyphSettings) -> np.ndarray:
    """RGB of black and of each shade of each color: float32 [1 + colors x shades, 3]."""
    rows = [(0.0, 0.0, 0.0)]
    for color in range(settings.colors):
        for shade in range(settings.shades):
            value = 1 - 0.5 * shade / settings.shades
            rows.append(
                colorsys.hsv_to_rgb(color / settings.colors, 1.0 - 0.4 * (color % 2), value)
            )
    return np.array(rows, np.float32)

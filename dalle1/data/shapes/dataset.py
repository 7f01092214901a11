"""The built-in data set: images of one or two colored shapes, captioned in everyday English.

It needs no download and makes any number of samples. Every sample is a pure function of
(seed, split, index), so two machines, or a run and its resumption, see the same images.

Lengths and positions are fractions of the image's side, x to the right and y downwards, so that
one scene can be drawn at any resolution.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from dalle1.data.generated import write_generated
from dalle1.data.shapes.palettes import COLORS, PALETTES

T = TypeVar("T")

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "grey": (150, 150, 150),
    "black": (25, 25, 25),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
# 0.2 is about the most at which two big shapes still fit side by side with a gap between them.
SIZES: dict[str, float] = {"small": 0.145, "big": 0.2}
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
OPPOSITE: dict[str, str] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
SPLITS: tuple[str, ...] = ("train", "test", "heldout")

# Never shown in training: each color and each shape here is learned from other pairs, and the
# "heldout" split asks whether a model can put the two together.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {("yellow", "circle"), ("pink", "square"), ("green", "triangle"), ("purple", "cross")}
)

SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "big": ("big", "large", "huge"),
}
RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left of": ("to the left of", "on the left of", "left of"),
    "right of": ("to the right of", "on the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
OPENINGS: tuple[str, ...] = ("", "", "there is ", "a picture of ")
MAX_WORDS = 24
MIN_SIDE = 16

MARGIN = 0.02  # between a thing and the image's edge
MIN_GAP = 0.07  # between two things: about two pixels at a side of 32
MAX_GAP = 0.25
MAX_OFFSET = 0.125  # between two centers, across the relation's axis
# Centers lie on a lattice of four pixels at a side of 32: edges then fall into few places, which a
# codebook of demo size can draw sharply and a transformer of demo size can learn in minutes.
LATTICE = 8

# Proportions in units of the radius. They give the four shapes about the same area, and a
# bounding box that is centered on (x, y).
CIRCLE_RADIUS = 0.93
SQUARE_HALF_SIDE = 0.83
TRIANGLE_HALF_SIDE = 1.05  # half its base and half its height
CROSS_HALF_LENGTH = 1.05
CROSS_HALF_WIDTH = 0.32
EXTENTS: dict[str, float] = {
    "circle": CIRCLE_RADIUS,
    "square": SQUARE_HALF_SIDE,
    "triangle": TRIANGLE_HALF_SIDE,
    "cross": CROSS_HALF_LENGTH,
}

_RGB = {name: color for palette in PALETTES.values() for name, color in palette.items()}
_ALL_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
_SEEN_PAIRS = tuple(pair for pair in _ALL_PAIRS if pair not in HELD_OUT)
_HELD_OUT_PAIRS = tuple(pair for pair in _ALL_PAIRS if pair in HELD_OUT)


@dataclass(frozen=True)
class Thing:
    """One colored shape; `x`, `y` (of its bounding box's center) and `radius` are fractions of
    the side. It reaches `EXTENTS[shape] * radius` from its center along both axes."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def extent(self) -> float:
        """Half the side of the bounding box, as a fraction of the image's side."""
        return EXTENTS[self.shape] * self.radius


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; `relation` is that of the first thing to the second
    ("left of": the first is left of the second), and None where there is only one."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str


@dataclass(frozen=True, eq=False)
class ShapesSample:
    """An image (uint8 [side, side, 3]), its caption, the scene both come from, and a key that is
    unique within a data set of one seed."""

    key: str
    image: np.ndarray
    caption: str
    scene: Scene


def make(
    seed: int, index: int, split: str = "train", side: int = 32, palette: str = "plain"
) -> ShapesSample:
    """A sample of a split: always the same one for the same arguments.

    Scene and caption do not depend on `side`, and on `palette` only in the colors and their names.
    "train" and "test" are separate draws without the pairs in `HELD_OUT`; "heldout" shows at least
    one of them in every image.

    Raises:
        ValueError: an unknown split or palette, a negative seed or index, a side below 16.
    """
    _check_split(split)
    _check_side(side)
    _check_palette(palette)
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be 0 or more, not seed={seed} and index={index}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = _in_palette(draw_scene(rng, held_out=split == "heldout"), palette)
    caption = describe(scene, rng)
    return ShapesSample(f"{split}-{index:08d}", render(scene, side), caption, scene)


def draw_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """A random scene: one thing in about 30 % of the draws, else two.

    With `held_out` at least one thing is a pair in `HELD_OUT`; without, none is.
    """
    background = _pick(rng, tuple(BACKGROUNDS))
    first = _pick(rng, _HELD_OUT_PAIRS if held_out else _SEEN_PAIRS)
    if rng.random() < 0.3:
        thing = _sized(rng, first)
        x, y = _between(rng, _reach(thing)), _between(rng, _reach(thing))
        return Scene((_placed(thing, x, y),), None, background)

    others = _ALL_PAIRS if held_out else _SEEN_PAIRS
    second = _pick(rng, tuple(pair for pair in others if pair != first))
    pairs = (first, second) if rng.random() < 0.5 else (second, first)
    things = (_sized(rng, pairs[0]), _sized(rng, pairs[1]))
    relation = _pick(rng, RELATIONS)
    # `near` is the left or upper one of the two.
    swapped = relation in ("right of", "below")
    near, far = things[::-1] if swapped else things

    nearest = math.ceil((near.extent + far.extent + MIN_GAP) * LATTICE)
    farthest = math.floor((near.extent + far.extent + MAX_GAP) * LATTICE)
    first_line, last_line = _reach(near)[0], _reach(far)[1]
    distance = int(rng.integers(nearest, min(farthest, last_line - first_line) + 1))
    along_near = int(rng.integers(first_line, last_line - distance + 1))
    along_far = along_near + distance

    # The wider one first: where it fits, the other does.
    most = math.floor(MAX_OFFSET * LATTICE)
    wide, slim = (near, far) if near.extent >= far.extent else (far, near)
    across_wide = _between(rng, _reach(wide))
    low, high = _reach(slim)
    across_slim = _between(rng, (max(low, across_wide - most), min(high, across_wide + most)))
    across_near, across_far = (
        (across_wide, across_slim) if wide is near else (across_slim, across_wide)
    )

    if relation in ("left of", "right of"):
        near, far = _placed(near, along_near, across_near), _placed(far, along_far, across_far)
    else:
        near, far = _placed(near, across_near, along_near), _placed(far, across_far, along_far)
    return Scene((far, near) if swapped else (near, far), relation, background)


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption of the scene, at most 24 words.

    The choice of words, of which thing comes first, and of what is left unsaid (a size in about a
    quarter of the things, the background in about four fifths of the captions) is drawn from
    `rng`. Colors, shapes, number and relation are always said.
    """
    order = list(scene.things)
    relation = scene.relation
    if relation is not None and rng.random() < 0.5:
        order.reverse()
        relation = OPPOSITE[relation]
    names = [_name(thing, rng) for thing in order]

    if relation is None:
        words = _pick(rng, OPENINGS) + _with_article(names[0])
    else:
        phrase = _pick(rng, RELATION_PHRASES[relation])
        if rng.random() < 0.25:
            words = f"the {names[0]} is {phrase} the {names[1]}"
        else:
            opening = _pick(rng, OPENINGS)
            words = f"{opening}{_with_article(names[0])} {phrase} {_with_article(names[1])}"
    if rng.random() < 0.2:
        words += f" on a {scene.background} background"
    style = rng.random()
    if style < 0.15:
        words = words[0].upper() + words[1:] + ("." if style < 0.08 else "")
    return words


def render(scene: Scene, side: int = 32) -> np.ndarray:
    """The scene as uint8 [side, side, 3], anti-aliased. Raises ValueError for a side below 16."""
    _check_side(side)
    across, down = grid(side)
    image = np.empty((side, side, 3), dtype=np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        opacity = coverage(thing.shape, across - thing.x, down - thing.y, thing.radius, 1 / side)
        image += opacity[..., None] * (np.array(_RGB[thing.color], np.float32) - image)
    return (image + 0.5).astype(np.uint8)


@lru_cache(maxsize=16)
def grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels' centers as fractions of the side: x [1, side] and y [side, 1], read-only."""
    centers = ((np.arange(side) + 0.5) / side).astype(np.float32)
    centers.flags.writeable = False
    return centers[None, :], centers[:, None]


def coverage(
    shape: str,
    dx: np.ndarray,
    dy: np.ndarray,
    radius: float | np.ndarray,
    pixel: float | np.ndarray,
) -> np.ndarray:
    """How much of each pixel a shape covers, 0 to 1.

    Args:
        shape: one of SHAPES.
        dx: the pixels' centers relative to the shape's, to the right.
        dy: the same, downwards.
        radius: the shape's.
        pixel: a pixel's width; more gives a softer edge. All four are in one unit, and broadcast
            together.

    Raises:
        ValueError: an unknown shape.
    """
    cover: np.ndarray
    if shape == "circle":
        cover = _ramp(np.sqrt(dx * dx + dy * dy) - CIRCLE_RADIUS * radius, pixel)
    elif shape == "square":
        half = SQUARE_HALF_SIDE * radius
        cover = _ramp(np.abs(dx) - half, pixel) * _ramp(np.abs(dy) - half, pixel)
    elif shape == "triangle":
        # Across a slanted edge a square pixel is wider than its side.
        half = TRIANGLE_HALF_SIDE * radius
        inset = (dy + half) / 2
        left, right = _ramp(-dx - inset, 1.5 * pixel), _ramp(dx - inset, 1.5 * pixel)
        cover = np.maximum(left + right - 1, 0) * _ramp(dy - half, pixel)
    elif shape == "cross":
        length, width = CROSS_HALF_LENGTH * radius, CROSS_HALF_WIDTH * radius
        ax, ay = np.abs(dx), np.abs(dy)
        long_x, long_y = _ramp(ax - length, pixel), _ramp(ay - length, pixel)
        short_x, short_y = _ramp(ax - width, pixel), _ramp(ay - width, pixel)
        # Two bars, less the middle that both cover.
        cover = long_x * short_y + short_x * (long_y - short_y)
    else:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, not {shape!r}")
    return cover


def write_shards(
    folder: str | os.PathLike[str],
    split: str,
    count: int,
    seed: int = 0,
    side: int = 32,
    samples_per_shard: int = 1000,
    palette: str = "plain",
) -> list[Path]:
    """Writes samples 0 … count - 1 of a split as WebDataset shards and returns their paths.

    See `generated.write_generated`.

    Raises:
        ValueError: an unknown split or palette, a side below 16, or as `write_generated`.
    """
    _check_split(split)
    _check_side(side)
    _check_palette(palette)
    return write_generated(
        lambda index: make(seed, index, split, side, palette),
        folder,
        split,
        count,
        seed,
        samples_per_shard,
    )


def _ramp(distance: np.ndarray, pixel: float | np.ndarray) -> np.ndarray:
    """Coverage of a pixel whose center lies `distance` outside a straight edge."""
    share: np.ndarray = np.minimum(np.maximum(0.5 - distance / pixel, 0), 1)
    return share


def _sized(rng: np.random.Generator, pair: tuple[str, str]) -> Thing:
    size = _pick(rng, tuple(SIZES))
    return Thing(pair[0], pair[1], size, 0.5, 0.5, SIZES[size])


def _reach(thing: Thing) -> tuple[int, int]:
    """First and last lattice line on which the thing's center keeps it inside the image."""
    first = math.ceil((MARGIN + thing.extent) * LATTICE)
    return first, LATTICE - first


def _between(rng: np.random.Generator, reach: tuple[int, int]) -> int:
    return int(rng.integers(reach[0], reach[1] + 1))


def _placed(thing: Thing, x: int, y: int) -> Thing:
    return replace(thing, x=x / LATTICE, y=y / LATTICE)


def _name(thing: Thing, rng: np.random.Generator) -> str:
    size = "" if rng.random() < 0.25 else _pick(rng, SIZE_WORDS[thing.size]) + " "
    return f"{size}{thing.color} {thing.shape}"


def _with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")


def _in_palette(scene: Scene, palette: str) -> Scene:
    """The scene with each color changed for the one at its place in the palette."""
    names = dict(zip(COLORS, PALETTES[palette], strict=True))
    return replace(scene, things=tuple(replace(t, color=names[t.color]) for t in scene.things))


def _check_palette(palette: str) -> None:
    if palette not in PALETTES:
        raise ValueError(f"palette must be one of {', '.join(PALETTES)}, not {palette!r}")


def _check_side(side: int) -> None:
    if side < MIN_SIDE:
        raise ValueError(f"side must be {MIN_SIDE} pixels or more, not {side}")

"""Reads images of colored shapes: which things are there, and on which background.

Knows nothing of captions; `dalle1.data.shapes.checker` compares the two. Shapes are found by
analysis-by-synthesis: each of the four is fitted to the image with the renderer's own coverage,
and the one that explains it best is what is there, if it explains it well enough and alone.

Legend: h, w are an image's rows and columns; n is the evaluations of one fitting step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from dalle1.data.shapes.dataset import (
    BACKGROUNDS,
    EXTENTS,
    MIN_SIDE,
    SHAPES,
    SIZES,
    coverage,
)
from dalle1.data.shapes.palettes import COLORS

# Images of 1.5 times this side or more are reduced to it: nothing is lost that a shape needs.
WORKING_SIDE = 32

# RGB distances. Palette colors are at least 107 apart from each other and from backgrounds.
FOREGROUND_DISTANCE = 45.0  # below it a pixel is background, above it may be part of a thing
COLOR_TOLERANCE = 70.0  # further from every palette color than this: no color that has a name
BACKGROUND_TOLERANCE = 60.0
# Marks of up to this many pixels at a side of 32 (a sixth of the smallest shape) are overlooked;
# anything larger is one more thing.
SPECK_AREA = 5 / 32**2
# A shape is recognized if what its best fit leaves unexplained is at most this share of the
# shape's own energy (after taking off the noise that the background shows too), if no other shape
# comes near that, and if no 3x3 pixels depart from it by more than this share of its contrast:
# a hole or a dent in a big shape is little of its energy.
UNEXPLAINED = 0.1
RUNNER_UP = 0.85  # at most this share of what the second best shape leaves unexplained
LOCAL_FAULT = 0.4
NOISE_CAP = 10.0  # levels a channel; noise beyond it is not excused
SIZE_TOLERANCE = 1.25  # how far a radius may be from a size's, as a factor
EDGE_TOLERANCE = 0.05  # how far a shape may reach out of the image, as a fraction of the side

_AREAS = {"circle": 2.717, "square": 2.756, "triangle": 2.205, "cross": 2.462}  # / radius²
_FIT_STEPS = 3
_REACH = 3  # pixels around a thing that still count in its fit
_NUDGE = 0.25
_NUDGES = np.vstack([np.zeros(4), _NUDGE * np.eye(4)]).astype(np.float32)
_DIAGONAL = np.arange(5), np.arange(5)


@dataclass(frozen=True)
class DetectedThing:
    """A thing found in an image. `color`, `shape` or `size` is None where it is none that has
    a name; `x`, `y` and `radius` are fractions of the side; `unexplained` is the share of its
    energy that the best shape leaves over."""

    color: str | None
    shape: str | None
    size: str | None
    x: float
    y: float
    radius: float
    unexplained: float

    def __str__(self) -> str:
        """In words, such as "small red circle" or "big odd-colored unclear shape"."""
        size = self.size or "odd-sized"
        return f"{size} {self.color or 'odd-colored'} {self.shape or 'unclear shape'}"


@dataclass(frozen=True)
class Detection:
    """What an image shows: its things, largest first, and the background's name or None."""

    things: tuple[DetectedThing, ...]
    background: str | None


def detect(image: Image.Image | np.ndarray) -> Detection:
    """What a square image shows.

    Args:
        image: a PIL image, or an array [side, side, 3] of uint8 or of floats in [0, 1]; side >= 16.

    Raises:
        ValueError: another shape, type or range.
    """
    pixels = _pixels(image)  # [h, w, 3], 0 to 255
    side = len(pixels)
    ring = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    background = np.median(ring, axis=0)
    light = pixels - background  # [h, w, 3]
    energy = np.einsum("hwc,hwc->hw", light, light)

    # A pixel half as far from the background as the brightest near it belongs to the gap between
    # two things, however blurred the gap is.
    mask = energy > np.maximum(FOREGROUND_DISTANCE**2, 0.25 * _local_maximum(energy))
    labels, areas = _components(mask)
    large = [label for label, area in areas.items() if area > SPECK_AREA * side**2]
    large.sort(key=lambda label: -areas[label])

    territory = _grow(np.where(np.isin(labels, large), labels, 0))
    outside = energy[(territory == 0) & ~mask]
    noise = min(float(outside.mean()) if outside.size else 0.0, 3 * NOISE_CAP**2)
    things = [
        _recognize(_crop(light, energy, territory, labels == label, label, noise), background, side)
        for label in large
    ]
    return Detection(tuple(things), _nearest(background, BACKGROUNDS, BACKGROUND_TOLERANCE))


@dataclass(frozen=True)
class _Crop:
    """One component and the pixels around it, h x w of them."""

    light: np.ndarray  # [h, w, 3]: the image less its background; 0 where another thing is nearer
    weight: np.ndarray  # [h, w]: 0 where another thing is nearer, else 1
    target: np.ndarray  # [h, w]: light along the component's mean color
    x: np.ndarray  # [1, w]: the pixels' centers
    y: np.ndarray  # [h, 1]
    energy: float  # of the light, less the noise
    area: float  # pixels of the component
    middle: float  # x of its center
    bottom: float  # y of its lower edge


@dataclass(frozen=True)
class _Fit:
    """A shape as it explains a crop best."""

    shape: str
    values: np.ndarray  # center x, center y, radius, edge width in pixels
    cover: np.ndarray  # [h, w]: weighted coverage
    tint: np.ndarray  # [3]: the best color, less the background
    unexplained: float  # energy that is left over, as a share of what is explained


def _crop(
    light: np.ndarray,
    energy: np.ndarray,
    territory: np.ndarray,
    core: np.ndarray,
    label: int,
    noise: float,
) -> _Crop:
    """The surroundings of one component.

    `light` [h, w, 3] is the image less its background, `energy` its square, `territory` says which
    thing a pixel is nearest to (0: none), `core` [h, w] the component, `noise` the energy of a
    background pixel.
    """
    side = len(light)
    rows, columns = np.flatnonzero(core.any(1)), np.flatnonzero(core.any(0))
    top, bottom = max(rows[0] - _REACH, 0), min(rows[-1] + 1 + _REACH, side)
    left, right = max(columns[0] - _REACH, 0), min(columns[-1] + 1 + _REACH, side)
    part = (slice(top, bottom), slice(left, right))
    own = (territory[part] == label) | (territory[part] == 0)
    weight = own.astype(np.float32)
    inside = light[core].mean(0)
    return _Crop(
        light=light[part] * weight[..., None],
        weight=weight,
        target=light[part] @ (inside / np.linalg.norm(inside)) * weight,
        x=np.arange(left, right, dtype=np.float32)[None, :] + 0.5,
        y=np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5,
        energy=float((energy[part] * weight).sum()) - noise * float(weight.sum()),
        area=float(core.sum()),
        middle=(columns[0] + columns[-1] + 1) / 2,
        bottom=rows[-1] + 1,
    )


def _recognize(crop: _Crop, background: np.ndarray, side: int) -> DetectedThing:
    """The color, shape and size of one component of an image of that side."""
    fits = sorted((_fit_shape(shape, crop) for shape in SHAPES), key=lambda fit: fit.unexplained)
    best = fits[0]
    across, down, radius = (float(value) / side for value in best.values[:3])
    reach = EXTENTS[best.shape] * radius - EDGE_TOLERANCE
    inside = reach <= min(across, down) and max(across, down) <= 1 - reach
    size = min(SIZES, key=lambda size: abs(np.log(max(radius, 1e-6) / SIZES[size])))
    plain = 1 / SIZE_TOLERANCE <= radius / SIZES[size] <= SIZE_TOLERANCE
    return DetectedThing(
        color=_nearest(background + best.tint, COLORS, COLOR_TOLERANCE),
        shape=best.shape if inside and _is_clear(best, fits[1], crop) else None,
        size=size if plain else None,
        x=across,
        y=down,
        radius=radius,
        unexplained=best.unexplained,
    )


def _fit_shape(shape: str, crop: _Crop) -> _Fit:
    # Measured from below, since a blurred triangle has lost its tip.
    radius = np.sqrt(crop.area / _AREAS[shape])
    center = crop.bottom - EXTENTS[shape] * radius
    start = np.array([crop.middle, center, radius, 1.8], np.float32)
    values, cover = _fit(shape, start, crop.target, crop.weight, crop.x, crop.y)
    energy = float(cover.ravel() @ cover.ravel()) + 1e-6
    tint = cover.ravel() @ crop.light.reshape(-1, 3) / energy
    explained = energy * float(tint @ tint) + 1e-6
    return _Fit(shape, values, cover, tint, max(crop.energy - explained, 0.0) / explained)


def _is_clear(best: _Fit, second: _Fit, crop: _Crop) -> bool:
    """Whether the best shape explains a crop well enough, alone, and in each of its parts."""
    faults = crop.light - best.cover[..., None] * best.tint
    return (
        best.unexplained <= UNEXPLAINED
        and best.unexplained <= RUNNER_UP * second.unexplained
        and _largest_mean(faults) <= LOCAL_FAULT * float(np.linalg.norm(best.tint))
    )


def _fit(
    shape: str,
    start: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Fits center x, center y, radius and edge width (pixels) of a shape to `target` [h, w] by
    Gauss-Newton steps with a free brightness; returns them with the weighted coverage [h, w]."""
    lowest = np.array([start[0] - 2, start[1] - 2, 0.75 * start[2], 0.9], np.float32)
    highest = np.array([start[0] + 2, start[1] + 2, 1.3 * start[2], 3.0], np.float32)
    values = start
    goal = target.ravel()
    for _ in range(_FIT_STEPS):
        trial = values + _NUDGES  # [n, 4]: the values themselves, then each one nudged
        covers = (_covers(shape, trial, x, y) * weight).reshape(len(trial), -1)
        base = covers[0]
        brightness = float(base @ goal) / (float(base @ base) + 1e-6)
        slopes = covers.copy()  # of the model by brightness, then by each value
        slopes[1:] = (covers[1:] - base) * (brightness / _NUDGE)
        normal = slopes @ slopes.T
        normal[_DIAGONAL] *= 1.01
        normal[_DIAGONAL] += 1e-3
        step = np.linalg.solve(normal, slopes @ (goal - brightness * base))[1:]
        values = np.minimum(np.maximum(values + np.clip(step, -1.5, 1.5), lowest), highest)
    return values, _covers(shape, values[None], x, y)[0] * weight


def _covers(shape: str, values: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Coverage [n, h, w] for rows of center x, center y, radius, edge width."""
    center_x, center_y, radius, edge = values.T[:, :, None, None]
    return coverage(shape, x - center_x, y - center_y, radius, edge)


def _components(mask: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
    """4-connected components: labels [h, w] from 1 (0: none), and each label's pixel count."""
    height, width = mask.shape
    padded = np.zeros((height, width + 1), dtype=bool)
    padded[:, :-1] = mask
    flat = np.concatenate([[False], padded.ravel()])
    edges = np.flatnonzero(flat[1:] != flat[:-1]).tolist()
    runs = list(zip(edges[::2], edges[1::2], strict=True))  # each within one row

    parent = list(range(len(runs)))

    def root(run: int) -> int:
        while parent[run] != run:
            run = parent[run]
        return run

    above = 0
    for run, (first, last) in enumerate(runs):
        # Both lists are in reading order, so the runs above move on only.
        while runs[above][1] <= first - (width + 1):
            above += 1
        other = above
        while other < run and runs[other][0] < last - (width + 1):
            parent[root(other)] = root(run)
            other += 1

    labels = np.zeros(height * (width + 1), dtype=np.int32)
    areas: dict[int, int] = {}
    for run, (first, last) in enumerate(runs):
        label = root(run) + 1
        labels[first:last] = label
        areas[label] = areas.get(label, 0) + last - first
    return labels.reshape(height, width + 1)[:, :-1], areas


def _grow(labels: np.ndarray) -> np.ndarray:
    """Labels spread over unlabeled pixels up to `_REACH` steps away, the nearest label first."""
    if labels.min() == labels.max():
        return labels
    grown = np.zeros((labels.shape[0] + 2, labels.shape[1] + 2), labels.dtype)
    inner = grown[1:-1, 1:-1]
    inner[:] = labels
    for _ in range(_REACH):
        across = np.maximum(grown[1:-1, :-2], grown[1:-1, 2:])
        near = np.maximum(np.maximum(grown[:-2, 1:-1], grown[2:, 1:-1]), across)
        np.copyto(inner, near, where=inner == 0)
    return inner


def _local_maximum(values: np.ndarray) -> np.ndarray:
    """The maximum over the 5x5 pixels around each pixel of `values` [h, w], none negative."""
    height, width = values.shape
    padded = np.zeros((height + 4, width + 4), values.dtype)
    padded[2:-2, 2:-2] = values
    tall = padded[:height]
    for shift in range(1, 5):
        tall = np.maximum(tall, padded[shift : shift + height])
    wide = tall[:, :width]
    for shift in range(1, 5):
        wide = np.maximum(wide, tall[:, shift : shift + width])
    return wide


def _largest_mean(vectors: np.ndarray) -> float:
    """The greatest length of a mean of 3x3 neighboring `vectors` [h, w, 3]; h and w exceed 3."""
    tall = vectors[:-2] + vectors[1:-1] + vectors[2:]
    sums = tall[:, :-2] + tall[:, 1:-1] + tall[:, 2:]
    return float(np.sqrt(np.einsum("hwc,hwc->hw", sums, sums).max())) / 9


def _nearest(
    color: np.ndarray, palette: dict[str, tuple[int, int, int]], tolerance: float
) -> str | None:
    distances = np.linalg.norm(np.array(list(palette.values())) - color, axis=1)
    best = int(distances.argmin())
    return list(palette)[best] if distances[best] <= tolerance else None


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """The image as float32 [h, w, 3] from 0 to 255, large ones reduced to the working side."""
    pixels: np.ndarray = np.asarray(
        image.convert("RGB") if isinstance(image, Image.Image) else image
    )
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[0] != pixels.shape[1]:
        raise ValueError(f"image must be [side, side, 3], not {list(pixels.shape)}")
    side = len(pixels)
    if side < MIN_SIDE:
        raise ValueError(f"image must have a side of {MIN_SIDE} pixels or more, not {side}")
    if np.issubdtype(pixels.dtype, np.floating):
        # The tolerance is for a decoder's rounding; an image in 0 … 255 must not pass as white.
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= -0.01 and high <= 1.01):
            raise ValueError(f"float images must lie in [0, 1], not [{low:.3g}, {high:.3g}]")
        pixels = pixels.astype(np.float32) * 255
    elif pixels.dtype != np.uint8:
        raise ValueError(f"image must be uint8 or float, not {pixels.dtype}")
    if side >= 1.5 * WORKING_SIDE:
        full = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
        pixels = np.asarray(full.resize((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX))
    return pixels.astype(np.float32)

"""The sparse attention patterns, each defined once, and how they are run.

Paper section 2.2 and appendix B.1, figure 11. A pattern is a predicate (query, key) -> allowed;
the dense execution makes a boolean mask of it, the cached execution an index set for each step.
ruDALL-E has two convolutions of its own (docs/published.md).

Dimensions: b batch, n stream positions, t text positions, s heads, d head size, w grid side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle1.transformer.sequence import PATTERNS, Pattern
from dvae.calls import isolated

CONV_KERNEL = 11  # appendix B.1


def image_allowed(pattern: Pattern, q: Tensor, k: Tensor, grid: int, kernel: int) -> Tensor:
    """Whether image query q may read image key k; raster indices, broadcast against each other."""
    distance = q - k
    if pattern == "row":
        return (distance >= 0) & (distance <= grid)
    if pattern == "column":
        return (distance >= 0) & (distance % grid == 0)
    if pattern == "conv":
        # distance = grid * a + b for some 0 <= a <= h, |b| <= h; with wraparound, so b may cross
        # the image's edge. If any a fits, the one of the least |b| does.
        h = kernel // 2
        a = ((distance + grid // 2) // grid).clamp(0, h)  # the nearest row
        return ((distance - grid * a).abs() <= h) & (distance >= 0)
    if pattern == "full":
        return distance >= 0
    if pattern in ("conv_2d", "conv_torus"):
        # Rows and columns of the grid apart: a window of kernel x kernel, which ends at the
        # image's edges or, on the torus, goes on at the opposite ones.
        rows, columns = (q // grid - k // grid).abs(), (q % grid - k % grid).abs()
        if pattern == "conv_torus":
            rows, columns = (torch.minimum(d, grid - d) for d in (rows, columns))
        return (rows <= kernel // 2) & (columns <= kernel // 2) & (distance >= 0)
    raise ValueError(f"pattern: expected one of {', '.join(PATTERNS)}, got {pattern!r}")


def sequence_allowed(
    pattern: Pattern, q: Tensor, k: Tensor, text_length: int, grid: int, kernel: int
) -> Tensor:
    """Whether stream position q may read position k: text reads text causally, an image position
    all of the text and the image positions that the pattern allows; broadcast."""
    image = image_allowed(pattern, q - text_length, k - text_length, grid, kernel)
    return torch.where(k < text_length, k <= q, (q >= text_length) & image)


def allowed(
    pattern: Pattern, text_length: int = 256, grid: int = 32, kernel: int = CONV_KERNEL
) -> Tensor:
    """The mask of a pattern, bool [n, n] with n = text_length + grid^2; [query, key].

    Text reads text causally, an image position reads all of the text (padding included) and the
    image positions that the pattern allows. Raises ValueError for an unknown pattern.
    """
    if text_length < 1 or grid < 1:
        raise ValueError(f"text_length and grid must be positive, got {text_length} and {grid}")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel: expected an odd number, got {kernel}")
    position = torch.arange(text_length + grid * grid)
    return sequence_allowed(
        pattern, position[:, None], position[None, :], text_length, grid, kernel
    )


@lru_cache(maxsize=32)
@isolated()
def step_keys(pattern: Pattern, grid: int, kernel: int) -> tuple[Tensor, ...]:
    """For each image position, the raster indices of the image keys that it reads, ascending."""
    position = torch.arange(grid * grid)
    mask = image_allowed(pattern, position[:, None], position[None, :], grid, kernel)
    return tuple(row.nonzero()[:, 0] for row in mask)


def cache_length(pattern: Pattern, grid: int, kernel: int = CONV_KERNEL) -> int:
    """How many image positions a decoder has to hold for a layer, the newest included.

    Row layers and convolutions look back a fixed distance, so a ring of that length does; column
    and full layers look back to the first row, as does a convolution on the torus from the last.
    """
    h = kernel // 2
    around = grid * grid if h else 0
    reach = {"row": grid, "conv": h * (grid + 1), "conv_2d": h * (grid + 1), "conv_torus": around}
    return min(grid * grid, reach.get(pattern, grid * grid) + 1)


@dataclass(frozen=True)
class Slots:
    """Where a decoder keeps a layer's image positions, and which of them each step reads.

    Row layers and convolutions keep a ring, position p over the oldest; the others the whole grid,
    column layers column by column, so that what a step reads lies side by side.
    """

    length: int
    place: Tensor  # int64 [grid^2]: the slot of position p
    reads: tuple[slice | Tensor, ...]
    """The slots that image position p may read, its own included; a slice where they are evenly
    spaced, which needs no copy, else int64 indices. Their order is the slots'."""

    def table(self) -> tuple[Tensor, Tensor]:
        """The reads with one shape for all positions, for steps that are recorded once:
        slots, int64 [grid^2, m], and which of them count, bool [grid^2, m]."""
        every = torch.arange(self.length)
        rows = [every[read] if isinstance(read, slice) else read for read in self.reads]
        most = max(map(len, rows))
        if most == self.length:  # the whole ring, in order: nothing to gather
            slots = every.expand(len(rows), -1)
            return slots, torch.stack([torch.isin(every, row) for row in rows])
        slots = torch.stack([F.pad(row, (0, most - len(row))) for row in rows])
        return slots, torch.stack([torch.arange(most) < len(row) for row in rows])


@lru_cache(maxsize=32)
@isolated()
def slots(pattern: Pattern, grid: int, kernel: int = CONV_KERNEL) -> Slots:
    """The slots of a pattern, as many as `cache_length` says and no more."""
    length = cache_length(pattern, grid, kernel)
    position = torch.arange(grid * grid)
    place = position % length
    if pattern == "column":
        place = position % grid * grid + position // grid
    reads: list[slice | Tensor] = []
    for keys in step_keys(pattern, grid, kernel):
        held = place[keys].sort().values
        first, last = int(held[0]), int(held[-1])
        stride = int(held[1]) - first if len(held) > 1 else 1
        even = torch.equal(held, torch.arange(first, last + 1, stride))
        reads.append(slice(first, last + 1, stride) if even else held)
    return Slots(length, place, tuple(reads))

"""The sparse attention patterns, each defined once, and how they are run.

Paper section 2.2 and appendix B.1, figure 11. A pattern is a predicate (query, key) -> allowed;
the dense execution makes a boolean mask of it, the cached execution an index set for each step.

Dimensions: b batch, n stream positions, t text positions, s heads, d head size, w grid side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle1.layout import PATTERNS, Pattern

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
        # the picture's edge. If any a fits, the one of the least |b| does.
        h = kernel // 2
        a = ((distance + grid // 2) // grid).clamp(0, h)  # the nearest row
        return ((distance - grid * a).abs() <= h) & (distance >= 0)
    if pattern == "full":
        return distance >= 0
    raise ValueError(f"pattern: expected one of {', '.join(PATTERNS)}, got {pattern!r}")


def stream_allowed(
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
    return stream_allowed(pattern, position[:, None], position[None, :], text_length, grid, kernel)


@lru_cache(maxsize=32)
def _mask(pattern: Pattern, text_length: int, grid: int, kernel: int, device: str) -> Tensor:
    return allowed(pattern, text_length, grid, kernel).to(device)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, text_length: int, grid: int, kernel: int
) -> Tensor:
    """One softmax over all allowed keys, by a boolean mask: q, k, v [b, s, n, d] -> [b, s, n, d].

    n may stop short of the whole stream; the mask is cut to it.
    """
    n = q.shape[2]
    mask = _mask(pattern, text_length, grid, kernel, str(q.device))[:n, :n]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@lru_cache(maxsize=32)
def step_keys(pattern: Pattern, grid: int, kernel: int) -> tuple[Tensor, ...]:
    """For each image position, the raster indices of the image keys that it reads, ascending."""
    position = torch.arange(grid * grid)
    mask = image_allowed(pattern, position[:, None], position[None, :], grid, kernel)
    return tuple(row.nonzero()[:, 0] for row in mask)


def cache_length(pattern: Pattern, grid: int, kernel: int = CONV_KERNEL) -> int:
    """How many image positions a decoder has to hold for a layer, the newest included.

    Row and conv layers look back a fixed distance, so a ring of that length does; column and full
    layers look back to the first row.
    """
    reach = {"row": grid, "conv": (kernel // 2) * (grid + 1)}
    return min(grid * grid, reach.get(pattern, grid * grid) + 1)


@dataclass(frozen=True)
class Ring:
    """How a decoder holds a layer's image keys: position p in slot p % length, over the oldest.

    reads[p]: the slots of the keys that image position p may read, its own included; a slice where
    they are evenly spaced, which needs no copy, else int64 indices. Their order is the slots'.
    """

    length: int
    reads: tuple[slice | Tensor, ...]


@lru_cache(maxsize=32)
def ring(pattern: Pattern, grid: int, kernel: int = CONV_KERNEL) -> Ring:
    """The ring of a pattern, as long as `cache_length` says and no longer."""
    length = cache_length(pattern, grid, kernel)
    reads: list[slice | Tensor] = []
    for keys in step_keys(pattern, grid, kernel):
        slots = (keys % length).sort().values
        first, last = int(slots[0]), int(slots[-1])
        stride = int(slots[1]) - first if len(slots) > 1 else 1
        even = torch.equal(slots, torch.arange(first, last + 1, stride))
        reads.append(slice(first, last + 1, stride) if even else slots)
    return Ring(length, tuple(reads))


def cached_attention(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor
) -> Tensor:
    """Attention of one new image position of each candidate: q [b, s, d] -> [b, s, d].

    text_k, text_v [s, t, d] are one caption's, shared by the b candidates, so that the scores
    against the text are one matrix product; image_k, image_v [b, s, m, d] are the m keys that
    the pattern allows at this step.
    """
    scale = q.shape[-1] ** -0.5
    t = text_k.shape[1]
    heads_first = q.transpose(0, 1) * scale  # [s, b, d]
    on_text = torch.matmul(heads_first, text_k.transpose(1, 2)).transpose(0, 1)  # [b, s, t]
    on_image = torch.matmul(image_k, (q * scale)[..., None])[..., 0]  # [b, s, m]
    weights = torch.cat([on_text, on_image], dim=-1).float().softmax(dim=-1).to(q.dtype)
    from_text = torch.matmul(weights[..., :t].transpose(0, 1), text_v).transpose(0, 1)
    from_image = torch.matmul(weights[..., None, t:], image_v)[..., 0, :]
    return from_text + from_image

"""Gradients of several parts, each clipped by its own norm.

DeepSpeed clips all gradients of a run by one norm. Two nets that are trained against one another
would then shorten each other's steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

SOFTENING = 1e-6  # added to a norm that is divided by, as torch and DeepSpeed do


@torch.no_grad()
def clip_by_part(
    parts: Mapping[str, Sequence[Tensor]],
    limit: float | None,
    total: Callable[[Tensor], Tensor] = lambda values: values,
) -> dict[str, float]:
    """Shortens the gradients of each part, in place, to the largest norm; its norm before.

    Args:
        parts: gradients, or this rank's shards of them, by the part's name; the same names on all
            ranks.
        limit: the largest norm; None for none.
        total: sums numbers over the ranks that hold shards of the same gradients.
    """
    squares = torch.stack(
        [torch.stack([g.float().square().sum() for g in part]).sum() for part in parts.values()]
    )
    norms = dict(zip(parts, total(squares).sqrt().tolist(), strict=True))
    for name, part in parts.items():
        if limit is not None and norms[name] > limit:
            for gradient in part:
                gradient.mul_(limit / (norms[name] + SOFTENING))
    return norms

"""What ranks agree on beside their gradients: flags, means, features, meetings.

Only torch.distributed; all of it is a no-op for a group of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

LONG = timedelta(days=30)  # that one rank may be behind another outside of training


def rank() -> int:
    """Number of this process among all; 0 where none were started."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes there are; 1 where none were started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """Where tensors must lie to be sent: this rank's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def barrier() -> None:
    """Waits for all ranks, as long as the groups' time-out allows."""
    if ranks() > 1:
        dist.barrier()


def meeting(timeout: timedelta = LONG) -> Callable[[], None]:
    """Made by all ranks together; a call waits until every rank has called, however long its work
    takes (at most `timeout`), and a rank may leave right after."""
    if dist.get_world_size() == 1:
        return lambda: None
    group = dist.new_group(backend="gloo", timeout=timeout)
    # The first rank hears from each and answers; an ordinary barrier breaks when one leaves early.
    return lambda: dist.monitored_barrier(group, timeout=timeout)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank; the same answer on all."""
    return largest_over_ranks([float(flag)])[0] > 0


def largest_over_ranks(values: Iterable[float]) -> list[float]:
    """Each value's largest over the ranks, which all give as many."""
    values = list(values)
    if ranks() == 1 or not values:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [float(x) for x in tensor.tolist()]


def mean_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Each value averaged over the ranks, which all give the same names."""
    if ranks() == 1 or not values:
        return dict(values)
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=device())
    dist.all_reduce(tensor)
    return dict(zip(values, (tensor / ranks()).tolist(), strict=True))


def from_rank(value: Tensor, source: int) -> Tensor:
    """A CPU tensor as `source` has it, on the CPU of every rank; shapes and types agree."""
    if ranks() == 1:
        return value
    moved = value.to(device()).contiguous()
    dist.broadcast(moved, source)
    return moved.cpu()


class _Gather(torch.autograd.Function):
    """Rows of all ranks; on the way back each rank's rows get what all ranks ask of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(ranks())]
        dist.all_gather(parts, x.contiguous())
        return rearrange(parts, "ranks b e -> (ranks b) e")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return rearrange(gradient, "(ranks b) e -> ranks b e", ranks=ranks())[rank()]


def gathered(x: Tensor) -> Tensor:
    """Rows [b, e] of this rank -> those of all ranks, [ranks * b, e], in order; differentiable.

    Every rank gives as many rows, and every rank's loss may depend on all of them.
    """
    if ranks() == 1:
        return x
    rows: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return rows

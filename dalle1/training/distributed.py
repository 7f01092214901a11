"""What ranks tell one another beside gradients: flags, means, tensors, that a long task is done.

Only torch.distributed. Each function is a no-op in a run of one process.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from dalle1.training.launcher import Launch
from dalle1.training.signals import RanksLost, means_lost_rank

LONG = timedelta(days=30)  # that one rank may be behind another outside of training


def rank() -> int:
    """Number of this process among all; 0 where none were started."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are; 1 where none were started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """Where tensors must lie to be sent: this rank's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def free_port() -> int:
    """A TCP port that nothing listens on at the moment.

    It lies below the ports that the system gives to connections by itself: one of these could be
    taken before it is used.
    """
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", 10_000 + secrets.randbelow(20_000)))
            port: int = probe.getsockname()[1]
            return port


def use_gpu(launch: Launch) -> None:
    """Makes this rank's GPU, where there are any, the one that tensors go to by default.

    Raises ValueError where the machine has more ranks than GPUs.
    """
    if not torch.cuda.is_available():
        return
    count = torch.cuda.device_count()
    if launch.local_rank >= count:
        raise ValueError(
            f"LOCAL_RANK: expected a number below the {count} GPUs that torch finds here, got "
            f"{launch.local_rank}; start as many ranks on a machine as it has GPUs, each of which "
            "sees all of them"
        )
    torch.cuda.set_device(launch.local_rank)


def meet(launch: Launch, timeout: float) -> Store:
    """The store through which the ranks of a run find one another.

    A rank alone meets nobody and needs no port, so that such runs never collide.

    Args:
        launch: the place of this rank.
        timeout: seconds until all ranks must have come.

    Raises:
        RanksLost: not all ranks have come in time.
    """
    if launch.world_size == 1:
        return HashStore()
    address = f"MASTER_ADDR:MASTER_PORT = {launch.address}"
    try:
        found = dist.rendezvous(  # type: ignore[attr-defined]
            "env://", launch.rank, launch.world_size, timeout=timedelta(seconds=timeout)
        )
        store: Store = next(found)[0]
        return store
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" in reason:
            raise RanksLost(
                f"rank {launch.rank} of {launch.world_size} cannot listen at {address}: another "
                "run or program does; give the launcher a free port, such as `deepspeed "
                f"--master_port {free_port()}`"
            ) from error
        raise RanksLost(
            f"rank {launch.rank} of {launch.world_size} did not meet the others at {address} "
            f"within faults.start_timeout {timeout:g} s ({reason}): check that all hosts run and "
            "reach that address, and that the port is free"
        ) from error


@contextmanager
def lost_ranks_reported(when: Callable[[], str]) -> Iterator[None]:
    """Turns the error of a collective that lost a rank into one line that says how to resume."""
    try:
        yield
    except RuntimeError as error:
        if not means_lost_rank(error):
            raise
        # Without the path of the source file that raised it.
        reason = str(error).splitlines()[0].split("] ", 1)[-1][:120]
        raise RanksLost(
            f"rank {rank()} of {world_size()} lost another one {when()} ({reason}); resume with "
            "the same command and --resume"
        ) from error


def make_barrier(timeout: timedelta = LONG) -> Callable[[], None]:
    """A barrier for work that takes one rank much longer than a step: saving, drawing, exporting.

    All ranks must make it together. A call returns when every rank has called. It differs from
    `torch.distributed.barrier` in two ways: it has a time-out of its own, not that of training's
    groups, and a rank may exit right after the last call.

    Args:
        timeout: how long ranks wait for the last one before the call raises RuntimeError.
    """
    if dist.get_world_size() == 1:
        return lambda: None
    group = dist.new_group(backend="gloo", timeout=timeout)
    # The first rank hears from each and answers; an ordinary barrier breaks when one leaves early.
    return lambda: dist.monitored_barrier(group, timeout=timeout)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank; the same answer on all."""
    return max_over_ranks([float(flag)])[0] > 0


def max_over_ranks(values: Iterable[float]) -> list[float]:
    """The largest of each value over the ranks, which must all give the same number of values."""
    values = list(values)
    if world_size() == 1 or not values:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [float(x) for x in tensor.tolist()]


def mean_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Each value averaged over the ranks, which must all give the same names in the same order."""
    if world_size() == 1 or not values:
        return dict(values)
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=device())
    dist.all_reduce(tensor)
    return dict(zip(values, (tensor / world_size()).tolist(), strict=True))


def sum_of(value: Tensor) -> Tensor:
    """The sum of a tensor over the ranks, all of which give one of the same shape."""
    if world_size() == 1:
        return value
    total = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def mean_of(value: Tensor) -> Tensor:
    """As `sum_of`, divided by the number of ranks."""
    return sum_of(value) / world_size()


def broadcast(value: Tensor, source: int) -> Tensor:
    """The CPU tensor of rank `source`, on the CPU of every rank.

    `value` must have the same shape and dtype on all ranks; its numbers count on `source` alone.
    """
    if world_size() == 1:
        return value
    moved = value.to(device()).contiguous()
    dist.broadcast(moved, source)
    return moved.cpu()


class _AllGather(torch.autograd.Function):
    """Rows of all ranks. Backward, each rank's rows get the gradients that all ranks have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return rearrange(parts, "ranks b e -> (ranks b) e")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return rearrange(gradient, "(ranks b) e -> ranks b e", ranks=world_size())[rank()]


def all_gather(x: Tensor) -> Tensor:
    """Rows [b, e] of this rank -> those of all ranks, [ranks * b, e], in order; differentiable.

    All ranks must give the same shape. Every rank's loss may depend on all of the rows.
    """
    if world_size() == 1:
        return x
    rows: Tensor = _AllGather.apply(x)  # type: ignore[no-untyped-call]
    return rows

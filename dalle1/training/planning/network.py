"""Machines, and the messages between them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from dalle1.training.config import RunConfig
from dalle1.training.parallel import dp_shard_of
from dalle1.training.planning.flops import FLOAT, parameter_count
from dalle1.training.powersgd import matrices, worth_compressing


@dataclass(frozen=True)
class ClusterSettings:
    """Machines to plan for. mfu is the share of `peak` that all products reach, recomputed ones
    included; without those it is what launch/benchmark.py prints."""

    gpus: int = 8
    gpus_per_node: int = 8
    memory: float = 80.0  # GB of a GPU
    network: float = 400.0  # Gbit/s of a node, each way
    mfu: float = 0.4
    peak: float = 989.0  # TFLOP/s of a GPU: dense products, 16 bits, H100

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0 or (name == "mfu" and value > 1):
                most = " and at most 1" if name == "mfu" else ""
                raise ValueError(f"{_flag(name)}: expected more than 0{most}, got {value}")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            below = self.gpus - self.gpus % self.gpus_per_node
            raise ValueError(
                f"--gpus {self.gpus} must be a multiple of --gpus-per-node {self.gpus_per_node}, "
                f"such as {below} or {below + self.gpus_per_node}"
            )

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)


@dataclass(frozen=True)
class Transfer:
    """What one kind of message sends a step, in bytes."""

    name: str
    gpu: float  # by a GPU, wherever to
    node: float  # by a node, to other nodes


def _leaving(groups: Iterable[Sequence[int]], gpus_per_node: int) -> int:
    """How many of the groups' rings leave a node, the most of any node."""
    nodes: Counter[int] = Counter()
    for group in groups:
        for sender, receiver in zip(group, [*group[1:], group[0]], strict=True):
            if sender // gpus_per_node != receiver // gpus_per_node:
                nodes[sender // gpus_per_node] += 1
    return max(nodes.values(), default=0)


def compressed_matrices(
    config: RunConfig, module: nn.Module, ranks: int
) -> list[tuple[int, int, int]]:
    """Rows, columns and rank of what PowerSGD compresses on a rank, see `Engine`.

    A shard has 1 / shards of a matrix's rows; the setting counts the ranks of all shards, each of
    which is compressed to rank / shards (appendix E, table 2). Cut rows are sent as they are.
    """
    shards = dp_shard_of(config.parallel, ranks)
    if config.compression is None or ranks == shards:
        return []
    rank = max(1, config.compression.approximation_rank // shards)
    found = []
    for shape in matrices({name: p.shape for name, p in module.named_parameters()}).values():
        size, columns = -(-math.prod(shape) // shards), shape[-1]
        if (
            len(shape) == 2
            and size % columns == 0
            and worth_compressing((size // columns, columns), rank)
        ):
            found.append((size // columns, columns, rank))
    return found


def transfers(
    config: RunConfig, cluster: ClusterSettings, module: nn.Module, accumulate: int
) -> tuple[Transfer, ...]:
    """What GPUs and nodes send a step.

    ZeRO 1 to 3 reduce-scatter gradients inside of a group, 2 and 3 after each pass; 1 and 2 gather
    the new weights once, 3 before each forward and each backward pass (where recomputation finds
    them whole). Then replicas average their shards, or all ranks all gradients under ZeRO 0; by
    PowerSGD the two factors of a matrix m x n are sent, (m + n) r numbers for m n.
    """
    ranks, stage = cluster.gpus, config.parallel.zero_stage
    shards = dp_shard_of(config.parallel, ranks)
    replicas = ranks // shards
    groups = [range(first, first + shards) for first in range(0, ranks, shards)]
    across = [range(first, ranks, shards) for first in range(shards)]
    inside_rings, across_rings = (_leaving(g, cluster.gpus_per_node) for g in (groups, across))
    share = (shards - 1) / shards * FLOAT * parameter_count(module)
    values = parameter_count(module) / shards
    values -= sum(m * n - (m + n) * r for m, n, r in compressed_matrices(config, module, ranks))
    exchanged = 2 * (replicas - 1) / replicas * FLOAT * values
    gathers = {1: 1, 2: 1, 3: 2 * accumulate}.get(stage, 0) * share
    scatters = {1: 1, 2: accumulate, 3: accumulate}.get(stage, 0) * share
    return (
        Transfer("weights, gathered", gathers, gathers * inside_rings),
        Transfer("gradients, scattered", scatters, scatters * inside_rings),
        Transfer("gradients, between replicas", exchanged, exchanged * across_rings),
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

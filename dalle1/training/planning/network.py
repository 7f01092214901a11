"""Nodes, and the messages between them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from dalle1.common.hardware import PEAKS
from dalle1.training.config import RunConfig
from dalle1.training.parallel import dp_shard_of
from dalle1.training.planning.flops import FLOAT_BYTES, parameter_count, trained_count
from dalle1.training.powersgd import matrices, worth_compressing


@dataclass(frozen=True)
class ClusterSettings:
    """The GPUs and the network to plan for.

    Raises ValueError that names the option whose value is out of range or does not divide.
    """

    gpus: int = 8
    gpus_per_node: int = 8
    memory: float = 80.0  # GB of a GPU
    network: float = 400.0  # Gbit/s of a node, each way
    # Share of `peak` that all products reach, recomputed ones included. Without those it is the MFU
    # that launch/benchmark.py prints.
    mfu: float = 0.4
    peak: float = PEAKS["H100"] / 1e12  # TFLOP/s of a GPU: dense products, 16 bits

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0 or (name == "mfu" and value > 1):
                limit = " and at most 1" if name == "mfu" else ""
                raise ValueError(f"{_flag(name)}: expected more than 0{limit}, got {value}")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            below = self.gpus - self.gpus % self.gpus_per_node
            raise ValueError(
                f"--gpus: expected a multiple of --gpus-per-node {self.gpus_per_node}, got "
                f"{self.gpus}; take {below} or {below + self.gpus_per_node}"
            )

    @property
    def nodes(self) -> int:
        """How many nodes there are; fewer GPUs than a node has are one node."""
        return -(-self.gpus // self.gpus_per_node)


@dataclass(frozen=True)
class Transfer:
    """Bytes that one kind of message sends in a step."""

    name: str
    gpu: float  # sent by a GPU, to any other
    node: float  # sent by a node, to other nodes


def _rings_leaving_a_node(groups: Iterable[Sequence[int]], gpus_per_node: int) -> int:
    """How many of the groups' rings leave a node: the largest count of any node."""
    nodes: Counter[int] = Counter()
    for group in groups:
        for sender, receiver in zip(group, [*group[1:], group[0]], strict=True):
            if sender // gpus_per_node != receiver // gpus_per_node:
                nodes[sender // gpus_per_node] += 1
    return max(nodes.values(), default=0)


def compressed_matrices(
    config: RunConfig, module: nn.Module, world_size: int
) -> list[tuple[int, int, int]]:
    """(rows m, columns n, approximation rank r) of what PowerSGD compresses on one GPU.

    Each of the dp_shard shards has its part of a matrix's rows. The setting is the approximation
    rank of all shards together, so that each is compressed to rank / dp_shard (appendix E, table
    2). Shards that end within a row are sent as they are, see `Engine`.
    """
    dp_shard = dp_shard_of(config.parallel, world_size)
    if config.compression is None or world_size == dp_shard:
        return []
    rank = max(1, config.compression.approximation_rank // dp_shard)
    found = []
    for shape in matrices({name: p.shape for name, p in module.named_parameters()}).values():
        size, columns = -(-math.prod(shape) // dp_shard), shape[-1]
        if (
            len(shape) == 2
            and size % columns == 0
            and worth_compressing((size // columns, columns), rank)
        ):
            found.append((size // columns, columns, rank))
    return found


def transfers(
    config: RunConfig, cluster: ClusterSettings, module: nn.Module, grad_accum_steps: int
) -> tuple[Transfer, ...]:
    """What GPUs and nodes send in a step.

    ZeRO 1 to 3 reduce-scatter the gradients within a shard group: ZeRO 1 once a step, 2 and 3 after
    each pass. ZeRO 1 and 2 gather the new weights once. ZeRO 3 gathers them before each forward and
    each backward pass, and recomputation uses those of the latter. Then the replicas average their
    shards; under ZeRO 0 all GPUs average all gradients. With PowerSGD the two factors of a matrix
    m x n are sent, which are (m + n) r numbers in place of m n. What is frozen has no gradients.
    """
    world_size, stage = cluster.gpus, config.parallel.zero_stage
    dp_shard = dp_shard_of(config.parallel, world_size)
    dp_replicate = world_size // dp_shard
    shard_groups = [range(i, i + dp_shard) for i in range(0, world_size, dp_shard)]
    replica_groups = [range(i, world_size, dp_shard) for i in range(dp_shard)]
    shard_rings = _rings_leaving_a_node(shard_groups, cluster.gpus_per_node)
    replica_rings = _rings_leaving_a_node(replica_groups, cluster.gpus_per_node)
    share = (dp_shard - 1) / dp_shard * FLOAT_BYTES * parameter_count(module)
    trained = (dp_shard - 1) / dp_shard * FLOAT_BYTES * trained_count(module)
    values = trained_count(module) / dp_shard
    compressed = compressed_matrices(config, module, world_size)
    values -= sum(m * n - (m + n) * r for m, n, r in compressed)
    exchanged = 2 * (dp_replicate - 1) / dp_replicate * FLOAT_BYTES * values
    gathers = {1: 1, 2: 1, 3: 2 * grad_accum_steps}.get(stage, 0) * share
    scatters = {1: 1, 2: grad_accum_steps, 3: grad_accum_steps}.get(stage, 0) * trained
    return (
        Transfer("weights, gathered", gathers, gathers * shard_rings),
        Transfer("gradients, scattered", scatters, scatters * shard_rings),
        Transfer("gradients, between replicas", exchanged, exchanged * replica_rings),
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

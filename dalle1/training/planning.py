"""What a run asks of a cluster, before it is started: memory, network, time (section 2.5).

All numbers come from the config and from the real modules, built without memory on torch's meta
device. What is counted, and where training holds it:

- weights, gradients and moments are float32 whatever `parallel.precision` is: 4, 4 and 8 bytes a
  parameter, divided by the ranks that share them;
- the state between residual blocks is float32, what a block keeps for its backward pass has the
  precision's width, and logits are float32 and never whole (`dalle1.loss`);
- collectives send in rings, so that a rank of a group of k sends (k - 1) / k of a reduce-scatter or
  an all-gather and twice as much of an all-reduce; a ring leaves each node that it visits once.

Not counted: FLOPs of the frozen dVAE that encodes a transformer's pictures, memory of sheets and
checkpoints, weights gathered for the average once in ema.every updates, the time that messages take
inside of a node. Nothing overlaps; a GB is 1e9 bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from dalle1.clip import CLIP
from dalle1.training.compression import matrices, pays
from dalle1.training.config import RunConfig
from dalle1.training.ema import shares
from dalle1.training.spread import Layout, shard_ranks
from dalle1.training.work import FLOAT, build, parameter_count, pass_work
from dalle1.transformer import Execution, Transformer
from dvae import DVAE, DVAEConfig

LIVE = 10**9  # weights that DeepSpeed keeps whole for reuse (stage3_max_reuse_distance)
RESERVE = 4 * 10**9  # bytes: DeepSpeed's bucket of 5e8 gradients, CUDA's context, NCCL
COMFORT = 0.95  # of the memory: an allocator leaves gaps


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
class Memory:
    """Bytes of a GPU at their peak, which is the beginning of a backward pass."""

    weights: int
    master: int  # the weights' second copy that ZeRO 1 and 2 update
    gradients: int
    moments: int
    errors: int  # PowerSGD's buffers and its fixed Qs
    gathered: int  # weights that are whole for a while under ZeRO 3
    frozen: int  # the dVAE that encodes a transformer's pictures, of the paper's size
    activations: int  # kept from forward to backward
    block: int  # of the block at work: what is recomputed, and gradients of activations
    copies: int  # of weights, in 16 bits
    logits: int  # a chunk of them, and the heads' gradients that wait for the backward pass
    reserve: int = RESERVE

    @property
    def total(self) -> int:
        return sum(astuple(self))


@dataclass(frozen=True)
class Transfer:
    """What one kind of message sends a step, in bytes."""

    name: str
    gpu: float  # by a GPU, wherever to
    node: float  # by a node, to other nodes


@dataclass(frozen=True)
class Plan:
    config: RunConfig
    cluster: ClusterSettings
    shards: int  # ranks that share a copy of the state
    replicas: int  # such copies
    micro_batch: int
    accumulate: int  # passes of a step
    parameters: dict[str, int]  # by part
    memory: Memory
    cpu: dict[str, int]  # bytes of a rank
    tokens: int  # of a step, as are the next
    flops: float
    flops_again: float
    transfers: tuple[Transfer, ...]
    remedy: str | None  # what to change; None where it fits well
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.cluster.memory * 1e9

    @property
    def seconds(self) -> float:
        """Of a step's products."""
        rate = self.cluster.gpus * self.cluster.peak * 1e12 * self.cluster.mfu
        return (self.flops + self.flops_again) / rate

    @property
    def network_seconds(self) -> float:
        """Of a step's messages between nodes."""
        return sum(t.node for t in self.transfers) * 8 / (self.cluster.network * 1e9)


# Parameters ---------------------------------------------------------------------------------------


def parameters_by_part(module: nn.Module) -> dict[str, int]:
    """How many there are, in the parts that a reader of the paper looks for."""
    parts: Counter[str] = Counter()
    for name, parameter in module.named_parameters():
        parts[_part(module, name)] += parameter.numel()
    return dict(parts)


def _part(module: nn.Module, name: str) -> str:
    if isinstance(module, CLIP):
        return "image encoder" if name.startswith("visual.") else "text encoder"
    if isinstance(module, DVAE):
        return name.partition(".")[0]
    if name.startswith("layers."):
        return "attention blocks" if ".attention." in name else "MLP blocks"
    return "heads" if name.startswith(("norm.", "text_head.", "image_head.")) else "embeddings"


@cache
def _frozen() -> int:
    with torch.device("meta"):
        return parameter_count(DVAE(DVAEConfig()))


def _memory(config: RunConfig, module: nn.Module, ranks: int, micro_batch: int) -> Memory:
    p, shards, count = (
        config.parallel,
        shard_ranks(config.parallel, ranks),
        parameter_count(module),
    )
    whole, share = FLOAT * count, FLOAT * -(-count // shards)
    gathered = 0
    if p.zero_stage == 3 and (shards > 1 or p.offload == "weights"):
        # A transformer's layers take turns; all else stands through the pass, see `Engine`.
        turns = parameter_count(module.layers) if isinstance(module, Transformer) else 0
        gathered = FLOAT * (count - turns + min(turns, LIVE))
    work = pass_work(config, micro_batch, ranks)
    on_gpu = p.offload == "none"
    return Memory(
        weights=0 if p.offload == "weights" else share if p.zero_stage == 3 else whole,
        master=share if p.zero_stage in (1, 2) and on_gpu else 0,
        gradients=whole if p.zero_stage < 2 else share if on_gpu else 0,
        moments=2 * (share if p.zero_stage else whole) if on_gpu else 0,
        errors=FLOAT * sum(m * n + max(m, n) * r for m, n, r in _compressed(config, module, ranks)),
        gathered=gathered,
        frozen=FLOAT * _frozen() if config.stage == "dalle" else 0,
        activations=work.activations,
        block=work.block,
        copies=work.copies,
        logits=work.logits,
    )


# Ranks and messages -------------------------------------------------------------------------------


def _leaving(groups: Iterable[Sequence[int]], gpus_per_node: int) -> int:
    """How many of the groups' rings leave a node, the most of any node."""
    nodes: Counter[int] = Counter()
    for group in groups:
        for sender, receiver in zip(group, [*group[1:], group[0]], strict=True):
            if sender // gpus_per_node != receiver // gpus_per_node:
                nodes[sender // gpus_per_node] += 1
    return max(nodes.values(), default=0)


def _compressed(config: RunConfig, module: nn.Module, ranks: int) -> list[tuple[int, int, int]]:
    """Rows, columns and rank of what PowerSGD compresses on a rank, see `Engine`.

    A shard has 1 / shards of a matrix's rows; the setting counts the ranks of all shards, each of
    which is compressed to rank / shards (appendix E, table 2). Cut rows are sent as they are.
    """
    shards = shard_ranks(config.parallel, ranks)
    if config.compression is None or ranks == shards:
        return []
    rank = max(1, config.compression.rank // shards)
    found = []
    for shape in matrices({name: p.shape for name, p in module.named_parameters()}).values():
        size, columns = -(-math.prod(shape) // shards), shape[-1]
        if len(shape) == 2 and size % columns == 0 and pays((size // columns, columns), rank):
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
    shards = shard_ranks(config.parallel, ranks)
    replicas = ranks // shards
    groups = [range(first, first + shards) for first in range(0, ranks, shards)]
    across = [range(first, ranks, shards) for first in range(shards)]
    inside_rings, across_rings = (_leaving(g, cluster.gpus_per_node) for g in (groups, across))
    share = (shards - 1) / shards * FLOAT * parameter_count(module)
    values = parameter_count(module) / shards
    values -= sum(m * n - (m + n) * r for m, n, r in _compressed(config, module, ranks))
    exchanged = 2 * (replicas - 1) / replicas * FLOAT * values
    gathers = {1: 1, 2: 1, 3: 2 * accumulate}.get(stage, 0) * share
    scatters = {1: 1, 2: accumulate, 3: accumulate}.get(stage, 0) * share
    return (
        Transfer("weights, gathered", gathers, gathers * inside_rings),
        Transfer("gradients, scattered", scatters, scatters * inside_rings),
        Transfer("gradients, between replicas", exchanged, exchanged * across_rings),
    )


# The plan -----------------------------------------------------------------------------------------


def plan(config: RunConfig, cluster: ClusterSettings) -> Plan:
    """What a step of the run asks of each GPU, rank and node.

    Raises ValueError when batch, micro-batch and groups do not divide over the GPUs.
    """
    ranks = cluster.gpus
    layout = Layout(config.batch_size, config.parallel, ranks)
    micro, accumulate, shards = layout.micro_batch, layout.passes, layout.shard_ranks
    module = build(config)
    memory = _memory(config, module, ranks, micro)
    passes = ranks * accumulate
    work = pass_work(config, micro, ranks)
    made = Plan(
        config=config,
        cluster=cluster,
        shards=shards,
        replicas=ranks // shards,
        micro_batch=micro,
        accumulate=accumulate,
        parameters=parameters_by_part(module),
        memory=memory,
        cpu=_cpu(config, module, ranks),
        tokens=config.batch_size * _positions(config),
        flops=passes * work.flops,
        flops_again=passes * work.flops_again,
        transfers=transfers(config, cluster, module, accumulate),
        remedy=None,
        notes=tuple(_notes(config, ranks // shards, module)),
    )
    if memory.total <= COMFORT * cluster.memory * 1e9:
        return made
    return replace(made, remedy=_remedy(config, cluster, module, micro))


def _positions(config: RunConfig) -> int:
    """Tokens of a sample."""
    if config.transformer is not None:
        return config.transformer.stream.length
    if config.clip is not None:
        return (config.clip.image_size // config.clip.patch_size) ** 2 + config.clip.text_length
    assert config.dvae is not None
    return int((config.reader.image_size // config.dvae.stride) ** 2)


def _cpu(config: RunConfig, module: nn.Module, ranks: int) -> dict[str, int]:
    """Bytes of the rank that holds most."""
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    load: Counter[int] = Counter()
    for name, owner in shares(sizes, ranks).items():
        load[owner] += sizes[name]
    cpu = {"average": FLOAT * max(load.values())}
    share = FLOAT * -(-sum(sizes.values()) // shard_ranks(config.parallel, ranks))
    if config.parallel.offload != "none":
        cpu |= {"master": share, "moments": 2 * share}
        cpu |= {"gradients": share} if config.parallel.zero_stage > 1 else {}
    if config.parallel.offload == "weights":
        cpu["weights"] = share
    return cpu


def _notes(config: RunConfig, replicas: int, module: nn.Module) -> Iterable[str]:
    if config.parallel.precision == "fp32":
        yield "parallel.precision is fp32: --peak must be that of 32-bit products"
    if config.parallel.zero_stage in (1, 2):
        yield (
            "ZeRO 1 and 2 as DeepSpeed sets them up (use_multi_rank_bucket_allreduce) send "
            "an all-reduce for the scatter: twice its bytes"
        )
    if config.compression is not None and replicas == 1:
        yield "compression has nothing to do: there are no replicas"
    if config.stage == "dalle":
        size = FLOAT * parameter_count(module) / 1e9
        yield f"exports need {size:,.1f} GB more of the first rank's CPU, sheets of its GPU too"
    else:
        yield "activations and FLOPs are an estimate: by the CPU's kernels, without values"


def _remedy(config: RunConfig, cluster: ClusterSettings, module: nn.Module, micro: int) -> str:
    """Settings that make it fit: the fewest, cheapest first, then the largest micro-batch."""
    now, share = config.parallel, config.batch_size // cluster.gpus
    micros = [m for m in range(micro, 0, -1) if share % m == 0]
    if config.stage == "clip":  # whose loss compares all pairs of a batch
        micros = [micro]
    steps: list[dict[str, Any]] = [{}]
    if config.compression is None:  # which knows stage 0, and groups at stage 3
        steps += [{"parallel.zero_stage": z} for z in (1, 2) if z > now.zero_stage]
    if config.stage == "dalle":
        steps.append({"execution.checkpointing": "true"})
    if config.compression is None:
        steps.append({"parallel.zero_stage": 3})
        if now.shard_ranks is not None:  # and offloading knows no groups
            steps.append({"parallel.shard_ranks": "null"})
        steps += [{"parallel.offload": kind} for kind in ("optimiser", "weights")]
    elif cluster.nodes > 1:
        steps.append({"parallel.zero_stage": 3, "parallel.shard_ranks": cluster.gpus_per_node})
    settings: dict[str, Any] = {}
    for step in steps:
        settings |= step
        for m in micros:
            tried = settings | ({"parallel.micro_batch": m} if m != micro else {})
            changed = _with(config, tried)
            total = _memory(changed, module, cluster.gpus, m).total
            if total <= COMFORT * cluster.memory * 1e9:
                new = {k: v for k, v in tried.items() if _with(config, {k: v}) != config}
                return "set " + " ".join(f"{key}={value}" for key, value in new.items())
    return (
        f"no setting makes it fit, the least is {total / 1e9:,.1f} GB: take more or larger GPUs, "
        "or a smaller model"
    )


def _with(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """The config with settings such as parallel.zero_stage changed."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        old = getattr(config, section) or Execution()
        value = {"null": None, "true": True}.get(value, value)
        new = old.model_copy(update={name: value})
        config = config.model_copy(update={section: new})
    return config


# In words -----------------------------------------------------------------------------------------

MEMORY = {
    "weights": "weights",
    "master": "weights, ZeRO's copy",
    "gradients": "gradients",
    "moments": "moments",
    "errors": "PowerSGD's buffers",
    "gathered": "weights gathered (ZeRO 3)",
    "frozen": "frozen dVAE",
    "activations": "activations kept",
    "block": "block at work",
    "copies": "weights in 16 bits",
    "logits": "logits and heads' gradients",
    "reserve": "buffers, context (allowance)",
}


def describe(plan: Plan) -> str:
    """The plan as tables for people; GB are 1e9 bytes."""
    config, cluster, gb = plan.config, plan.cluster, 1e9
    lines = [
        f"{config.run}: stage {config.stage} in {config.parallel.precision} on "
        f"{_counted(cluster.gpus, 'GPU')}, {_counted(cluster.nodes, 'node')}",
        f"ZeRO {config.parallel.zero_stage}: {_counted(plan.replicas, 'replica')} of the state, "
        f"each on {_counted(plan.shards, 'GPU')}",
        f"batch {config.batch_size:,} = {_counted(cluster.gpus, 'GPU')} x {plan.micro_batch:,} x "
        f"{plan.accumulate:,} a step",
    ]

    def table(title: str, rows: Iterable[Sequence[Any]], style: str) -> None:
        lines.append(title)
        for name, *values in rows:
            lines.append(f"  {name:30}" + "".join(f"{value:>18{style}}" for value in values))

    count = sum(plan.parameters.values())
    table("parameters", [*plan.parameters.items(), ("total", count)], ",")
    used = [(MEMORY[name], value / gb) for name, value in asdict(plan.memory).items() if value]
    table("memory of a GPU, GB", [*used, ("total", plan.memory.total / gb)], ",.2f")
    tight = plan.memory.total > COMFORT * cluster.memory * gb
    answer = f"fits{', but barely' if tight else ''}" if plan.fits else "does NOT fit"
    answer += f": {plan.remedy}" if plan.remedy else ""
    lines.append(f"  of {cluster.memory:g}: {answer}")
    table("memory of a rank's CPU, GB", [(k, v / gb) for k, v in plan.cpu.items()], ",.2f")
    sent = [(t.name, t.gpu / gb, t.node / gb) for t in plan.transfers if t.gpu]
    sums = ("total", sum(row[1] for row in sent), sum(row[2] for row in sent))
    table("sent a step, GB: by a GPU, by a node to others", [*sent, sums], ",.2f")
    work = [("tokens", plan.tokens), ("FLOPs of the model", plan.flops)]
    work += [("FLOPs of recomputation", plan.flops_again)] if plan.flops_again else []
    table("a step", work, ",.4g")
    days = config.steps / 86400
    times = [("products", plan.seconds), ("network", plan.network_seconds)]
    times.append(("both, if nothing overlaps", plan.seconds + plan.network_seconds))
    rows = [(name, seconds, seconds * days) for name, seconds in times]
    table(f"time: seconds a step, days of {config.steps:,} steps", rows, ",.4g")
    mfu = cluster.mfu * plan.flops / (plan.flops + plan.flops_again)
    lines.append(
        f"  at {cluster.mfu:.0%} of {cluster.peak:g} TFLOP/s ({mfu:.0%} MFU without recomputation) "
        f"and {cluster.network:g} Gbit/s a node"
    )
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + "s" * (number != 1)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

"""What a run asks of a cluster, before it is started: memory, network, time (section 2.5).

All numbers come from the config and from the real modules, built without memory on torch's meta
device. What is counted, and where training holds it:

- weights, gradients and moments are float32 whatever `parallel.precision` is: 4, 4 and 8 bytes a
  parameter, divided by the ranks that share them;
- the state between residual blocks is float32, what a block keeps for its backward pass has the
  precision's width, and logits are float32 and never whole (`dalle1.transformer.loss`);
- collectives send in rings, so that a rank of a group of k sends (k - 1) / k of a reduce-scatter or
  an all-gather and twice as much of an all-reduce; a ring leaves each node that it visits once.

Not counted: FLOPs of the frozen dVAE that encodes a transformer's pictures, memory of sheets and
checkpoints, weights gathered for the average once in ema.every updates, the time that messages take
inside of a node. Nothing overlaps; a GB is 1e9 bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dalle1.clip.model import CLIP
from dalle1.training.config import RunConfig
from dalle1.training.parallel import ParallelDims
from dalle1.training.planning.flops import FLOAT, build, parameter_count, pass_work
from dalle1.training.planning.memory import Memory, cpu_memory, gpu_memory
from dalle1.training.planning.network import ClusterSettings, Transfer, transfers
from dalle1.transformer.config import Execution
from dvae import DVAE

COMFORT = 0.95  # of the memory: an allocator leaves gaps


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


def plan(config: RunConfig, cluster: ClusterSettings) -> Plan:
    """What a step of the run asks of each GPU, rank and node.

    Raises ValueError when batch, micro-batch and groups do not divide over the GPUs.
    """
    ranks = cluster.gpus
    dims = ParallelDims(config.batch_size, config.parallel, ranks)
    micro, accumulate, shards = dims.micro_batch, dims.grad_accum_steps, dims.dp_shard
    module = build(config)
    memory = gpu_memory(config, module, ranks, micro)
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
        cpu=cpu_memory(config, module, ranks),
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
        return config.transformer.sequence.length
    if config.clip is not None:
        return (config.clip.image_size // config.clip.patch_size) ** 2 + config.clip.text_length
    assert config.dvae is not None
    return int((config.reader.image_size // config.dvae.stride) ** 2)


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
        if now.dp_shard is not None:  # and offloading knows no groups
            steps.append({"parallel.dp_shard": "null"})
        steps += [{"parallel.offload": kind} for kind in ("optimizer", "weights")]
    elif cluster.nodes > 1:
        steps.append({"parallel.zero_stage": 3, "parallel.dp_shard": cluster.gpus_per_node})
    settings: dict[str, Any] = {}
    for step in steps:
        settings |= step
        for m in micros:
            tried = settings | ({"parallel.micro_batch": m} if m != micro else {})
            changed = _with(config, tried)
            total = gpu_memory(changed, module, cluster.gpus, m).total
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

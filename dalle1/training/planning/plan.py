"""What a run needs of a cluster, before it is started: memory, network and time (section 2.5).

All numbers come from the config and from the real modules, which are built without memory on
torch's meta device. This is what is counted:

- Weights, gradients and moments are float32, whatever `parallel.precision` is. They take 4, 4 and 8
  bytes a parameter, divided by the ranks that share them.
- The state between residual blocks is float32. What a block keeps for its backward pass has the
  bytes of the precision. Logits are float32, and exist in chunks only (`dalle1.transformer.loss`).
- Collectives send in rings. A rank of a group of k sends (k - 1) / k of a reduce-scatter or an
  all-gather, and twice as much of an all-reduce. A ring leaves each node that it visits once.

This is not counted: FLOPs of the frozen dVAE that encodes a transformer's images, memory of contact
sheets and checkpoints, weights that are gathered for the average once in `ema.every` steps, and the
time of messages within a node. Nothing is assumed to overlap. A GB is 1e9 bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dalle1.clip.model import CLIP
from dalle1.seq2seq.model import Seq2Seq
from dalle1.training.config import RunConfig, with_precision
from dalle1.training.parallel import ParallelDims
from dalle1.training.planning.flops import FLOAT_BYTES, build_module, parameter_count, step_cost
from dalle1.training.planning.memory import Memory, cpu_memory, gpu_memory
from dalle1.training.planning.network import ClusterSettings, Transfer, transfers
from dalle1.transformer.config import Execution
from dvae import DVAE, VQGAN

COMFORT = 0.95  # of the memory, above which a run barely fits: an allocator leaves gaps


@dataclass(frozen=True)
class Plan:
    """What a step of a run needs of each GPU, rank and node."""

    config: RunConfig
    cluster: ClusterSettings
    dp_shard: int  # ranks that share one copy of the state
    dp_replicate: int  # copies of the state
    micro_batch: int
    grad_accum_steps: int  # passes of a step
    parameters: dict[str, int]  # by part
    memory: Memory
    cpu: dict[str, int]  # bytes by part, of one rank
    tokens: int  # of a step on all GPUs together, as are the FLOPs
    flops: float
    recomputed_flops: float
    transfers: tuple[Transfer, ...]
    remedy: str | None  # what to change; None where it fits well
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether a GPU's memory holds it, however barely."""
        return self.memory.total <= self.cluster.memory * 1e9

    @property
    def fits_well(self) -> bool:
        """Whether a GPU's memory holds it with room for an allocator's gaps."""
        return _fits_well(self.memory, self.cluster)

    @property
    def seconds(self) -> float:
        """Seconds that the matrix products of a step take."""
        rate = self.cluster.gpus * self.cluster.peak * 1e12 * self.cluster.mfu
        return (self.flops + self.recomputed_flops) / rate

    @property
    def network_seconds(self) -> float:
        """Seconds that the messages between nodes take in a step."""
        return sum(t.node for t in self.transfers) * 8 / (self.cluster.network * 1e9)


def parameters_by_part(module: nn.Module) -> dict[str, int]:
    """How many parameters each part has, by the parts that the paper names."""
    parts: Counter[str] = Counter()
    for name, parameter in module.named_parameters():
        parts[_part(module, name)] += parameter.numel()
    return dict(parts)


def _part(module: nn.Module, name: str) -> str:
    if isinstance(module, CLIP):
        return "image encoder" if name.startswith("visual.") else "text encoder"
    if isinstance(module, DVAE | VQGAN | Seq2Seq):
        return name.partition(".")[0]
    if name.startswith("layers."):
        return "attention blocks" if ".attention." in name else "MLP blocks"
    return (
        "heads"
        if name.startswith(("norm.", "head_norm.", "text_head.", "image_head."))
        else "embeddings"
    )


def plan(config: RunConfig, cluster: ClusterSettings) -> Plan:
    """What a step of the run needs of each GPU, rank and node, without running it.

    Raises ValueError when batch, micro-batch and shard groups do not divide over the GPUs.
    """
    config = with_precision(config, bfloat16=True)  # as every GPU of the last years has
    world_size = cluster.gpus
    dims = ParallelDims(config.batch_size, config.parallel, world_size)
    module = build_module(config)
    memory = gpu_memory(config, module, world_size, dims.micro_batch)
    cost = step_cost(config, dims.micro_batch, world_size)
    passes = world_size * dims.grad_accum_steps
    remedy = None
    if not _fits_well(memory, cluster):
        remedy = _remedy(config, cluster, module, dims.micro_batch)
    return Plan(
        config=config,
        cluster=cluster,
        dp_shard=dims.dp_shard,
        dp_replicate=dims.dp_replicate,
        micro_batch=dims.micro_batch,
        grad_accum_steps=dims.grad_accum_steps,
        parameters=parameters_by_part(module),
        memory=memory,
        cpu=cpu_memory(config, module, world_size),
        tokens=config.batch_size * _tokens_of_a_sample(config),
        flops=passes * cost.flops,
        recomputed_flops=passes * cost.recomputed_flops,
        transfers=transfers(config, cluster, module, dims.grad_accum_steps),
        remedy=remedy,
        notes=tuple(_notes(config, dims.dp_replicate, module)),
    )


def _fits_well(memory: Memory, cluster: ClusterSettings) -> bool:
    return memory.total <= COMFORT * cluster.memory * 1e9


def _tokens_of_a_sample(config: RunConfig) -> int:
    if config.prior is not None:
        return config.prior.sequence_length
    if config.clip is not None:
        return (config.clip.image_size // config.clip.patch_size) ** 2 + config.clip.text_length
    if config.vqgan is not None:
        return int((config.reader.image_size // config.vqgan.out_stride) ** 2)
    assert config.dvae is not None
    return int((config.reader.image_size // config.dvae.stride) ** 2)


def _notes(config: RunConfig, dp_replicate: int, module: nn.Module) -> Iterable[str]:
    """What the numbers leave out for this config."""
    if config.parallel.precision == "fp32":
        yield "parallel.precision is fp32: --peak must be that of 32-bit products"
    if config.parallel.zero_stage in (1, 2):
        yield (
            "ZeRO 1 and 2 as DeepSpeed sets them up (use_multi_rank_bucket_allreduce) send an "
            "all-reduce in place of the reduce-scatter, which is twice its bytes"
        )
    if config.compression is not None and dp_replicate == 1:
        yield "compression has nothing to do: there are no replicas"
    if config.stage == "dalle":
        size = FLOAT_BYTES * parameter_count(module) / 1e9
        yield (
            f"exports need {size:,.1f} GB more of the first rank's CPU, contact sheets of its GPU "
            "too"
        )
    else:
        yield "activations and FLOPs are an estimate, counted with the CPU's kernels"


def _remedy(config: RunConfig, cluster: ClusterSettings, module: nn.Module, micro: int) -> str:
    """Settings that make it fit: as few as possible, then the largest micro-batch."""
    share = config.batch_size // cluster.gpus
    micro_batches = [m for m in range(micro, 0, -1) if share % m == 0]
    if config.stage == "clip":  # whose loss compares all pairs of a batch
        micro_batches = [micro]
    settings: dict[str, Any] = {}
    for change in ({}, *_savings(config, cluster)):
        settings |= change
        for m in micro_batches:
            tried = settings | ({"parallel.micro_batch": m} if m != micro else {})
            memory = gpu_memory(_with(config, tried), module, cluster.gpus, m)
            if _fits_well(memory, cluster):
                new = {k: v for k, v in tried.items() if _with(config, {k: v}) != config}
                return "set " + " ".join(f"{key}={value}" for key, value in new.items())
    return (
        f"no setting makes it fit, the least is {memory.total / 1e9:,.1f} GB: take more or larger "
        "GPUs, or a smaller model"
    )


def _savings(config: RunConfig, cluster: ClusterSettings) -> Iterable[dict[str, Any]]:
    """Changes that save memory, those first that cost least time; each is made on top of the last.

    Compression goes with stage 0, and with shard groups at stage 3.
    """
    parallel, compressed = config.parallel, config.compression is not None
    if not compressed:
        yield from ({"parallel.zero_stage": z} for z in (1, 2) if z > parallel.zero_stage)
    if config.stage == "dalle":
        yield {"execution.checkpointing": "true"}
    if not compressed:
        yield {"parallel.zero_stage": 3}
        if parallel.dp_shard is not None:  # which offloading does not go with
            yield {"parallel.dp_shard": "null"}
        yield from ({"parallel.offload": kind} for kind in ("optimizer", "weights"))
    elif cluster.nodes > 1:
        yield {"parallel.zero_stage": 3, "parallel.dp_shard": cluster.gpus_per_node}


def _with(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """The config with settings such as parallel.zero_stage changed."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        old = getattr(config, section) or Execution()
        value = {"null": None, "true": True}.get(value, value)
        new = old.model_copy(update={name: value})
        config = config.model_copy(update={section: new})
    return config

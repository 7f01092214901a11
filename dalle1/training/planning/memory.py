"""The memory of a GPU, and that of the CPU for each rank."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass
from functools import cache

import torch
from torch import nn

from dalle1.training.config import RunConfig
from dalle1.training.ema import assign_owners
from dalle1.training.optimizer import takes_muon
from dalle1.training.parallel import dp_shard_of
from dalle1.training.planning.flops import (
    FLOAT_BYTES,
    parameter_count,
    step_cost,
    trained_count,
)
from dalle1.training.planning.network import compressed_matrices
from dalle1.transformer.prior import ResidualPrior
from dvae import DVAE, DVAEConfig
from dvae.vqgan.perceptual import LPIPS

LIVE = 10**9  # weights that DeepSpeed keeps unsharded for reuse (stage3_max_reuse_distance)
RESERVE = 4 * 10**9  # bytes: DeepSpeed's bucket of 5e8 gradients, CUDA's context, NCCL


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU at their peak, which is the beginning of a backward pass."""

    weights: int
    master: int  # the weights' second copy, which ZeRO 1 and 2 update
    gradients: int
    moments: int
    errors: int  # PowerSGD's buffers and its fixed Qs
    gathered: int  # weights that are unsharded for a while under ZeRO 3
    frozen: int  # a dVAE of the paper's size that encodes a transformer's images, or LPIPS
    activations: int  # kept from forward to backward
    block: int  # of one block's backward pass: what is recomputed, and gradients of activations
    copies: int  # of weights, in 16 bits
    logits: int  # a chunk of them, and the heads' gradients, which are kept for the backward pass
    reserve: int = RESERVE

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return sum(astuple(self))


@cache
def _codec_parameters() -> int:
    """Parameters of a dVAE of the paper's size."""
    with torch.device("meta"):
        return parameter_count(DVAE(DVAEConfig()))


def _frozen_parameters(config: RunConfig) -> int:
    """Parameters of what is read and not trained."""
    if config.stage == "dalle":
        return _codec_parameters()
    if config.vqgan_training is None or config.vqgan_training.perceptual is None:
        return 0
    with torch.device("meta"):
        return parameter_count(LPIPS())


def _moments(config: RunConfig, module: nn.Module) -> int:
    """Bytes of the moments where nothing shards them: AdamW keeps two of a weight, Muon one."""
    muon = config.optimizer.kind == "muon"
    numbers = (
        (1 if muon and takes_muon(name, p.shape) else 2) * p.numel()
        for name, p in module.named_parameters()
        if p.requires_grad
    )
    return FLOAT_BYTES * sum(numbers)


def gpu_memory(config: RunConfig, module: nn.Module, world_size: int, micro_batch: int) -> Memory:
    """Memory of each of `world_size` GPUs that train `module` with this micro-batch."""
    p, dp_shard = config.parallel, dp_shard_of(config.parallel, world_size)
    count = parameter_count(module)
    full, share = FLOAT_BYTES * count, FLOAT_BYTES * -(-count // dp_shard)
    trained = trained_count(module)
    trained_full, trained_share = FLOAT_BYTES * trained, FLOAT_BYTES * -(-trained // dp_shard)
    gathered = 0
    if p.zero_stage == 3 and (dp_shard > 1 or p.offload == "weights"):
        # A prior's layers are gathered in turn, all else for the whole pass, see `Engine`.
        turns = 0
        if isinstance(module, ResidualPrior):
            turns = sum(map(parameter_count, module.residual_layers))
        gathered = FLOAT_BYTES * (count - turns + min(turns, LIVE))
    compressed = compressed_matrices(config, module, world_size)
    cost = step_cost(config, micro_batch, world_size)
    on_gpu = p.offload == "none"
    return Memory(
        weights=0 if p.offload == "weights" else share if p.zero_stage == 3 else full,
        master=trained_share if p.zero_stage in (1, 2) and on_gpu else 0,
        gradients=trained_full if p.zero_stage < 2 else trained_share if on_gpu else 0,
        moments=2 * trained_share * on_gpu if p.zero_stage else _moments(config, module),
        errors=FLOAT_BYTES * sum(m * n + max(m, n) * r for m, n, r in compressed),
        gathered=gathered,
        frozen=FLOAT_BYTES * _frozen_parameters(config),
        activations=cost.activations,
        block=cost.block,
        copies=cost.copies,
        logits=cost.logits,
    )


def cpu_memory(config: RunConfig, module: nn.Module, world_size: int) -> dict[str, int]:
    """Bytes on the CPU by part, of the rank that holds most."""
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    load: Counter[int] = Counter()
    for name, owner in assign_owners(sizes, world_size).items():
        load[owner] += sizes[name]
    cpu = {"average": FLOAT_BYTES * max(load.values())}
    dp_shard = dp_shard_of(config.parallel, world_size)
    share, trained = (
        FLOAT_BYTES * -(-n // dp_shard) for n in (sum(sizes.values()), trained_count(module))
    )
    if config.parallel.offload != "none":
        cpu |= {"master": trained, "moments": 2 * trained}
        cpu |= {"gradients": trained} if config.parallel.zero_stage > 1 else {}
    if config.parallel.offload == "weights":
        cpu["weights"] = share
    return cpu

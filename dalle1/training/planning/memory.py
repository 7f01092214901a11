"""Memory of a GPU and of a rank's CPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass
from functools import cache

import torch
from torch import nn

from dalle1.training.config import RunConfig
from dalle1.training.ema import assign_owners
from dalle1.training.parallel import dp_shard_of
from dalle1.training.planning.flops import FLOAT, parameter_count, pass_work
from dalle1.training.planning.network import compressed_matrices
from dalle1.transformer.model import Transformer
from dvae import DVAE, DVAEConfig

LIVE = 10**9  # weights that DeepSpeed keeps whole for reuse (stage3_max_reuse_distance)
RESERVE = 4 * 10**9  # bytes: DeepSpeed's bucket of 5e8 gradients, CUDA's context, NCCL


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


@cache
def _frozen() -> int:
    with torch.device("meta"):
        return parameter_count(DVAE(DVAEConfig()))


def gpu_memory(config: RunConfig, module: nn.Module, ranks: int, micro_batch: int) -> Memory:
    p, shards, count = (
        config.parallel,
        dp_shard_of(config.parallel, ranks),
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
        errors=FLOAT
        * sum(m * n + max(m, n) * r for m, n, r in compressed_matrices(config, module, ranks)),
        gathered=gathered,
        frozen=FLOAT * _frozen() if config.stage == "dalle" else 0,
        activations=work.activations,
        block=work.block,
        copies=work.copies,
        logits=work.logits,
    )


def cpu_memory(config: RunConfig, module: nn.Module, ranks: int) -> dict[str, int]:
    """Bytes of the rank that holds most."""
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    load: Counter[int] = Counter()
    for name, owner in assign_owners(sizes, ranks).items():
        load[owner] += sizes[name]
    cpu = {"average": FLOAT * max(load.values())}
    share = FLOAT * -(-sum(sizes.values()) // dp_shard_of(config.parallel, ranks))
    if config.parallel.offload != "none":
        cpu |= {"master": share, "moments": 2 * share}
        cpu |= {"gradients": share} if config.parallel.zero_stage > 1 else {}
    if config.parallel.offload == "weights":
        cpu["weights"] = share
    return cpu

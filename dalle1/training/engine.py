"""DeepSpeed, and the only file that imports it: processes, gradients, optimizer, sharded state.

ZeRO shards the moments (stage 1), the gradients (2) and the weights (3) over the ranks of a group,
`parallel.dp_shard` of them; groups are replicas of one another and average their shards of the
gradient here, whole or by PowerSGD (paper section 2.5). Whatever the stage, state is read and
written whole, one tensor after the other, so that a checkpoint fits any number of ranks.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.path.exists("/dev/nvidia0") else "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from dalle1.training import distributed
from dalle1.training.config import ParallelSettings, RunConfig
from dalle1.training.optimizer import MOMENTS, Optimizer
from dalle1.training.parallel import ParallelDims, ShardGroups
from dalle1.training.powersgd import PowerSGD, matrices, mean_over
from dalle1.training.signals import RanksLost
from dalle1.training.stages.base import Stage

OVERFLOW = "gradients of a block are beyond float16"  # meant to happen now and then
NOT_FINITE = "a gradient is not finite"
ACCEPT: Callable[[float], str | None] = lambda loss: None  # noqa: E731


def start_processes(timeout: float = 1800.0, start_timeout: float = 600.0) -> tuple[int, int]:
    """Joins the launcher's processes, or starts as the only one; returns (rank, ranks).

    timeout: seconds that ranks wait for one another, in every group; start_timeout: until all have
    come. Raises RanksLost when they have not.
    """
    if not dist.is_initialized():
        if "RANK" not in os.environ:  # plain `python launch/train.py`: a group of one
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = str(port)
        # DeepSpeed's op for CPUs in one machine compiles for a minute, waits without end for a
        # rank that has died, and hangs on the lock that a killed compilation leaves behind.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        wait = timedelta(seconds=timeout)
        # DeepSpeed makes groups of its own without asking for ours.
        dist.distributed_c10d.default_pg_timeout = wait
        dist.distributed_c10d.default_pg_nccl_timeout = wait  # type: ignore[attr-defined]
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            patience = timedelta(seconds=start_timeout)
            store, _, _ = next(dist.rendezvous("env://", rank, ranks, timeout=patience))  # type: ignore[attr-defined]
        except dist.DistError as error:
            reason = str(error).splitlines()[0]
            raise RanksLost(
                f"rank {rank} of {ranks} did not meet the others at MASTER_ADDR:MASTER_PORT = "
                f"{address} within faults.start_timeout {start_timeout:g} s ({reason}): "
                "check that all hosts run and reach that address, and that the port is free"
            ) from error
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=wait)
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return distributed.rank(), distributed.ranks()


@dataclass
class Update:
    """What came of one update, the same on all ranks."""

    loss: float  # of the whole batch
    metrics: dict[str, float]
    gradient_norm: float  # before clipping
    skipped: str | None  # why the update was left out


def make_sharding(config: RunConfig) -> Sharding | None:
    """What builds weights sharded from the beginning, where ZeRO 3 has ranks to spread them on."""
    if config.parallel.zero_stage < 3:
        return None
    return Sharding(config)


class Sharding:
    """See `stage.Sharding`."""

    def __init__(self, config: RunConfig) -> None:
        self._dims = ParallelDims(config.batch_size, config.parallel, distributed.ranks())
        self._config = config

    def building(self) -> AbstractContextManager[object]:
        groups = _groups(self._config.parallel, self._dims)
        context: AbstractContextManager[object] = deepspeed.zero.Init(
            data_parallel_group=groups.get_data_parallel_group() if groups else None,
            config_dict_or_path=_deepspeed_config(self._config, self._dims),
            mpu=groups,
        )
        return context

    def whole(self, parameter: nn.Parameter) -> AbstractContextManager[object]:
        return _whole([parameter], set_by=0)


class Engine:
    """A stage in training: its gradients, AdamW, and the state of both.

    Raises ValueError when the batch does not divide or a feature does not fit the ZeRO stage.
    """

    def __init__(self, stage: Stage, config: RunConfig) -> None:
        self.settings, self.parallel = config.optimizer, config.parallel
        self.dims = ParallelDims(config.batch_size, config.parallel, distributed.ranks())
        self._stage = stage
        self._parameters = dict(stage.named_parameters())
        self._groups = _groups(config.parallel, self.dims)
        groups = [{"params": [self._parameters[n] for n in g]} for g in stage.parameter_groups()]
        self._optimizer = Optimizer(groups, config.optimizer)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=stage,
            optimizer=self._optimizer,
            config=_deepspeed_config(config, self.dims),
            dist_init_required=False,
            mpu=self._groups,
        )
        if config.parallel.zero_stage == 0:
            stage.placed()
        if config.parallel.zero_stage == 3:
            self._keep_together()
        self._optimizer.begin(self._updated())
        self._power_sgd = self._make_power_sgd(config)
        self._compress_from = config.compression.first_step if config.compression else 0
        if config.parallel.zero_stage in (1, 2):
            self._zero._lazy_init_hp_params_optimizer_state()  # for safe_{get,set}_full_...

    def _updated(self) -> list[Tensor]:
        """What AdamW itself updates: parameters, or this rank's flat shards of them."""
        if self.parallel.zero_stage == 0:
            return list(self._parameters.values())
        if self.parallel.zero_stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    def _keep_together(self) -> None:
        """Weights outside of the modules that are sharded apart stay gathered for a whole pass:
        some are read without their module being called."""
        apart = {id(p) for m in self._stage.sharded_apart() for p in m.parameters()}
        for parameter in self._parameters.values():
            if id(parameter) not in apart:
                deepspeed.zero.register_external_parameter(self._stage, parameter)

    def step(
        self,
        parts: Sequence[object],
        step: int,
        learning_rate: float,
        accept: Callable[[float], str | None] = ACCEPT,
    ) -> Update:
        """One update over this rank's parts of the batch.

        accept: why the update must not be done, of the whole batch's loss; None if it may.
        """
        factors = self._stage.rate_factors(step)
        for group, factor in zip(self._optimizer.param_groups, factors, strict=True):
            group["lr"] = factor * learning_rate
        values: dict[str, Tensor] = {}
        # With PowerSGD at stage 0, DeepSpeed must not average before.
        own = self._power_sgd is not None and self.parallel.zero_stage == 0
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            loss, metrics = self._engine(part, step)
            with self._engine.no_sync() if own else nullcontext():
                self._engine.backward(loss)
            for name, value in {"loss": loss.detach(), **metrics}.items():
                values[name] = values.get(name, 0) + value / len(parts)
            if not last:
                self._engine.step()
        means = distributed.mean_over_ranks({name: float(v) for name, v in values.items()})
        loss_mean = means.pop("loss")
        overflow = self._broken_scales()  # whatever else is wrong, each scale moves
        skipped = accept(loss_mean) or overflow
        if self._power_sgd is not None:
            pieces = self._pieces()
            if skipped is not None:  # else the error buffers would give away what is left out
                next(iter(pieces.values())).fill_(math.nan)
            self._power_sgd.average(pieces, step >= self._compress_from)
        elif self._groups is not None:
            mean_over(list(self._pieces().values()), self._groups.replicas)
        norm = self._norm()
        if norm is not None and not math.isfinite(norm):
            skipped = skipped or NOT_FINITE
        self._optimizer.skip = skipped is not None
        self._engine.step()
        if getattr(self._zero, "overflow", False):
            skipped = skipped or NOT_FINITE
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        return Update(loss_mean, means, norm, skipped)

    @torch.no_grad()
    def evaluate(self, parts: Sequence[object], step: int) -> dict[str, float]:
        """Loss and metrics of the whole batch with the present weights, which stay."""
        self._stage.eval()
        values: dict[str, Tensor] = {}
        for part in parts:
            loss, metrics = self._engine(part, step)
            for name, value in {"loss": loss, **metrics}.items():
                values[name] = values.get(name, 0) + value / len(parts)
        self._stage.train()
        return distributed.mean_over_ranks({name: float(v) for name, v in values.items()})

    def _make_power_sgd(self, config: RunConfig) -> PowerSGD | None:
        """What averages gradients over replicas, where it is asked for and there are any."""
        compression = config.compression
        if compression is None or self.dims.dp_replicate == 1:
            return None  # nothing to exchange: a run for a cluster, tried on fewer ranks
        whole = matrices({n: getattr(p, "ds_shape", p.shape) for n, p in self._parameters.items()})
        if config.parallel.zero_stage == 0:
            return PowerSGD(
                whole, compression.approximation_rank, config.seed, None, distributed.device()
            )
        assert self._groups is not None
        shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in self._parameters.items():
            shard: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            size, columns = shard.numel(), whole[name][-1]
            rows = len(whole[name]) == 2 and size % columns == 0  # a shard of whole rows
            shapes[name] = (size // columns, columns) if rows else (size,)
        # The paper's rank is that of all shards of a matrix (see `compression.saving`).
        rank = max(1, compression.approximation_rank // self.dims.dp_shard)
        return PowerSGD(shapes, rank, config.seed, self._groups.replicas, distributed.device())

    def _pieces(self) -> dict[str, Tensor]:
        """This rank's pieces of the gradient, after the backward passes: views to be changed."""
        if self.parallel.zero_stage == 0:
            for parameter in self._parameters.values():
                if parameter.grad is None:  # not read by this loss
                    parameter.grad = torch.zeros_like(parameter)
            return {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        averaged = self._zero.averaged_gradients
        if self.parallel.zero_stage == 3:
            names = {id(p): name for name, p in self._parameters.items()}
            found = {
                names[id(p)]: piece
                for i, group in enumerate(self._zero.fp16_groups)
                for p, piece in zip(group, averaged[i], strict=True)
            }
            return {name: found[name] for name in self._parameters}
        return {f"{i}/{j}": x for i, pieces in averaged.items() for j, x in enumerate(pieces)}

    def bytes_exchanged(self) -> tuple[int, int] | None:
        """Payload of an update's exchange between replicas, as it is and uncompressed; None where
        there is none of our own."""
        if self._power_sgd is None:
            return None
        return self._power_sgd.bytes_sent, self._power_sgd.bytes_whole

    def compression_state(self) -> dict[str, Tensor]:
        """PowerSGD's error buffers by place among the shards, then name; all ranks call it.

        The first of the replicas holds them, the others nothing.
        """
        if self._power_sgd is None:
            return {}
        place = distributed.rank() % self.dims.dp_shard
        state = self._power_sgd.state()
        first = distributed.rank() < self.dims.dp_shard
        return {f"{place}/{name}": value for name, value in state.items()} if first else {}

    def load_compression_state(self, tensors: Mapping[str, Tensor]) -> bool:
        """Goes on from all ranks' `compression_state`; False where it is cut in another way, and
        the buffers begin with zeros."""
        if self._power_sgd is None:
            return True
        place = distributed.rank() % self.dims.dp_shard
        prefix = f"{place}/"
        mine = {n.removeprefix(prefix): tensors[n] for n in tensors if n.startswith(prefix)}
        try:
            self._power_sgd.load_state(mine)
        except ValueError:
            return False
        return True

    def _broken_scales(self) -> str | None:
        """Moves the gradient scales; a block whose gradients overflowed skips the update."""
        scales = self._stage.gradient_scales
        broken = distributed.largest_over_ranks([float(s.take_broken()) for s in scales])
        for scale, b in zip(scales, broken, strict=True):
            scale.update(bool(b))
        return OVERFLOW if any(broken) else None

    def _norm(self) -> float | None:
        """Of stage 0's gradients, which are averaged: the same on all ranks. ZeRO has its own."""
        if self.parallel.zero_stage:
            return None
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def weights(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Whole weights, one after the other, by name without the prefix.

        With ZeRO 3 each is gathered for its turn: every rank must go through all of them.
        """
        for name, parameter in self._parameters.items():
            if name.startswith(prefix):
                with _whole([parameter]) if self.parallel.zero_stage == 3 else nullcontext():
                    yield name[len(prefix) :], parameter.detach()

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Numbers in each weight, by name without the prefix."""
        return {
            name[len(prefix) :]: getattr(parameter, "ds_numel", parameter.numel())
            for name, parameter in self._parameters.items()
            if name.startswith(prefix)
        }

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Sets weights by name, the same whole ones on every rank; others stay."""
        for name, parameter in self._parameters.items():
            if name in weights:
                three = self.parallel.zero_stage == 3
                with _whole([parameter], set_by=0) if three else nullcontext():
                    parameter.copy_(weights[name])
        if self.parallel.zero_stage:
            self._zero.refresh_fp32_params()

    def _shard(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's part of a whole value as ZeRO 3 cuts it: flat, zeros behind the end."""
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        first = distributed.rank() % self.dims.dp_shard * size
        shard = torch.zeros(size)
        here = value.flatten()[first : first + size]
        shard[: len(here)] = here
        return shard.to(distributed.device())

    def reset_optimizer(self) -> None:
        """Forgets the moments, after weights were set from outside."""
        for state in self._optimizer.state.values():
            for value in state.values():
                value.zero_()

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """Whole moments, one after the other, named `<parameter>/<moment>`; as `weights`."""
        for name, parameter in self._parameters.items():
            for key in MOMENTS:
                if self.parallel.zero_stage:
                    value = safe_get_full_optimizer_state(parameter, key)
                else:
                    value = self._optimizer.state[parameter][key]
                yield f"{name}/{key}", value.detach()

    def updates_done(self) -> int:
        """AdamW's own count, which its bias correction reads."""
        return int(next(iter(self._optimizer.state.values()))["step"])

    @torch.no_grad()
    def load_moments(self, moments: Mapping[str, Tensor], updates: int) -> None:
        """Goes on from what `moments` and `updates_done` returned."""
        for name, parameter in self._parameters.items():
            for key in MOMENTS:
                value = moments[f"{name}/{key}"]
                if self.parallel.zero_stage == 3:
                    # Not its way to set whole values, which has no room for the shards' padding.
                    safe_set_local_optimizer_state(parameter, self._shard(parameter, value), key)
                elif self.parallel.zero_stage:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
                else:
                    self._optimizer.state[parameter][key].copy_(value)
        for state in self._optimizer.state.values():
            state["step"].fill_(updates)


def _groups(settings: ParallelSettings, dims: ParallelDims) -> ShardGroups | None:
    if settings.zero_stage == 0 or dims.dp_replicate == 1:
        return None
    return ShardGroups(dims.dp_shard)


def _whole(
    parameters: list[nn.Parameter], set_by: int | None = None
) -> AbstractContextManager[object]:
    """Gathers weights that ZeRO 3 has sharded; what rank `set_by` writes is kept."""
    context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
        parameters, modifier_rank=set_by
    )
    return context


def _deepspeed_config(config: RunConfig, dims: ParallelDims) -> dict[str, Any]:
    parallel = config.parallel
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    if parallel.zero_stage == 3:
        # All weights are sharded, small ones too: what stays whole is named in `_keep_together`.
        zero |= {"stage3_param_persistence_threshold": 0}
    if parallel.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if parallel.offload == "weights":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    replicas = dims.dp_replicate if parallel.zero_stage else 1  # that DeepSpeed knows nothing of
    return {
        "train_batch_size": config.batch_size // replicas,
        "train_micro_batch_size_per_gpu": dims.micro_batch,
        "gradient_accumulation_steps": dims.grad_accum_steps,
        "gradient_clipping": config.optimizer.clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # a subclass of AdamW, whose update is AdamW's
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }

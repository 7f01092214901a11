"""DeepSpeed, and the only file that imports it: processes, gradients, optimizer, sharded state.

ZeRO shards the moments (stage 1), the gradients (2) and the weights (3) over a group of
`parallel.dp_shard` ranks. The groups are replicas of one another, whose gradients are averaged by
`gradient_exchange`. At every stage, state is read and written unsharded, one tensor after the
other, so that a checkpoint fits any number of ranks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle1.common.hardware import default_device
from dalle1.training import distributed
from dalle1.training.config import ParallelSettings, RunConfig
from dalle1.training.gradient_clipping import clip_by_part
from dalle1.training.gradient_exchange import GradientExchange
from dalle1.training.launcher import deepspeed_environment, environment, read_launch
from dalle1.training.loss_guard import NOT_FINITE, OVERFLOW, OVERFLOW_AT_LOWEST
from dalle1.training.optimizer import MOMENTS, TrainingOptimizer, takes_muon
from dalle1.training.parallel import ParallelDims, ShardGroups
from dalle1.training.stages.base import ParameterGroup, Stage

ACCELERATOR = "DS_ACCELERATOR"  # environment: the accelerator that the user wants of DeepSpeed
NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"  # environment: torch counts GPUs without using them

# DeepSpeed chooses its accelerator while it is imported. A GPU that is used by then could not be
# used by processes forked later.
with (
    environment(**{NVML: os.environ.get(NVML, "1")}),
    environment(**{ACCELERATOR: default_device().type}),
):
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.utils import (
        safe_get_full_optimizer_state,
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )


def start_processes(timeout: float = 1800.0, start_timeout: float = 600.0) -> tuple[int, int]:
    """Joins the launcher's processes, or starts as the only one.

    Args:
        timeout: seconds that ranks wait for one another in collectives, in every group.
        start_timeout: seconds until all ranks must have started.

    Returns:
        This process's rank, and the world size.

    Raises:
        RanksLost: not all ranks have started in time.
        ValueError: the launcher's variables, or the user's for DeepSpeed, do not fit.
    """
    _choose_accelerator()
    if not dist.is_initialized():
        launch = read_launch()
        # DeepSpeed's op for CPUs of one machine takes a minute to compile, waits for ever for a
        # rank that has died, and hangs on the lock that a killed compilation leaves behind.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        distributed.use_gpu(launch)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        wait = timedelta(seconds=timeout)
        # DeepSpeed makes groups of its own without asking for ours.
        dist.distributed_c10d.default_pg_timeout = wait
        dist.distributed_c10d.default_pg_nccl_timeout = wait  # type: ignore[attr-defined]
        dist.init_process_group(
            backend,
            store=distributed.meet(launch, start_timeout),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=wait,
        )
        with deepspeed_environment():
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return distributed.rank(), distributed.world_size()


def _choose_accelerator() -> None:
    """Makes DeepSpeed use what torch finds; ValueError where the user told it otherwise."""
    found = default_device().type
    asked = os.environ.get(ACCELERATOR, found)
    if asked != found:
        hide = "" if found == "cpu" else ", or hide the GPUs with CUDA_VISIBLE_DEVICES="
        raise ValueError(
            f"{ACCELERATOR}: expected {found!r}, which is what torch finds here, got {asked!r}; "
            f"unset it{hide}"
        )
    if get_accelerator().device_name() != found:  # DeepSpeed was imported before this module
        set_accelerator(CUDA_Accelerator() if found == "cuda" else CPU_Accelerator())


@dataclass
class Update:
    """The result of one update, the same on all ranks."""

    loss: float  # of the global batch
    metrics: dict[str, float]  # the stage's, of the global batch
    gradient_norm: float  # before clipping
    skipped: str | None  # why the update was skipped; None if it was done


def make_zero_sharding(config: RunConfig) -> ZeroSharding | None:
    """What shards the weights as they are made; None below ZeRO stage 3, which keeps them whole."""
    if config.parallel.zero_stage < 3:
        return None
    return ZeroSharding(config)


class ZeroSharding:
    """The `stages.base.Sharding` of DeepSpeed's ZeRO 3."""

    def __init__(self, config: RunConfig) -> None:
        self._dims = ParallelDims(config.batch_size, config.parallel, distributed.world_size())
        self._config = config

    def init_context(self) -> AbstractContextManager[object]:
        groups = _shard_groups(self._config.parallel, self._dims)
        with deepspeed_environment():
            context: AbstractContextManager[object] = deepspeed.zero.Init(
                data_parallel_group=groups.get_data_parallel_group() if groups else None,
                config_dict_or_path=_deepspeed_config(self._config, self._dims),
                mpu=groups,
            )
        return context

    def unsharded(self, parameter: nn.Parameter) -> AbstractContextManager[object]:
        return _unsharded([parameter], set_by=0)


class Engine:
    """A stage in training: its gradients, its optimizer, and the state of both.

    Raises:
        ValueError: the batch does not divide over the ranks, see `ParallelDims`.
    """

    @deepspeed_environment()
    def __init__(self, stage: Stage, config: RunConfig) -> None:
        self.settings, self.parallel = config.optimizer, config.parallel
        self.dims = ParallelDims(config.batch_size, config.parallel, distributed.world_size())
        self._stage = stage
        self._parameters = dict(stage.named_parameters())
        self._trained = {n: p for n, p in self._parameters.items() if p.requires_grad}
        self._shard_groups = _shard_groups(config.parallel, self.dims)
        groups = stage.parameter_groups()
        # Of each of the optimizer's groups: that of the stage, whose factor it has; see `step`. One
        # whose parameters are all frozen is left out.
        self._groups, trained = [], []
        for i, group in enumerate(groups):
            for found in self._optimizer_groups(group):
                self._groups.append(i)
                trained.append(found)
        if config.optimizer.kind == "muon" and not any(group["matrices"] for group in trained):
            raise ValueError(
                "optimizer.kind: muon trains matrices of residual blocks, and of those expected at "
                f"least one in stage {config.stage!r}, got none; set it to adamw"
            )
        self._part = {name: group.part for group in groups for name in group.names}
        self._parts = [groups[i].part for i in self._groups]
        # DeepSpeed clips all gradients by one norm.
        clips = config.optimizer.clip_norm if len(set(self._parts)) == 1 else None
        self._optimizer = TrainingOptimizer(trained, config.optimizer)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=stage,
            optimizer=self._optimizer,
            config=_deepspeed_config(config, self.dims, clips),
            dist_init_required=False,
            mpu=self._shard_groups,
        )
        if config.parallel.zero_stage == 0:
            stage.after_move_to_device()
        if config.parallel.zero_stage == 3:
            self._keep_gathered()
        saved = stage.state_dict(keep_vars=True)
        # Running statistics and the like: state that is no weight, the same on all ranks.
        self.buffers = {n: x for n, x in saved.items() if n not in self._parameters}
        self._optimizer.init_state(self._optimized_tensors())
        self.exchange = GradientExchange(config, self.dims, self._trained, self._shard_groups)
        if config.parallel.zero_stage in (1, 2):
            self._zero._lazy_init_hp_params_optimizer_state()  # for safe_{get,set}_full_...

    def _optimizer_groups(self, group: ParameterGroup) -> list[dict[str, Any]]:
        """The trained parameters of a group, as torch's optimizers take them; Muon's apart."""
        muon = self.settings.kind == "muon"
        parts: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for name in group.names:
            if name in self._trained:
                parameter = self._trained[name]
                parts[muon and takes_muon(name, parameter.shape)].append(parameter)
        return [
            {
                "params": parameters,
                "weight_decay": self.settings.weight_decay if group.decayed else 0.0,
                "maximum": group.maximum,
                "matrices": matrices,
            }
            for matrices, parameters in parts.items()
            if parameters
        ]

    def _optimized_tensors(self) -> list[Tensor]:
        """What the optimizer itself updates: the parameters, or this rank's flat shards of them."""
        if self.parallel.zero_stage == 0:
            return list(self._trained.values())
        if self.parallel.zero_stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    def _keep_gathered(self) -> None:
        """Tells DeepSpeed to keep most weights gathered for a full pass under ZeRO 3.

        These are all weights outside of `modules_gathered_in_turn`. Some of them are read without
        a call of their module, which DeepSpeed would not notice.
        """
        in_turn = {id(p) for m in self._stage.modules_gathered_in_turn() for p in m.parameters()}
        for parameter in self._parameters.values():
            if id(parameter) not in in_turn:
                deepspeed.zero.register_external_parameter(self._stage, parameter)

    @deepspeed_environment()
    def step(
        self,
        micro_batches: Sequence[object],
        step: int,
        learning_rate: float,
        reason_to_skip: Callable[[float], str | None] = lambda loss: None,
    ) -> Update:
        """One update over this rank's micro-batches; all ranks call it together.

        Args:
            micro_batches: as the stage made them, of the same number on all ranks.
            step: number of the update, counted from 0.
            learning_rate: before the factors of the stage's parameter groups.
            reason_to_skip: given the loss of the global batch, why the update must be skipped, or
                None. It must give the same answer on all ranks.
        """
        factors = self._stage.learning_rate_factors(step)
        for group, i in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["lr"] = factors[i] * learning_rate
        before = {name: buffer.clone() for name, buffer in self.buffers.items()}
        metrics = self._accumulate_gradients(micro_batches, step)
        loss = metrics.pop("loss")
        overflow = self._update_gradient_scales()  # whatever else is wrong, each scale moves
        skipped = reason_to_skip(loss) or overflow
        if self.exchange.needed:
            self.exchange.average(self._gradients(), step, skipped is not None)
        norm = self._gradient_norm()
        if len(set(self._parts)) > 1:
            norms = self._clip_parts()
            metrics |= {f"gradient_norm/{part}": value for part, value in norms.items()}
            norm = math.hypot(*norms.values())
        if norm is not None and not math.isfinite(norm):
            skipped = skipped or NOT_FINITE
        self._optimizer.skip = skipped is not None
        self._engine.step()
        if getattr(self._zero, "overflow", False):
            skipped = skipped or NOT_FINITE
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        if skipped is not None:
            self.load_buffers(before)
        return Update(loss, metrics, norm, skipped)

    def _accumulate_gradients(self, micro_batches: Sequence[object], step: int) -> dict[str, float]:
        """Backward passes over the micro-batches; loss and metrics of the global batch."""
        sums: dict[str, Tensor] = {}
        for i, micro_batch in enumerate(micro_batches):
            loss, metrics = self._engine(micro_batch, step)
            alone = self._exchanges_nothing and len(micro_batches) == 1
            no_sync = alone or self.exchange.replaces_deepspeed
            with self._engine.no_sync() if no_sync else nullcontext():
                self._engine.backward(loss)
            _add_share(sums, {"loss": loss.detach(), **metrics}, len(micro_batches))
            if i < len(micro_batches) - 1:
                self._engine.step()  # counts the pass, and updates nothing
        return distributed.mean_over_ranks({name: float(v) for name, v in sums.items()})

    @torch.no_grad()
    @deepspeed_environment()
    def evaluate(self, micro_batches: Sequence[object], step: int) -> dict[str, float]:
        """Loss and metrics of the global batch with the present weights, which do not change."""
        self._stage.eval()
        sums: dict[str, Tensor] = {}
        for micro_batch in micro_batches:
            loss, metrics = self._engine(micro_batch, step)
            _add_share(sums, {"loss": loss, **metrics}, len(micro_batches))
        self._stage.train()
        return distributed.mean_over_ranks({name: float(v) for name, v in sums.items()})

    @property
    def _exchanges_nothing(self) -> bool:
        """Whether DeepSpeed may leave the gradients as they are: a rank alone averages none."""
        return distributed.world_size() == 1 and self.parallel.zero_stage == 0

    def _gradients(self) -> dict[str, Tensor]:
        """This rank's gradients or shards of them, after the backward passes: views to change.

        Their names are those of the parameters, or places in ZeRO's groups at stages 1 and 2.
        """
        if self.parallel.zero_stage == 0:
            for parameter in self._trained.values():
                if parameter.grad is None:  # not read by this loss
                    parameter.grad = torch.zeros_like(parameter)
            return {name: p.grad for name, p in self._trained.items() if p.grad is not None}
        averaged = self._zero.averaged_gradients
        if self.parallel.zero_stage == 3:
            names = {id(p): name for name, p in self._trained.items()}
            found = {
                names[id(p)]: shard
                for i, group in enumerate(self._zero.fp16_groups)
                for p, shard in zip(group, averaged[i], strict=True)
            }
            return {name: found[name] for name in self._trained}
        return {f"{i}/{j}": x for i, shards in averaged.items() for j, x in enumerate(shards)}

    def _update_gradient_scales(self) -> str | None:
        """Moves the gradient scales (section 2.4); why the update must be skipped, or None."""
        scales = self._stage.gradient_scales
        broken = distributed.max_over_ranks([float(s.take_broken()) for s in scales])
        at_lowest = [s.update(bool(b)) for s, b in zip(scales, broken, strict=True)]
        if any(at_lowest):
            return OVERFLOW_AT_LOWEST
        return OVERFLOW if any(broken) else None

    def _gradient_norm(self) -> float | None:
        """At stage 0, where gradients are averaged by now; None where ZeRO finds it later."""
        if self.parallel.zero_stage:
            return None
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _clip_parts(self) -> dict[str, float]:
        """Clips the gradients of each part by their own norm; the norms before, by part."""
        parts: dict[str, list[Tensor]] = {part: [] for part in self._parts}
        for name, gradient in self._gradients().items():
            # At ZeRO stages 1 and 2 a name is a place in one of the optimizer's groups.
            in_groups = self.parallel.zero_stage in (1, 2)
            group = name.partition("/")[0]
            parts[self._parts[int(group)] if in_groups else self._part[name]].append(gradient)
        return clip_by_part(parts, self.settings.clip_norm, self._sum_over_shards)

    def _sum_over_shards(self, values: Tensor) -> Tensor:
        """The sum over the ranks that share one copy of the state."""
        if self.parallel.zero_stage and distributed.world_size() > 1:
            group = self._shard_groups
            dist.all_reduce(values, group=group.get_data_parallel_group() if group else None)
        return values

    @torch.no_grad()
    def load_buffers(self, values: Mapping[str, Tensor]) -> None:
        """Sets the buffers; ValueError where a checkpoint does not hold them all."""
        for name, buffer in self.buffers.items():
            if name not in values:
                raise ValueError(f"checkpoint: expected the buffer {name}, got none of this name")
            buffer.copy_(values[name])

    def weight(self, name: str) -> Tensor:
        """A copy of one unsharded weight; under ZeRO 3 all ranks must call it together."""
        parameter = self._parameters[name]
        with _unsharded([parameter]) if self.parallel.zero_stage == 3 else nullcontext():
            return parameter.detach().clone()

    def weights(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Unsharded weights, one after the other, by name without the prefix.

        Under ZeRO 3 each is gathered for its turn only, so every rank must go through all of them.
        """
        for name, parameter in self._parameters.items():
            if name.startswith(prefix):
                with _unsharded([parameter]) if self.parallel.zero_stage == 3 else nullcontext():
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
        """Sets the weights that are named, unsharded and the same on every rank; others stay."""
        for name, parameter in self._parameters.items():
            if name in weights:
                three = self.parallel.zero_stage == 3
                with _unsharded([parameter], set_by=0) if three else nullcontext():
                    parameter.copy_(weights[name])
        if self.parallel.zero_stage:
            self._zero.refresh_fp32_params()

    def _shard(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's shard of an unsharded value, as ZeRO 3 has it: flat, padded with zeros."""
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        first = distributed.rank() % self.dims.dp_shard * size
        shard = torch.zeros(size)
        here = value.flatten()[first : first + size]
        shard[: len(here)] = here
        return shard.to(distributed.device())

    def reset_optimizer(self) -> None:
        """Sets the moments to zero, after the weights were replaced."""
        for state in self._optimizer.state.values():
            for value in state.values():
                value.zero_()

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """Unsharded moments of what is trained, named `<parameter>/<moment>`; see `weights`."""
        for name, parameter in self._trained.items():
            for key in self._moments_of(parameter):
                if self.parallel.zero_stage:
                    value = safe_get_full_optimizer_state(parameter, key)
                else:
                    value = self._optimizer.state[parameter][key]
                yield f"{name}/{key}", value.detach()

    def _moments_of(self, parameter: nn.Parameter) -> Sequence[str]:
        """The names of what the optimizer keeps of a parameter."""
        if self.parallel.zero_stage:
            return MOMENTS
        return [key for key in self._optimizer.state[parameter] if key != "step"]

    def updates_done(self) -> int:
        """The optimizer's own count, which AdamW's bias correction reads."""
        return int(next(iter(self._optimizer.state.values()))["step"])

    @torch.no_grad()
    def load_moments(self, moments: Mapping[str, Tensor], updates: int) -> None:
        """Restores what `moments` and `updates_done` returned."""
        for name, parameter in self._trained.items():
            for key in self._moments_of(parameter):
                value = moments[f"{name}/{key}"]
                if self.parallel.zero_stage == 3:
                    # DeepSpeed's way to set full values has no room for the shards' padding.
                    safe_set_local_optimizer_state(parameter, self._shard(parameter, value), key)
                elif self.parallel.zero_stage:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
                else:
                    self._optimizer.state[parameter][key].copy_(value)
        for state in self._optimizer.state.values():
            state["step"].fill_(updates)


def _shard_groups(settings: ParallelSettings, dims: ParallelDims) -> ShardGroups | None:
    if settings.zero_stage == 0 or dims.dp_replicate == 1:
        return None
    return ShardGroups(dims.dp_shard)


def _add_share(sums: dict[str, Tensor], values: Mapping[str, Tensor], count: int) -> None:
    """Adds one of `count` equal parts of a mean to the sums."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value / count


def _unsharded(
    parameters: list[nn.Parameter], set_by: int | None = None
) -> AbstractContextManager[object]:
    """Gathers weights that ZeRO 3 has sharded; what rank `set_by` writes is kept."""
    context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
        parameters, modifier_rank=set_by
    )
    return context


def _deepspeed_config(
    config: RunConfig, dims: ParallelDims, clip_norm: float | None = None
) -> dict[str, Any]:
    parallel = config.parallel
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    if parallel.zero_stage == 3:
        # All weights are sharded, small ones too; `_keep_gathered` says what stays gathered.
        zero |= {"stage3_param_persistence_threshold": 0}
    if parallel.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if parallel.offload == "weights":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    replicas = dims.dp_replicate if parallel.zero_stage else 1  # which DeepSpeed is not told of
    return {
        "train_batch_size": config.batch_size // replicas,
        "train_micro_batch_size_per_gpu": dims.micro_batch,
        "gradient_accumulation_steps": dims.grad_accum_steps,
        "gradient_clipping": clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # a subclass of AdamW, whose update is AdamW's
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }

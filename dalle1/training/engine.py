"""DeepSpeed, and the only file that imports it: processes, gradients, optimiser.

Weights stay whole on every rank and gradients are averaged over the ranks (ZeRO stage 0).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.path.exists("/dev/nvidia0") else "cpu")

import deepspeed
import torch
from torch import Tensor

from dalle1.training.config import OptimiserSettings
from dalle1.training.stages import Stage

LONG = timedelta(days=30)  # that one rank may be behind another outside of training


def start_processes(reduces: bool = True) -> tuple[int, int]:
    """Joins the launcher's processes, or starts as the only one; returns (rank, ranks).

    reduces: whether the ranks will add up much, as training does; if not, CPUs are spared the
    minute of compiling the op for it.
    """
    if not torch.distributed.is_initialized():
        if "RANK" not in os.environ:  # plain `python launch/train.py`: a group of one
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = str(port)
        if os.environ["WORLD_SIZE"] == "1" or not reduces:
            # A group of one shares memory with nobody. Spared too: the silent wait for a lock that
            # a killed compilation leaves behind.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def barrier() -> None:
    """Waits for all ranks."""
    torch.distributed.barrier()


def meeting() -> Callable[[], None]:
    """Made by all ranks together; a call waits until every rank has called, however long its work
    takes, and a rank may leave right after."""
    if torch.distributed.get_world_size() == 1:
        return lambda: None
    ranks = torch.distributed.new_group(backend="gloo", timeout=LONG)
    # The first rank hears from each and answers; an ordinary barrier breaks when one leaves early.
    return lambda: torch.distributed.monitored_barrier(ranks, timeout=LONG)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank; the same answer on all."""
    if torch.distributed.get_world_size() == 1:
        return flag
    device = "cuda" if torch.cuda.is_available() else "cpu"
    value = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return bool(value.item())


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Each value averaged over the ranks, which all give the same names."""
    if torch.distributed.get_world_size() == 1:
        return values
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    mean = (tensor / torch.distributed.get_world_size()).tolist()
    return dict(zip(values, mean, strict=True))


class Engine:
    """A module whose forward gives (loss, metrics), its gradients and AdamW.

    Raises ValueError when batch_size is no multiple of the ranks.
    """

    def __init__(
        self, module: Stage, settings: OptimiserSettings, batch_size: int, ranks: int
    ) -> None:
        if batch_size % ranks:
            raise ValueError(f"batch_size {batch_size} must be a multiple of the {ranks} ranks")
        self.settings = settings
        self._stage = module
        self._parameters = dict(module.named_parameters())
        groups = [{"params": [self._parameters[n] for n in g]} for g in module.parameter_groups()]
        optimiser = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        config: dict[str, Any] = {
            "train_batch_size": batch_size,
            "train_micro_batch_size_per_gpu": batch_size // ranks,
            "gradient_clipping": settings.clip_norm or 0.0,
            "zero_optimization": {"stage": 0},
            "steps_per_print": 2**31,
        }
        self._engine, self.optimiser, _, _ = deepspeed.initialize(
            model=module, optimizer=optimiser, config=config, dist_init_required=False
        )
        module.placed()

    def step(self, batch: Any, step: int, learning_rate: float) -> tuple[Tensor, dict[str, Tensor]]:
        """One update; the loss and the metrics of this rank, detached."""
        factors = self._stage.rate_factors(step)
        for group, factor in zip(self.optimiser.param_groups, factors, strict=True):
            group["lr"] = factor * learning_rate
        loss, metrics = self._engine(batch, step)
        self._engine.backward(loss)
        self._engine.step()
        if self.settings.clip_variance is not None:
            for state in self.optimiser.state.values():
                state["exp_avg_sq"].clamp_(max=self.settings.clip_variance)  # appendix B.2
        return loss.detach(), metrics

    def reset_optimiser(self) -> None:
        """Forgets the moments, after weights were set from outside."""
        self.optimiser.state.clear()

    def optimiser_state(self) -> dict[str, Tensor]:
        """Moments and counts, named `<parameter>/<moment>`."""
        return {
            f"{name}/{key}": value.detach()
            for name, parameter in self._parameters.items()
            for key, value in self.optimiser.state.get(parameter, {}).items()
        }

    def load_optimiser_state(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from what `optimiser_state` returned."""
        self.reset_optimiser()
        for path, value in tensors.items():
            name, key = path.rsplit("/", 1)
            parameter = self._parameters[name]
            state = self.optimiser.state[parameter]
            # In the parameter's own memory format: the fused update walks both side by side.
            like = parameter if value.shape == parameter.shape else value
            state[key] = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
            state[key].copy_(value)

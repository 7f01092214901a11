"""AdamW as the engine needs it: over whole parameters or over ZeRO's flat shards of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dalle1.training.config import OptimizerSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer(torch.optim.AdamW):
    """AdamW that leaves updates out when told so, and bounds the running variance (B.2)."""

    skip = False

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerSettings) -> None:
        self.bound = settings.clip_variance
        super().__init__(
            groups,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def begin(self, parameters: Iterable[Tensor]) -> None:
        """Moments of zero, so that they can be read and written before the first update."""
        for parameter in parameters:
            # In the parameter's own memory format: the fused update walks both side by side.
            state = {key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}
            self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **state}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.skip:
            return
        super().step()
        if self.bound is not None:
            for group in self.param_groups:  # ZeRO steps one group after the other
                for parameter in group["params"]:
                    state = self.state.get(parameter)
                    if state:
                        state["exp_avg_sq"].clamp_(max=self.bound)

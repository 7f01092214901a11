"""AdamW as the engine needs it, over full parameters or over ZeRO's flat shards of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dalle1.training.config import OptimizerSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingOptimizer(torch.optim.AdamW):
    """AdamW that can skip an update, and that bounds the running variance (appendix B.2).

    The parameters of a group with a `maximum` are clamped to it after each update. They are what
    AdamW itself updates, under ZeRO this rank's flat shards, so that all stages clamp alike.
    """

    skip = False  # whether `step` does nothing; the engine sets it before each update

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerSettings) -> None:
        self.max_variance = settings.clip_variance
        super().__init__(
            groups,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def init_state(self, parameters: Iterable[Tensor]) -> None:
        """Sets the moments to zero, so that they can be read and written before the first update.

        parameters: what AdamW itself updates, which under ZeRO are this rank's flat shards.
        """
        for parameter in parameters:
            # In the parameter's own memory format: the fused update walks through both together.
            state = {key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}
            self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **state}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.skip:
            return
        super().step()
        for group in self.param_groups:  # ZeRO steps one group after the other
            for parameter in group["params"]:
                if group.get("maximum") is not None:
                    parameter.clamp_(max=group["maximum"])
                state = self.state.get(parameter)
                if state and self.max_variance is not None:
                    state["exp_avg_sq"].clamp_(max=self.max_variance)

"""AdamW as the engine needs it, over full parameters or over ZeRO's flat shards of them; or Muon.

Muon (K. Jordan, 2024, kellerjordan.github.io/posts/muon) updates a matrix by its momentum with all
singular values brought near 1. torch's implementation is used, with the scale of Liu et al. (2025,
arXiv 2502.16982): an update has the size that AdamW's has, so that learning rate and weight decay
are the same for both. docs/training.md compares them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dalle1.training.config import OptimizerSettings
from dalle1.training.powersgd import compressible

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
MOMENTUM = ("momentum_buffer",)  # of Muon


def takes_muon(name: str, shape: Sequence[int]) -> bool:
    """Whether Muon, where it is chosen, updates a parameter: a matrix inside of a residual block.

    Embeddings, heads and positions are outside of the blocks.
    """
    return len(shape) == 2 and compressible(name, shape)


class TrainingOptimizer(torch.optim.AdamW):
    """AdamW that can skip an update, and that bounds the running variance (appendix B.2).

    The parameters of a group with a `maximum` are clamped to it after each update. They are what
    AdamW itself updates, under ZeRO this rank's flat shards, so that all stages clamp alike. Groups
    with `matrices` set are Muon's; their parameters have two dimensions.
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
        # It reads the same groups, which hold what is set later, such as the learning rate.
        self._muon = (
            torch.optim.Muon(
                self._matrices,
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                momentum=settings.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            if self._matrices
            else None
        )
        if self._muon is not None:
            self._muon.state = self.state

    @property
    def _matrices(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group.get("matrices")]

    def init_state(self, parameters: Iterable[Tensor]) -> None:
        """Sets the moments to zero, so that they can be read and written before the first update.

        parameters: what the optimizer itself updates, under ZeRO this rank's flat shards.
        """
        matrices = {parameter for group in self._matrices for parameter in group["params"]}
        for parameter in parameters:
            keys = MOMENTUM if parameter in matrices else MOMENTS
            # In the parameter's own memory format: the fused update walks through both together.
            state = {key: torch.zeros_like(parameter, requires_grad=False) for key in keys}
            self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **state}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.skip:
            return
        groups, self.param_groups = (
            self.param_groups,
            [group for group in self.param_groups if not group.get("matrices")],
        )
        try:
            super().step()
        finally:
            self.param_groups = groups
        if self._muon is not None:
            self._muon.step()
            for group in self._matrices:
                for parameter in group["params"]:
                    self.state[parameter]["step"] += 1  # which AdamW counts for its own
        for group in self.param_groups:  # ZeRO steps one group after the other
            for parameter in group["params"]:
                if group.get("maximum") is not None:
                    parameter.clamp_(max=group["maximum"])
                state = self.state.get(parameter, {})
                if self.max_variance is not None and "exp_avg_sq" in state:
                    state["exp_avg_sq"].clamp_(max=self.max_variance)

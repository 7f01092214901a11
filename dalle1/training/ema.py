"""The iterate average that is used in place of the last weights (appendices A.2 and B.2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """average <- decay * average + (1 - decay) * weights, once every `every` updates.

    Kept on the CPU in float32, as the paper does for the transformer.
    """

    def __init__(self, module: nn.Module, decay: float, every: int = 1) -> None:
        self.decay, self.every = decay, every
        self.average = self._snapshot(module)

    @staticmethod
    def _snapshot(module: nn.Module) -> dict[str, Tensor]:
        # A copy even on the CPU, where .to() would alias the weights.
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True)
            for name, parameter in module.named_parameters()
        }

    def reset(self, module: nn.Module) -> None:
        """Starts the average anew from the module's weights."""
        self.average = self._snapshot(module)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Call after update number `step` (0, 1, ...)."""
        if (step + 1) % self.every:
            return
        for name, parameter in module.named_parameters():
            weights = parameter.detach().to("cpu", torch.float32)
            self.average[name].lerp_(weights, 1 - self.decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[nn.Module]:
        """The module with the average as its weights, in eval mode; both are put back after."""
        training = module.training
        held = {name: p.detach().clone() for name, p in module.named_parameters()}
        try:
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    parameter.copy_(self.average[name])
            module.eval()
            yield module
        finally:
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    parameter.copy_(held[name])
            module.train(training)

"""Layers of residual blocks, and how they are run in training: checkpointed, or in 16 bits.

Dimensions: b batch, n positions, w width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle1.transformer.gradient_scale import GradientScale


class ResidualLayer(nn.Module, ABC):
    """Blocks, each added to what it reads.

    The sum stays in 32 bits. With `narrow` the blocks compute in 16 bits: bfloat16 as it is,
    float16 with a gradient scale for each (2.4), once `scale_gradients` was called.
    """

    def __init__(self, checkpointing: bool) -> None:
        """checkpointing: keep each block's inputs alone, and compute the rest twice."""
        super().__init__()
        self.narrow: torch.dtype | None = None
        self.scales: list[GradientScale] = []
        self.checkpointing = checkpointing

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, in the order that they are run in."""

    def scale_gradients(self, workers: int) -> list[GradientScale]:
        """The blocks in float16 from now on, with scales for so many data-parallel workers."""
        self.narrow = torch.float16
        self.scales = [GradientScale(block, workers) for block in self.blocks]
        return self.scales

    def add(self, i: int, x: Tensor, *context: Tensor | None) -> Tensor:
        """x [b, n, w] plus what the i-th block makes of it, and of what else the block reads."""
        run = self._narrowed if self.narrow else self._plain
        if self.checkpointing and torch.is_grad_enabled():
            y = checkpoint(run, i, x, *context, use_reentrant=False, preserve_rng_state=False)
        else:
            y = run(i, x, *context)
        total: Tensor = x + y
        return total

    def _narrowed(self, i: int, x: Tensor, *context: Tensor | None) -> Tensor:
        block = self.blocks[i]
        if self.scales:
            return self.scales[i].run(block, x, *context)
        with torch.autocast(x.device.type, self.narrow):
            y: Tensor = block(x, *context)
        return y

    def _plain(self, i: int, x: Tensor, *context: Tensor | None) -> Tensor:
        y: Tensor = self.blocks[i](x, *context)
        return y

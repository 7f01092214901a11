"""One gradient scale for each residual block, as the paper trained in 16 bits (2.4, appendix D).

The identity path, the weights, their gradients and moments stay in 32 bits. A block computes in
16: on the way back the gradient that comes in is multiplied by the block's scale, values that are
not finite are set to zero, and what leaves the block is divided by the scale before it joins the
identity path. So gradients that shrink from block to block never leave the narrow range of 16 bits.

Dimensions: any shapes; states are [b, n, w].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

FIRST = 2.0**13  # times the data-parallel workers M, as are the bounds
LOWEST, HIGHEST = 2.0**7, 2.0**24
GROWTH = 2.0 ** (1 / 1000)  # after each update with finite gradients
DIVISOR = math.sqrt(2)
PATIENCE = 125  # updates from one division to the next, at least


class _Enter(torch.autograd.Function):
    """Into the block; backward out of the scale, onto the identity path."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, broken: list[Tensor]) -> Tensor:
        ctx.scale, ctx.broken = scale, broken
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # What came in was finite: an overflow here is the block's own.
        ctx.broken.append(~gradient.isfinite().all())
        return finite(gradient.float()) / ctx.scale, None, None


class _Leave(torch.autograd.Function):
    """Out of the block, to 32 bits; backward into the scale and to 16."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: float, broken: list[Tensor]) -> Tensor:
        ctx.scale, ctx.dtype, ctx.broken = scale, y.dtype, broken
        return y.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # Filtered after the cast: what is too large for 16 bits is infinite only there.
        scaled = (gradient * ctx.scale).to(ctx.dtype)
        # What 16 bits do not hold even without the scale was handed down, and is filtered alone.
        own = gradient.to(ctx.dtype).isfinite() & ~scaled.isfinite()
        ctx.broken.append(own.any())
        return finite(scaled), None, None


def finite(x: Tensor) -> Tensor:
    """The filter: values that are not finite become 0."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


class GradientScale:
    """The scale of one residual block, which computes in 16 bits.

    `value` is in the paper's units, in which the loss is divided by the whole batch. Here each of
    the M workers divides by its own share and gradients are averaged, so they are M times as large
    on the way back and are multiplied by value / M.
    """

    def __init__(
        self, block: nn.Module, workers: int = 1, dtype: torch.dtype = torch.float16
    ) -> None:
        """block: its residual path, called without the identity; workers: M."""
        self.workers, self.dtype = workers, dtype
        self.value = workers * FIRST
        self.rest = 0  # updates until the next division may be
        self._broken: list[Tensor] = []  # read once an update: a look at each would stall a GPU
        for parameter in block.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._unscaled)

    def _unscaled(self, gradient: Tensor) -> Tensor:
        self._broken.append(~gradient.isfinite().all())
        return gradient / (self.value / self.workers)

    def run(self, block: Callable[..., Tensor], x: Tensor, *context: Tensor | None) -> Tensor:
        """block(x, *context) of 32-bit states, the block in 16 bits; norms and softmax stay in 32.

        context: states of elsewhere, whose gradients leave by the scale too, masks, or None.
        """
        scale = self.value / self.workers
        inside = [
            _Enter.apply(states, scale, self._broken)  # type: ignore[no-untyped-call]
            if states is not None and states.is_floating_point()
            else states
            for states in (x, *context)
        ]
        with torch.autocast(x.device.type, self.dtype):
            y = block(*inside)
        outside: Tensor = _Leave.apply(y, scale, self._broken)  # type: ignore[no-untyped-call]
        return outside

    def take_broken(self) -> bool:
        """Whether the block's gradients left 16 bits by its scale, or a weight's gradient was not
        finite, since the last call, on this rank."""
        broken = bool(torch.stack(self._broken).any()) if self._broken else False
        self._broken.clear()
        return broken

    def update(self, broken: bool) -> bool:
        """After an update's backward passes.

        Args:
            broken: on any rank, when the update is skipped.

        Returns:
            Whether the block is broken at the lowest scale, which can be divided no more.
        """
        lowest, highest = self.workers * LOWEST, self.workers * HIGHEST
        self.rest = max(0, self.rest - 1)
        at_lowest = False
        if not broken:
            self.value *= GROWTH
        elif self.rest == 0:
            at_lowest = self.value <= lowest
            self.value /= DIVISOR
            self.rest = PATIENCE
        self.value = min(max(self.value, lowest), highest)
        return at_lowest


def scales_state(scales: Sequence[GradientScale]) -> list[list[float]]:
    """Value for one worker and rest of each, to go on from with any number of workers."""
    return [[scale.value / scale.workers, scale.rest] for scale in scales]


def load_scales(scales: Sequence[GradientScale], state: Sequence[Sequence[float]]) -> None:
    """Goes on from what `scales_state` returned."""
    for scale, (value, rest) in zip(scales, state, strict=True):
        scale.value, scale.rest = value * scale.workers, int(rest)

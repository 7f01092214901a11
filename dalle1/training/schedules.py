"""Schedules: numbers that change while training. The functions depend on the step alone."""

from __future__ import annotations

import math
from typing import Any


def cosine(step: int, start: float, end: float, steps: int) -> float:
    """From `start` at step 0 to `end` at step `steps` along half a cosine, then `end` (A.2).

    With steps = 0 it is `end` from the beginning.
    """
    if step >= steps:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def linear_warmup(step: int, steps: int) -> float:
    """Factor of the learning rate: 1/steps at step 0, 1 from step `steps` - 1 on (appendix B.2).

    With steps = 0 there is no warmup.
    """
    return min(1.0, (step + 1) / steps) if steps else 1.0


class PlateauHalving:
    """Halves the learning rate when the training loss has stopped falling (appendix B.2).

    The paper gives no rule for "plateaus". Ours compares the mean losses of two windows: the rate
    is halved when the later one is not lower by more than a share of `tolerance`. The share is of
    the former mean's size, since a likelihood's loss may be negative.

    Args:
        patience: updates in a window.
        tolerance: relative to the size of the former mean.
        max_halvings: the paper halves five times.
    """

    def __init__(self, patience: int, tolerance: float = 1e-3, max_halvings: int = 5) -> None:
        self.patience, self.tolerance, self.max_halvings = patience, tolerance, max_halvings
        self.halvings, self.count, self.total = 0, 0, 0.0
        self.former = math.inf

    @property
    def factor(self) -> float:
        """What the learning rate is multiplied by."""
        return 0.5**self.halvings

    def update(self, loss: float) -> None:
        """Takes one update's loss into account."""
        self.count, self.total = self.count + 1, self.total + loss
        if self.count < self.patience:
            return
        mean = self.total / self.count
        if not self._has_fallen_to(mean) and self.halvings < self.max_halvings:
            self.halvings += 1
        self.former, self.count, self.total = mean, 0, 0.0

    def _has_fallen_to(self, mean: float) -> bool:
        if math.isinf(self.former):  # the first window has none to be compared with
            return True
        return mean < self.former - self.tolerance * abs(self.former)

    def begin_phase(self) -> None:
        """Forgets the windows and the halvings of the phase before, which had another loss."""
        self.halvings, self.count, self.total = 0, 0, 0.0
        self.former = math.inf

    def state_dict(self) -> dict[str, Any]:
        """All that changes, for a checkpoint; `former` is None before the first window ends."""
        former = None if math.isinf(self.former) else self.former
        return {
            "halvings": self.halvings,
            "count": self.count,
            "total": self.total,
            "former": former,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.halvings, self.count, self.total = state["halvings"], state["count"], state["total"]
        self.former = math.inf if state["former"] is None else state["former"]

"""Numbers that change while training; pure functions of the step unless they say otherwise."""

from __future__ import annotations

import math
from typing import Any


def cosine(step: int, start: float, end: float, steps: int) -> float:
    """From `start` at step 0 to `end` at `steps` along half a cosine, then `end` (appendix A.2).

    With steps = 0 it is `end` from the beginning.
    """
    if step >= steps:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def warm_up(step: int, steps: int) -> float:
    """Linear factor: 1/steps at step 0, 1 from step `steps` - 1 on (appendix B.2)."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


class PlateauHalving:
    """Halves the step size when the training loss has stopped falling (appendix B.2).

    The paper gives no rule for "plateaus"; ours: the mean loss of a window of `patience` updates
    is not below the former window's by more than `tolerance` (relative). At most `most` halvings.
    """

    def __init__(self, patience: int, tolerance: float = 1e-3, most: int = 5) -> None:
        self.patience, self.tolerance, self.most = patience, tolerance, most
        self.halvings, self.count, self.total = 0, 0, 0.0
        self.former = math.inf

    @property
    def factor(self) -> float:
        """What the step size is multiplied with."""
        return 0.5**self.halvings

    def update(self, loss: float) -> None:
        """Takes one update's loss into account."""
        self.count, self.total = self.count + 1, self.total + loss
        if self.count < self.patience:
            return
        mean = self.total / self.count
        if mean > self.former * (1 - self.tolerance) and self.halvings < self.most:
            self.halvings += 1
        self.former, self.count, self.total = mean, 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """All that changes; `former` is None before the first window ends."""
        former = None if math.isinf(self.former) else self.former
        return {
            "halvings": self.halvings,
            "count": self.count,
            "total": self.total,
            "former": former,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` returned."""
        self.halvings, self.count, self.total = state["halvings"], state["count"], state["total"]
        self.former = math.inf if state["former"] is None else state["former"]

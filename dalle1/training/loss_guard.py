"""Updates that would spoil the weights: losses that are not finite, and spikes."""

from __future__ import annotations

import math
from typing import Any

from dalle1.training.config import FaultSettings

MEMORY = 0.98  # of the running mean that a spike is measured by
FEWEST = 50  # updates before anything is called a spike


class Watch:
    """Tells bad updates from good ones by the loss, and how many were left out in a row.

    A function of the mean loss of all ranks alone, so that all decide alike.
    """

    def __init__(self, settings: FaultSettings) -> None:
        self.settings = settings
        self.mean, self.count, self.in_a_row, self.skipped = 0.0, 0, 0, 0

    def accept(self, loss: float) -> str | None:
        """Why an update with this loss must not be done, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        limit = self.settings.spike
        if limit is not None and self.count >= FEWEST and loss > limit * self.mean:
            return (
                f"the loss {loss:.4g} is over faults.spike {limit:g} times its mean {self.mean:.4g}"
            )
        return None

    def after(self, step: int, loss: float, reason: str | None) -> None:
        """Takes update `step` (counted from 1) into account; `reason`: why it was left out.

        Raises ValueError when the run must stop.
        """
        if reason is None:
            self.in_a_row = 0
            memory = min(MEMORY, self.count / (self.count + 1))  # a plain mean at first
            self.mean = memory * self.mean + (1 - memory) * loss
            self.count += 1
            return
        self.in_a_row += 1
        self.skipped += 1
        advice = (
            "lower optimizer.learning_rate or optimizer.clip_norm and go on with --resume from the "
            "newest checkpoint"
        )
        if self.settings.bad_update == "stop":
            raise ValueError(
                f"update {step} would spoil the weights: {reason}. Set faults.bad_update=skip to "
                f"leave such updates out, or {advice}"
            )
        if self.in_a_row >= self.settings.max_skipped:
            raise ValueError(
                f"the last {self.in_a_row} updates, up to {step}, were left out (faults."
                f"max_skipped {self.settings.max_skipped}); the last one: {reason}. {advice}"
            )

    def state_dict(self) -> dict[str, Any]:
        """All that changes."""
        return {name: getattr(self, name) for name in ("mean", "count", "in_a_row", "skipped")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)

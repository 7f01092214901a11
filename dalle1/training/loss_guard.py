"""Finds updates that would spoil the weights: losses that are not finite, and spikes."""

from __future__ import annotations

import math
from typing import Any

from dalle1.training.config import FaultSettings

MEAN_DECAY = 0.98  # of the running mean that a spike is measured by
MIN_UPDATES = 50  # before anything is called a spike


class LossGuard:
    """Tells bad updates from good ones by the loss, and counts those skipped in a row.

    All ranks must give it the same loss, the mean over the global batch. They then decide alike.
    """

    def __init__(self, settings: FaultSettings) -> None:
        self.settings = settings
        self.mean, self.count, self.in_a_row, self.skipped = 0.0, 0, 0, 0

    def reason_to_skip(self, loss: float) -> str | None:
        """Why an update with this loss must be skipped, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        limit = self.settings.spike
        if limit is not None and self.count >= MIN_UPDATES and loss > limit * self.mean:
            return (
                f"the loss {loss:.4g} is over faults.spike {limit:g} times its mean {self.mean:.4g}"
            )
        return None

    def record(self, step: int, loss: float, reason: str | None) -> None:
        """Takes an update into account.

        Args:
            step: number of the update, counted from 1.
            loss: of the global batch.
            reason: why the update was skipped; None if it was done.

        Raises:
            ValueError: the run must stop, by `faults.bad_update` or `faults.max_skipped`.
        """
        if reason is None:
            self.in_a_row = 0
            decay = min(MEAN_DECAY, self.count / (self.count + 1))  # a plain mean at first
            self.mean = decay * self.mean + (1 - decay) * loss
            self.count += 1
            return
        self.in_a_row += 1
        self.skipped += 1
        advice = (
            "lower optimizer.learning_rate or optimizer.clip_norm and resume with --resume from "
            "the newest checkpoint"
        )
        if self.settings.bad_update == "stop":
            raise ValueError(
                f"update {step} would spoil the weights: {reason}. Set faults.bad_update=skip to "
                f"skip such updates, or {advice}"
            )
        if self.in_a_row >= self.settings.max_skipped:
            raise ValueError(
                f"the last {self.in_a_row} updates, up to {step}, were skipped (faults."
                f"max_skipped {self.settings.max_skipped}); the last one: {reason}. {advice}"
            )

    def state_dict(self) -> dict[str, Any]:
        """All that changes, for a checkpoint."""
        return {name: getattr(self, name) for name in ("mean", "count", "in_a_row", "skipped")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)

"""Finds updates that would spoil the weights, and counts all that were skipped, by cause."""

from __future__ import annotations

import math
from typing import Any

from dalle1.training.config import FaultSettings

# Why an update is skipped, where its loss is fine.
OVERFLOW = "gradients of a block are beyond float16"  # which happens now and then by design
OVERFLOW_AT_LOWEST = "gradients of a block are beyond float16 at the lowest gradient scale"
NOT_FINITE = "a gradient is not finite"
# What these are counted as; the loss itself is the cause of all others.
CAUSES = {OVERFLOW: "overflow", OVERFLOW_AT_LOWEST: "overflow", NOT_FINITE: "gradient"}

MEAN_DECAY = 0.98  # of the running mean that a spike is measured by
MIN_UPDATES = 50  # before anything is called a spike
DEVIATIONS = 5.0  # mean deviations that count as much as a positive mean itself
LEAST_SHARE = 0.1  # of the mean's size, where losses hardly deviate
WARN_AFTER = 10  # overflows in a row; then after twice as many, and so on


class LossGuard:
    """Tells bad updates from good ones by the loss, and counts those skipped.

    All ranks must give it the same loss, the mean over the global batch. They then decide alike.
    """

    def __init__(self, settings: FaultSettings) -> None:
        self.settings = settings
        self.mean, self.deviation, self.count = 0.0, 0.0, 0
        self.in_a_row, self.overflows_in_a_row = 0, 0
        self.causes: dict[str, int] = {}  # updates skipped in all, by cause

    @property
    def skipped(self) -> int:
        """Updates that were skipped in all."""
        return sum(self.causes.values())

    def begin_phase(self) -> None:
        """Forgets the mean of the phase before, which had another loss."""
        self.mean, self.deviation, self.count = 0.0, 0.0, 0

    def reason_to_skip(self, loss: float) -> str | None:
        """Why an update with this loss must be skipped, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        limit = self.settings.spike
        if limit is None or self.count < MIN_UPDATES:
            return None
        highest = self.mean + (limit - 1) * self._unit()
        if loss > highest:
            return (
                f"the loss {loss:.4g} is over {highest:.4g}, which faults.spike {limit:g} allows "
                f"above its mean {self.mean:.4g}"
            )
        return None

    def _unit(self) -> float:
        """What `faults.spike` counts in: twice a positive mean is a spike of 2.

        A ratio to the mean says nothing where the loss is near zero or negative, as a likelihood's
        is. There the unit is the noise of the loss. All are in units of the loss.
        """
        return max(self.mean, DEVIATIONS * self.deviation, LEAST_SHARE * abs(self.mean))

    def record(self, step: int, loss: float, reason: str | None) -> None:
        """Takes an update into account.

        Args:
            step: number of the update, counted from 1.
            loss: of the global batch.
            reason: why the update was skipped; None if it was done.

        Raises:
            ValueError: the run must stop, by `faults.bad_update` or `faults.max_skipped`, or since
                float16 does not hold its gradients.
        """
        if reason is None:
            self.in_a_row, self.overflows_in_a_row = 0, 0
            self._add_to_mean(loss)
            return
        cause = CAUSES.get(reason, "loss")
        self.causes[cause] = self.causes.get(cause, 0) + 1
        if cause == "overflow":
            self.overflows_in_a_row += 1
            if reason == OVERFLOW_AT_LOWEST:
                raise ValueError(_float16_fails(step, self.overflows_in_a_row))
        else:
            self.in_a_row += 1
            self._stop_if_too_bad(step, reason)

    def _add_to_mean(self, loss: float) -> None:
        decay = min(MEAN_DECAY, self.count / (self.count + 1))  # a plain mean at first
        deviation = abs(loss - self.mean) if self.count else 0.0
        self.deviation = decay * self.deviation + (1 - decay) * deviation
        self.mean = decay * self.mean + (1 - decay) * loss
        self.count += 1

    def _stop_if_too_bad(self, step: int, reason: str) -> None:
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

    def warning(self, step: int, reason: str | None) -> str | None:
        """What the user must be told of the update just recorded, or None."""
        if reason is None:
            return None
        if CAUSES.get(reason) != "overflow":
            return f"update {step} was skipped: {reason}"
        times, rest = divmod(self.overflows_in_a_row, WARN_AFTER)
        if rest or times.bit_count() != 1:  # 1, 2, 4 ... times
            return None
        return (
            f"the last {self.overflows_in_a_row} updates, up to {step}, were skipped: {reason}; "
            "gradient scales fall once in 125 updates. If it goes on, set parallel.precision=bf16 "
            "or lower optimizer.learning_rate"
        )

    def metrics(self) -> dict[str, float]:
        """Updates skipped so far, in all and by cause; nothing where there are none."""
        if not self.skipped:
            return {}
        by_cause = {f"updates_skipped/{cause}": float(n) for cause, n in self.causes.items()}
        return {"updates_skipped": float(self.skipped), **by_cause}

    def summary(self, step: int) -> str | None:
        """The line at the end of a run: how many of `step` updates were skipped, and why."""
        if not self.skipped:
            return None
        causes = ", ".join(f"{count} by {cause}" for cause, count in self.causes.items())
        return f"{self.skipped} of {step} updates were skipped ({causes})"

    def nothing_done(self, step: int) -> bool:
        """Whether all of the first `step` updates were skipped, so that nothing was learned."""
        return self.skipped >= step

    def state_dict(self) -> dict[str, Any]:
        """All that changes, for a checkpoint."""
        names = ("mean", "deviation", "count", "in_a_row", "overflows_in_a_row")
        return {"causes": dict(self.causes), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, in this release or the one before."""
        state = dict(state)
        if "causes" not in state:  # written before: without the deviation the mean begins anew
            former = state.pop("skipped")
            state |= {"mean": 0.0, "count": 0, "causes": {"unknown": former} if former else {}}
        for name, value in state.items():
            setattr(self, name, value)


def _float16_fails(step: int, in_a_row: int) -> str:
    return (
        "parallel.precision: expected gradients that 'fp16' holds, got a block's beyond it at the "
        f"lowest gradient scale in update {step}, the last of {in_a_row} in a row that were "
        "skipped; set parallel.precision=bf16, or lower optimizer.learning_rate, and resume with "
        "--resume"
    )

"""What goes wrong in a long run: signals, numbers that are not finite, ranks that are gone."""

from __future__ import annotations

import math
import os
import signal
from types import FrameType, TracebackType
from typing import Any

from torch.distributed import DistError

from dalle1.training.config import FaultSettings

MEMORY = 0.98  # of the running mean that a spike is measured by
FEWEST = 50  # updates before anything is called a spike
# What gloo says, whose errors are plain RuntimeErrors.
SIGNS = ("gloo", "Connection closed", "Connection reset", "Timed out", "timed out", "Broken pipe")


class Interrupted(Exception):
    """Training was asked to stop, and has saved a checkpoint. `number` is the signal's."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class RanksLost(Exception):
    """Another rank died, hangs or cannot be reached."""


def ranks_lost(error: BaseException) -> bool:
    """Whether the error comes from waiting for another rank."""
    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


class StopSignals:
    """Turns Ctrl-C and SIGTERM into a number that the loop reads between two updates.

    A rank whose launcher is gone stops too: nobody else would tell it to.
    """

    def __init__(self, launched: bool = False) -> None:
        """launched: whether the parent process is a launcher that must outlive this one."""
        self._number = 0
        self._parent = os.getppid() if launched else None

    @property
    def number(self) -> int:
        """The signal that came, or 0."""
        if self._parent is not None and os.getppid() != self._parent:
            return self._number or int(signal.SIGTERM)
        return self._number

    def __enter__(self) -> StopSignals:
        self._former = {
            number: signal.signal(number, self._set) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _set(self, number: int, frame: FrameType | None) -> None:
        self._number = number

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)


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
            "lower optimiser.learning_rate or optimiser.clip_norm and go on with --resume from the "
            "newest checkpoint"
        )
        if self.settings.bad_update == "stop":
            raise ValueError(
                f"update {step} would spoil the weights: {reason}. Set faults.bad_update=skip to "
                f"leave such updates out, or {advice}"
            )
        if self.in_a_row >= self.settings.most_skipped:
            raise ValueError(
                f"the last {self.in_a_row} updates, up to {step}, were left out (faults."
                f"most_skipped {self.settings.most_skipped}); the last one: {reason}. {advice}"
            )

    def state_dict(self) -> dict[str, Any]:
        """All that changes."""
        return {name: getattr(self, name) for name in ("mean", "count", "in_a_row", "skipped")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)

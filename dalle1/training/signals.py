"""What ends a run from outside: signals, and ranks that are lost."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

from torch.distributed import DistError

# Parts of gloo's messages, which come as plain RuntimeErrors.
GLOO_MESSAGES = (
    "gloo", "Connection closed", "Connection reset", "Timed out", "timed out", "Broken pipe",
)  # fmt: skip


class Interrupted(Exception):
    """Training was asked to stop, and has saved a checkpoint. `number` is the signal's."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class RanksLost(Exception):
    """Another rank died, hangs or cannot be reached; the command's exit status is 75."""


def means_lost_rank(error: BaseException) -> bool:
    """Whether the error comes from waiting for another rank, and not from a mistake."""
    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in GLOO_MESSAGES)


class StopSignals:
    """Turns Ctrl-C and SIGTERM into a number that the loop reads between two updates.

    A rank whose launcher is gone stops too, since nobody else would tell it to.
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

"""What the processes that read data ahead have in common."""

from __future__ import annotations

import signal


def ignore_signals(worker: int) -> None:
    """A signal to all processes of a run is for the rank alone, which needs its workers to end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

"""What the processes that read data ahead have in common."""

from __future__ import annotations

import signal
import weakref
from typing import Any, TypeVar

Iterating = TypeVar("Iterating")


def ignore_signals(worker: int) -> None:
    """A signal to all processes of a run is for the rank alone, which needs its workers to end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def ending_workers(batches: Iterating) -> Iterating:
    """A DataLoader's iterator, whose processes are killed once it or this process ends: one that
    waits for a remote tar would not hear a milder signal, and be waited for for ever."""
    workers: list[Any] = getattr(batches, "_workers", [])
    if workers:
        weakref.finalize(batches, _kill, workers)
    return batches


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        worker.kill()

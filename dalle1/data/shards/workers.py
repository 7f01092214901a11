"""What the processes that read data ahead have in common."""

from __future__ import annotations

import signal
import sys
import weakref
from types import TracebackType
from typing import Any, TypeVar

Iterating = TypeVar("Iterating")


def prepare_worker(worker: int) -> None:
    """A DataLoader's `worker_init_fn`. A signal to all processes of a run is for the rank alone,
    which needs its workers to end. A rank that is stopped while it takes a tensor hangs up; the
    thread that hands tensors over would print a traceback below the rank's last line."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _tell_all_but_hanging_up


def _tell_all_but_hanging_up(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    # What fails while data are read reaches the rank with the batch, and not this hook.
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


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

"""The queue of one device: a thread that draws for all who wait, a batch after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dalle1.generation.options import SamplingOptions
from dalle1.generation.shares import ShareDrawer
from dalle1.model import Model
from dalle1.serving.batch import Batch, conclude, fail
from dalle1.serving.fairness import fair_shares
from dalle1.serving.jobs import Drawing, Job
from dalle1.serving.requests import Cancelled, Closed, Limits, QueueFull
from dvae.calls import isolated

OUTCOMES = ("done", "cancelled", "failed")  # of a job
# Of a batch's time, for which the next one waits: whoever has an answer may ask again.
GATHER_SHARE = 0.02


@dataclass
class Counts:
    """What a queue has done since it was started."""

    batches: int = 0
    candidates: int = 0  # drawn
    seconds: float = 0.0  # of drawing, decoding and ranking
    jobs: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))


class _Key(NamedTuple):
    """What jobs have in common that are drawn together."""

    model: str
    options: SamplingOptions
    prefix: tuple[int, ...]
    alone: int | None  # of a job that shares no batch


def _key(drawing: Drawing) -> _Key:
    request, prefix = drawing.job.request, drawing.prefix
    return _Key(
        request.model,
        request.options,
        () if prefix is None else tuple(prefix.tolist()),
        id(drawing) if drawing.alone else None,
    )


class DeviceQueue:
    """Draws the jobs of one device's models, each with those of others that fit to it.

    Whoever waits longest comes first; a batch is shared evenly, and who has had a share of one goes
    to the end of the queue.
    """

    def __init__(
        self, name: str, models: Mapping[str, Model], limits: Limits, threads: int | None = None
    ) -> None:
        """threads: of the CPU that it computes with; None: as many as this thread."""
        self.name, self.models, self.limits = name, models, limits
        self._threads = threads or torch.get_num_threads()
        self.counts = Counts()
        self._news = threading.Condition()  # guards the five below and the counts
        self._jobs: set[Job] = set()  # that are not done
        self._submitted: list[Drawing] = []  # that the thread has not seen yet
        self._closing = False  # nothing more is taken
        self._closed = False  # nothing more is drawn
        # The thread's own.
        self._waiting: list[Drawing] = []  # the longest waiting first
        self._drawer: ShareDrawer | None = None
        self._drawer_of: tuple[str, SamplingOptions] | None = None
        self._last_seconds = 0.0  # that the last batch took
        self._thread = threading.Thread(target=self._run, name=f"dalle1 {name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that wait or are drawn."""
        return len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def add(self, job: Job) -> None:
        """Puts a job at the end of the queue; QueueFull where it is full, Closed after `close`."""
        with self._news:
            if self._closing:
                raise Closed("the server is shutting down")
            if len(self._jobs) >= self.limits.waiting:
                raise QueueFull(f"{len(self._jobs)} requests are waiting; try again later")
            self._jobs.add(job)
            self._submitted.append(Drawing(job))
            self._news.notify_all()

    def forget(self, job: Job) -> None:
        """A job is done, and its place free."""
        cancelled = isinstance(job.error, Cancelled)
        outcome = "cancelled" if cancelled else "failed" if job.error else "done"
        with self._news:
            self._jobs.discard(job)
            self.counts.jobs[outcome] += 1
            self._news.notify_all()

    def close(self, timeout: float | None = 0) -> None:
        """Takes no more jobs, and waits for those that are there; then ends the thread.

        timeout: after so many seconds the others fail with `Closed`; None waits for all of them.
        """
        with self._news:
            self._closing = True
            self._news.wait_for(lambda: not self._jobs, timeout)
            self._closed = True
            left = list(self._jobs)
            self._news.notify_all()
        for job in left:
            job.fail(Closed("the server was shut down"))
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP's of this thread; MKL's of the process
        while self._admit():
            began = time.monotonic()
            try:
                with isolated():
                    self._draw_next()
            except Exception as error:  # none is foreseen; it must not end the queue
                for drawing in self._waiting:
                    fail(drawing, error)
                self._drawer = None
            self._last_seconds = time.monotonic() - began
            with self._news:
                self.counts.seconds += self._last_seconds

    def _admit(self) -> bool:
        """Waits until somebody waits, and a little for others who could join; False: the end."""
        self._waiting = [drawing for drawing in self._waiting if not drawing.job.done]
        with self._news:
            if not self._waiting and not self._somebody():
                self._news.wait_for(self._somebody, self.limits.idle_seconds)
                if not self._somebody():
                    self._drawer = None  # its memory is given back
                    self._news.wait_for(self._somebody)
            gather = max(self.limits.gather_seconds, GATHER_SHARE * self._last_seconds)
            self._news.wait_for(self._enough, gather)
            self._waiting += self._submitted
            self._submitted = []
            return not self._closed

    def _somebody(self) -> bool:
        return self._closed or bool(self._submitted)

    def _enough(self) -> bool:
        """Whether those who wait fill a batch, so that it need not wait for others."""
        most = self._drawer.limit if self._drawer else self.limits.batch_size
        wanted = sum(d.remaining for d in (*self._waiting, *self._submitted) if not d.job.done)
        return self._closed or (most is not None and wanted >= most)

    def _draw_next(self) -> None:
        """Draws a batch for the one who waits longest and those who fit to it."""
        for drawing in self._waiting:
            self._prepare(drawing)
        self._waiting = [drawing for drawing in self._waiting if not drawing.job.done]
        if not self._waiting:
            return
        key = _key(self._waiting[0])
        model = self.models[key.model]
        drawer = self._drawer_for(model, key)
        together = [drawing for drawing in self._waiting if _key(drawing) == key]
        places = fair_shares([drawing.remaining for drawing in together], drawer.limit)
        batch = Batch(
            model, {d: d.next_shares(n) for d, n in zip(together, places, strict=True) if n}
        )
        drawn = batch.draw(drawer)
        with self._news:
            self.counts.batches += drawn
            self.counts.candidates += len(batch) if drawn else 0
        self._waiting.sort(key=lambda drawing: drawing in batch.shares)

    def _prepare(self, drawing: Drawing) -> None:
        """What comes before a job's first batch, and the end of one that was stopped."""
        job = drawing.job
        model = self.models[job.request.model]
        if job.stopping:
            conclude(drawing, model)
        elif not job.done and drawing.prefix is None and job.draw.pixels is not None:
            try:
                drawing.prefix = job.draw.prefix(model)
            except Exception as error:
                fail(drawing, error)

    def _drawer_for(self, model: Model, key: _Key) -> ShareDrawer:
        """The drawer of the last batch where it fits; only one at a time takes memory."""
        wanted = (key.model, key.options)
        if self._drawer is None or self._drawer_of != wanted:
            self._drawer = None
            self._drawer = ShareDrawer(model, key.options, self.limits.batch_size)
            self._drawer_of = wanted
        return self._drawer

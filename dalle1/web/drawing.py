"""From a form to pictures: what a visitor sees while a drawing waits, is drawn and is done."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from dalle1.common.images import to_pil
from dalle1.sampling import Preview, Result
from dalle1.serving.jobs import Job
from dalle1.serving.requests import Cancelled, Closed, NothingComplete, QueueFull, Request
from dalle1.serving.worker import SamplingWorker
from dalle1.web.complete import galleries
from dalle1.web.form import Form, read_form
from dalle1.web.gallery import Rows, gallery_html, rows_html
from dalle1.web.limits import PageLimits
from dalle1.web.shapes import ModelShape, shape_of
from dalle1.web.uploads import preview_url

LOG = logging.getLogger(__name__)
TICK = 0.5  # seconds between two looks at a drawing that shows no new rows
UNFORESEEN = "something went wrong here; what you have typed is fine, try again"


@dataclass(frozen=True)
class View:
    """What the page shows of a drawing.

    Attributes:
        pictures: HTML; None: those that are there stay.
        status: HTML.
        drawing: whether it goes on.
        seed: that is drawn with; None: it is not known.
    """

    pictures: str | None
    status: str
    drawing: bool
    seed: int | None = None


class Visitors:
    """The drawings of all visitors, at most one each, on a worker that others may use, too."""

    def __init__(self, worker: SamplingWorker, page: PageLimits) -> None:
        self.worker, self.page = worker, page
        self.shapes: Mapping[str, ModelShape] = {
            name: shape_of(model) for name, model in worker.models.items()
        }
        self._jobs: dict[str, Job] = {}  # by visitor
        self._lock = threading.Lock()

    def shape(self, model: Any) -> ModelShape:
        """The shape of a model of the page; ValueError where there is none of this name."""
        if not isinstance(model, str) or model not in self.shapes:
            raise ValueError(f"model: expected one of {', '.join(self.shapes)}, got {model!r}")
        return self.shapes[model]

    async def draw(self, visitor: str, form: Form) -> AsyncIterator[View]:
        """Draws what the form asks for. The visitor's former drawing is given up.

        A mistake of the visitor's is a view that says so, and the pictures stay.
        """
        try:
            # Opening an upload takes a moment, in which others are served.
            request = await asyncio.to_thread(
                read_form, form, self.shapes, self.worker.limits, self.page
            )
            job = self._begin(visitor, request)
        except (ValueError, QueueFull, Closed) as error:
            yield View(None, mistake(error), False)
            return
        except Exception:
            LOG.exception("a form could not be read")
            yield View(None, mistake(UNFORESEEN), False)
            return
        try:
            async for view in self._views(job):
                yield replace(view, seed=request.seed)
        finally:
            self._end(visitor, job)

    def stop(self, visitor: str) -> None:
        """Ends a visitor's drawing with what is complete."""
        with self._lock:
            job = self._jobs.get(visitor)
        if job is not None:
            job.stop()

    def leave(self, visitor: str) -> None:
        """A visitor is gone, and with them their drawing."""
        with self._lock:
            job = self._jobs.pop(visitor, None)
        if job is not None:
            job.cancel()

    @property
    def drawing(self) -> int:
        """Drawings that run or wait."""
        return len(self._jobs)

    def _begin(self, visitor: str, request: Request) -> Job:
        self.leave(visitor)
        with self._lock:
            if len(self._jobs) >= self.page.visitors:
                raise QueueFull(f"{len(self._jobs)} drawings are waiting; try again later")
            job = self._jobs[visitor] = self.worker.submit(request)
        return job

    def _end(self, visitor: str, job: Job) -> None:
        job.cancel()
        with self._lock:
            if self._jobs.get(visitor) is job:
                del self._jobs[visitor]

    async def _views(self, job: Job) -> AsyncIterator[View]:
        """What is seen of a job, from the empty tiles to its end."""
        request = job.request
        size = self.shapes[request.model].drawn_size
        drawn: dict[str, Rows] = {}
        yield self._progress(job, drawn, size)
        try:
            async for event in ticking(job.stream(), TICK):
                if isinstance(event, Result):
                    found = await asyncio.to_thread(galleries, event)
                    told = (
                        ""
                        if len(found) == len(request.captions)
                        and all(gallery.drawn == request.candidates for gallery in found)
                        else "stopped: this is what was complete"
                    )
                    yield View(gallery_html(found, size), status(told), False)
                    return
                if isinstance(event, Preview):
                    drawn[event.caption] = await asyncio.to_thread(
                        _rows, event, request, self.shapes[request.model]
                    )
                yield self._progress(job, drawn, size)
        except (NothingComplete, Cancelled):
            yield View(None, status("stopped before anything was complete"), False)
        except (ValueError, Closed) as error:
            yield View(None, mistake(error), False)
        except Exception:
            LOG.exception("%r failed", job)
            yield View(None, mistake(UNFORESEEN), False)

    def _progress(self, job: Job, drawn: Mapping[str, Rows], size: tuple[int, int]) -> View:
        request = job.request
        waiting = [caption for caption in request.captions if caption not in drawn]
        pictures = rows_html(list(drawn.values()), waiting, request.keep, size)
        share = job.progress
        others = self.worker.waiting - 1
        told = "drawing" if share or not others else "waiting for drawings of others"
        return View(pictures, status(told, share), True)


async def ticking(
    events: AsyncIterator[Preview | Result], seconds: float
) -> AsyncIterator[Preview | Result | None]:
    """The events, and None whenever none has come for so many seconds."""
    following = aiter(events)
    waiting: asyncio.Future[Preview | Result] | None = None
    try:
        while True:
            if waiting is None:
                waiting = asyncio.ensure_future(anext(following))
            done, _ = await asyncio.wait({waiting}, timeout=seconds)
            if not done:
                yield None
                continue
            try:
                event = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield event
    finally:
        if waiting is not None:
            waiting.cancel()


def status(text: str, share: float | None = None) -> str:
    """A line below the form.

    share: of the work that is done, in [0, 1]; None: no bar is shown.
    """
    bar = "" if share is None else f'<progress max="1" value="{share:.3f}"></progress>'
    return f'<p class="d1-status" role="status">{bar}<span>{escape(text)}</span></p>'


def mistake(error: Exception | str) -> str:
    """A line below the form that says what is wrong."""
    return f'<p class="d1-status d1-mistake" role="alert">{escape(str(error))}</p>'


def _rows(preview: Preview, request: Request, shape: ModelShape) -> Rows:
    images = [preview_url(to_pil(image)) for image in preview.images[: request.keep]]
    return Rows(preview.caption, images, preview.rows / shape.grid[0])

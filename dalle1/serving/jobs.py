"""A request that was taken: what it has drawn so far, and what its client sees of it.

Fields that begin with an underscore belong to the worker's thread; the methods are for any thread.

Dimensions: b candidates, m image positions.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from dalle1.generation.ranking import BestImages
from dalle1.generation.requests import DrawRequest
from dalle1.generation.shares import Share
from dalle1.sampling import Preview, Result
from dalle1.serving.requests import Cancelled, Request

MAX_PREVIEWS = 16  # that wait for a slow client; of more, the oldest are dropped


class Job:
    """A request on its way, from `SamplingWorker.submit`.

    Attributes:
        request: what was asked for.
    """

    def __init__(
        self, request: Request, draw: DrawRequest, on_done: Callable[[Job], None] | None = None
    ) -> None:
        """on_done: called once, when there is a result or an error."""
        self._on_done = on_done
        self.request = request
        self.draw = draw
        self._lock = threading.Condition()
        self._previews: deque[Preview] = deque(maxlen=MAX_PREVIEWS)
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._wake: list[Callable[[], None]] = []  # called when there is news
        self._stop = False
        self._progress = 0.0

    def __repr__(self) -> str:
        return f"<Job of {list(self.request.captions)!r}: {self.progress:.0%}>"

    @property
    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self._result is not None or self._error is not None

    @property
    def error(self) -> BaseException | None:
        """What it ended with in place of a result."""
        return self._error

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stop

    @property
    def progress(self) -> float:
        """The share of positions that are drawn, in [0, 1]."""
        return self._progress

    def cancel(self) -> None:
        """Gives the job up: nothing more is drawn for it from the next token row on.

        Without effect where it is done.
        """
        self.fail(Cancelled("the job was cancelled"))

    def stop(self) -> None:
        """Ends the job with what is complete when the next token row is, as Ctrl-C in `sample`.

        These are the captions that are done, and the caption in progress if at least `keep` of its
        candidates are done; with nothing complete, the job ends with `NothingComplete`.
        """
        self._stop = True

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the result.

        Raises:
            TimeoutError: it took longer than so many seconds; the job goes on.
            Cancelled, NothingComplete, Closed: see there; or whatever drawing raised.
        """
        with self._lock:
            if not self._lock.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"the job is not done after {timeout:g} s")
        return self._outcome()

    def events(self) -> Iterator[Preview | Result]:
        """Previews as they come, the latest ones where the caller is slow, and last the result.

        Whatever `result` would raise ends it. One iterator at a time gets the events.
        """
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._previews or self.done)
            event = self._next_event()
            if event is not None:
                yield event
            if isinstance(event, Result):
                return

    async def stream(self) -> AsyncIterator[Preview | Result]:
        """As `events`, for asyncio."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(news.set)

        with self._lock:
            self._wake.append(wake)
        try:
            while True:
                news.clear()
                event = self._next_event()
                if event is None:
                    await news.wait()
                    continue
                yield event
                if isinstance(event, Result):
                    return
        finally:
            with self._lock:
                self._wake.remove(wake)

    def _next_event(self) -> Preview | Result | None:
        with self._lock:
            if self._previews:
                return self._previews.popleft()
        return self._outcome() if self.done else None

    def _outcome(self) -> Result:
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    # What the worker tells.

    def show(self, preview: Preview) -> None:
        """A preview for the client."""
        with self._lock:
            if not self.done:
                self._previews.append(preview)
        self._tell()

    def advance(self, progress: float) -> None:
        """So much is drawn, in [0, 1]."""
        self._progress = progress

    def finish(self, result: Result) -> None:
        """The job is done; without effect where it already is."""
        self._end(result, None)

    def fail(self, error: BaseException) -> None:
        """The job ends with an error; without effect where it is done."""
        self._end(None, error)

    def _end(self, result: Result | None, error: BaseException | None) -> None:
        with self._lock:
            if self.done:
                return
            self._result, self._error = result, error
            if error is not None:
                self._previews.clear()
        if self._on_done is not None:
            self._on_done(self)
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            self._lock.notify_all()
            waking = list(self._wake)
        for wake in waking:
            wake()


class Drawing:
    """What of a job is drawn: only the worker's thread knows it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.alone = False  # whether it shares no batch, since one with it has failed
        self.prefix: Tensor | None = None
        self.kept: list[BestImages] = []  # of the captions that are done
        self.tokens: list[Tensor] = []  # [b, m] each, of the caption in progress

    @property
    def candidates_done(self) -> int:
        """Complete candidates of the caption in progress."""
        return sum(map(len, self.tokens))

    def take_tokens(self) -> Tensor:
        """The complete candidates of the caption in progress, int64 [b, m]; the next begins."""
        tokens, self.tokens = torch.cat(self.tokens), []
        return tokens

    @property
    def remaining(self) -> int:
        """Candidates of all captions that are still to be drawn."""
        request = self.job.draw
        captions = len(request.captions) - len(self.kept)
        return captions * request.candidates - self.candidates_done

    def next_shares(self, most: int) -> list[Share]:
        """Shares of the next candidates, at most so many, caption by caption."""
        request, shares = self.job.draw, []
        first = self.candidates_done
        for caption in request.captions[len(self.kept) :]:
            count = min(most, request.candidates - first)
            if count < 1:
                break
            start = request.first + first
            shares.append(Share(caption, request.seed, range(start, start + count)))
            most, first = most - count, 0
        return shares

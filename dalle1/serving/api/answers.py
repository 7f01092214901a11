"""Answers that end with their client: what is drawn for a client that leaves is given up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from dalle1.sampling import Result
from dalle1.serving.api.errors import ApiError, api_error
from dalle1.serving.jobs import Job

KEEP_ALIVE_SECONDS = 15.0  # between two signs of life on a stream; proxies cut silent ones


class ClientGone(Exception):
    """Nobody is there to answer."""


def error_response(error: ApiError) -> Response:
    """An error in the API's form."""
    return JSONResponse(error.content(), error.status, error.headers())


async def result_of(job: Job, receive: Receive) -> Result:
    """A job's result; the job is cancelled when the client leaves.

    Raises:
        ClientGone: it has left.
    """

    async def last() -> Result:
        async for event in job.stream():
            if isinstance(event, Result):
                return event
        raise AssertionError("a stream ends with a result or an error")

    done, gone = asyncio.ensure_future(last()), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ClientGone
        return done.result()
    finally:
        await _end(job, done, gone)


class EventStream(Response):
    """Server-sent events of a job; an error after the first one is an event too."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, events: AsyncIterator[dict[str, Any]]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]  # of no body
        self.job, self.events = job, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        gone = asyncio.ensure_future(_until_gone(receive))
        following = asyncio.ensure_future(self._next())
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            while True:
                await asyncio.wait(
                    {gone, following},
                    timeout=KEEP_ALIVE_SECONDS,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if gone.done():
                    return
                if not following.done():
                    await write(": waiting\n\n")
                    continue
                event = following.result()
                if event is None:
                    await write("", more=False)
                    return
                await write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n")
                following = asyncio.ensure_future(self._next())
        finally:
            await _end(self.job, gone, following)

    async def _next(self) -> dict[str, Any] | None:
        """The next event; None behind the last."""
        try:
            return await self.events.__anext__()
        except StopAsyncIteration:
            return None
        except Exception as error:
            return {"type": "error", **api_error(error).content()}


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(job: Job, *tasks: asyncio.Future[Any]) -> None:
    """Gives a job up, where it is not done, and ends the tasks that waited for it."""
    job.cancel()
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task

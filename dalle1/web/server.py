"""The page alone as an application: what `dalle1 web` runs."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI

from dalle1.serving.worker import SamplingWorker
from dalle1.web.limits import PageLimits
from dalle1.web.page import mount


def create_app(
    worker: SamplingWorker,
    started: Callable[[], None] | None = None,
    page: PageLimits | None = None,
) -> FastAPI:
    """An application of the page and nothing else.

    Args:
        worker: draws; it is closed by whoever made it.
        started: called as soon as the page is there.
        page: None: the defaults.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if started:
            started()
        yield

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    mount(app, worker, page=page)
    return app


def address_of(listening: socket.socket) -> str:
    """The page's address for a browser on this machine."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

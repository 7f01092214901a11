"""Runs an application on a socket until it is told to end. Needs uvicorn."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

SHUTDOWN_SECONDS = 30  # for which requests may end when the server is told to


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0 takes a free one.

    Raises ValueError where there is no such address, or the port is taken.
    """
    if not 0 <= port <= 65535:  # a larger one would be cut to 16 bits
        raise ValueError(f"--port: expected 0 to 65535, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        opened = socket.socket(family, kind, protocol)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
            opened.listen(2048)
        except BaseException:
            opened.close()
            raise
        return opened
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"--host, --port: expected an address to listen at, got {host}:{port} ({why}); name "
            "another"
        ) from error


def make_server(app: Any, head_seconds: float) -> uvicorn.Server:
    """A server of an application; head_seconds: for which a client may send a request's head."""
    config = uvicorn.Config(
        app,
        http=_protocol(head_seconds),
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        server_header=False,
    )
    return uvicorn.Server(config)


def run(server: uvicorn.Server, listening: socket.socket) -> None:
    """Serves until SIGTERM, after which it returns, or Ctrl-C, after which it raises
    KeyboardInterrupt; both times requests that are drawn may end before."""
    # uvicorn raises the signal again when it has shut down; SIGTERM would end the process then.
    former = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        asyncio.run(server.serve([listening]))
    finally:
        signal.signal(signal.SIGTERM, former)


def _protocol(head_seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, which closes a connection on which no request comes in."""

    class TimedProtocol(H11Protocol):
        """Waits for a request's head for a limited time; uvicorn itself waits for ever."""

        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            cycle = self.cycle
            if cycle is not None and not cycle.response_complete:
                self._stop()  # the head is there; the body has a time of its own
            elif self.timer is None:
                self._start()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _start(self) -> None:
            close: Callable[[], None] = self.transport.close
            self.timer = self.loop.call_later(head_seconds, close)

        def _stop(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

    return TimedProtocol

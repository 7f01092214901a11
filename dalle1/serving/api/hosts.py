"""Which names of this machine a server answers to.

A page of any site may send a browser's requests to this machine: its name resolves to the site at
first and to 127.0.0.1 then, so that the browser takes both for the same site (DNS rebinding). Such
requests still carry the site's name in their header Host.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from dalle1.serving.api.errors import ApiError
from dalle1.serving.api.guard import send_error

LOCAL = ("127.0.0.1", "localhost", "::1")


def known_hosts(bound: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names that a server answers to; none: to all.

    Args:
        bound: the address that it listens at. Whoever can reach more than this machine's own
            addresses is not kept out by a name, unless `names` says so.
        names: more of them, as a proxy passes on.
    """
    return (*LOCAL, *(name.lower() for name in names)) if bound in LOCAL or names else ()


class KnownHosts:
    """An ASGI application that refuses requests to other names with 403."""

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        """
        Args:
            app: what answers.
            names: as of `known_hosts`.
        """
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.names:
            given = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if _without_port(given).lower() not in self.names:
                message = f"host: {given[:100]!r} is no name of this server; --allow-host adds one"
                await send_error(send, ApiError(403, message, "host", "unknown_host"))
                return
        await self.app(scope, receive, send)


def _without_port(host: str) -> str:
    """The name or address of a header Host: "[::1]:8000" has the address ::1."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]

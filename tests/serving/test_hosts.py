"""Which names a server answers to."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dalle1.serving.api.hosts import KnownHosts, known_hosts


def status(names: tuple[str, ...], host: str | None) -> int:
    """Of the answer to a request that is addressed to a host."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if host is None else [(b"host", host.encode())]
    asyncio.run(KnownHosts(app, names)({"type": "http", "headers": headers}, app, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LocalHost:7860", "[::1]:8000"])
def test_this_machine_is_answered(host: str) -> None:
    """A port, capitals or an IPv6 address that keep out the machine's own browser."""
    for bound in ("127.0.0.1", "localhost", "::1"):
        assert status(known_hosts(bound, []), host) == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8000", "evil.example:127.0.0.1", "", None]
)
def test_other_names_are_refused(host: str | None) -> None:
    """A site whose name is made to resolve to 127.0.0.1, and whose page asks this server then."""
    assert status(known_hosts("127.0.0.1", []), host) == 403
    assert status(known_hosts("127.0.0.1", ["proxy.example"]), host) == 403


def test_more_names_are_answered_where_they_are_allowed() -> None:
    """A proxy that is kept out, or an open server that answers to its address alone."""
    allowed = known_hosts("127.0.0.1", ["Proxy.Example"])
    assert status(allowed, "proxy.example:443") == status(allowed, "localhost") == 200
    assert known_hosts("0.0.0.0", []) == () and status((), "any.example") == 200
    only = known_hosts("0.0.0.0", ["proxy.example"])
    assert status(only, "proxy.example") == 200 and status(only, "any.example") == 403

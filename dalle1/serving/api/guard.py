"""What is asked of every request before a route sees it: a key, a body that is not too large, and
a client that sends and reads in time."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dalle1.serving.api.errors import ApiError
from dalle1.serving.api.settings import ServerSettings

# Of a body that is too large so much is read and dropped: most clients read no answer before they
# have sent everything.
MOST_DROPPED = 100_000_000


class _TooSlow(Exception):
    """A client does not read."""


class Guard:
    """An ASGI application behind checks, for the paths that are named."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        paths: tuple[str, ...],
        without_key: tuple[str, ...] = (),
    ) -> None:
        """
        Args:
            app: what is guarded.
            settings: limits and keys.
            paths: beginnings of those that are checked.
            without_key: beginnings of those among them that ask for no key.
        """
        self.app, self.settings, self.paths = app, settings, paths
        self.without_key = without_key
        self._keys = [_digest(key.encode()) for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(self.paths):
            await self.app(scope, receive, send)
            return
        body = _Body(receive, self.settings)
        try:
            if not scope["path"].startswith(self.without_key):
                self._check_key(scope["headers"])
        except ApiError as error:
            await send_error(send, error)
            return
        try:
            await self.app(scope, body.receive, self._in_time(send))
        except _TooSlow:
            return  # the server closes the connection

    def _check_key(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises ApiError where a key is asked for and none of ours is shown."""
        if not self._keys:
            return
        shown = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = shown.partition(b" ")
        found = _digest(key.strip())
        # All are compared, in a time that tells nothing.
        same = [hmac.compare_digest(found, own) for own in self._keys]
        if scheme.lower() != b"bearer" or not any(same):
            message = "a key is needed: send the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")

    def _in_time(self, send: Send) -> Send:
        async def in_time(message: Message) -> None:
            try:
                await asyncio.wait_for(send(message), self.settings.send_seconds)
            except asyncio.TimeoutError as error:
                raise _TooSlow from error

        return in_time


class _Body:
    """A request's body as it comes in, counted and timed."""

    def __init__(self, receive: Receive, settings: ServerSettings) -> None:
        self._receive, self.settings = receive, settings
        self._deadline = time.monotonic() + settings.body_seconds
        self._bytes = 0
        self._complete = False

    async def receive(self) -> Message:
        """The next message; ApiError where the body is too large or takes too long."""
        while not self._complete:
            message = await self._next()
            self._complete = not message.get("more_body", False)
            if message["type"] != "http.request":
                return message
            self._bytes += len(message.get("body", b""))
            most = self.settings.body_bytes
            if self._bytes <= most:
                return message
            if self._complete or self._bytes > MOST_DROPPED:
                self._complete = True
                raise ApiError(
                    413, f"body: expected at most {most:,} bytes, got more", None, "body_too_large"
                )
        return await self._receive()  # that the client has left

    async def _next(self) -> Message:
        left = self._deadline - time.monotonic()
        try:
            return await asyncio.wait_for(self._receive(), max(0.001, left))
        except asyncio.TimeoutError as error:
            self._complete = True
            seconds = self.settings.body_seconds
            message = f"body: expected all of it within {seconds:g} s"
            raise ApiError(408, message, None, "request_timeout") from error


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # of one length, so that none is told by the time


async def send_error(send: Send, error: ApiError) -> None:
    """Sends an error before a route is chosen; the connection is closed."""
    content = json.dumps(error.content()).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers += [(k.lower().encode(), v.encode()) for k, v in error.headers().items()]
    headers.append((b"content-length", str(len(content)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})

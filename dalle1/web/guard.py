"""What of Gradio the network can reach: what the page itself uses, and nothing else.

Gradio's application has addresses that serve files, take uploads into files, fetch addresses for a
client and describe the programming interface. The page needs none of them, so they do not exist.
Gradio also takes any input that looks like one of its file descriptions for a file, and opens or
downloads what it names; such inputs are refused.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

READ = (  # GET and HEAD
    r"/?",
    r"/(config|theme\.css|favicon\.ico|robots\.txt)",
    r"/(assets|static)/[\w./@-]+",
    r"/gradio_api/(queue/data|startup-events|theme\.css)",
    r"/gradio_api/heartbeat/[\w-]+",
)
WRITTEN = (r"/gradio_api/queue/join",)  # POST
HEADERS = {
    # The page's scripts and styles are its own; Gradio makes functions of texts, hence the evals.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' "
    "'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' "
    "data:; connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Guard:
    """An ASGI application around Gradio's.

    A request for another address gets 404, of another method 405, one of another site's page 403, a
    body that is larger than the limit 413, one that takes too long 408, and one that names a file
    400.
    """

    def __init__(self, app: ASGIApp, max_body: int, body_seconds: float) -> None:
        """
        Args:
            app: Gradio's application.
            max_body: bytes of a body.
            body_seconds: for which a client may send one.
        """
        self.app, self.max_body, self.body_seconds = app, max_body, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets
        path, method = _path(scope), scope["method"]
        headers = {k.lower(): v for k, v in scope["headers"]}
        if headers.get(b"sec-fetch-site") == b"cross-site" and method != "GET":
            await _refuse(send, 403, "requests of other sites are not taken")
        elif method in ("GET", "HEAD") and _among(path, READ):
            await self.app(scope, receive, _with_headers(send))
        elif method == "POST" and _among(path, WRITTEN):
            await self._with_body(scope, receive, send)
        elif _among(path, (*READ, *WRITTEN)):
            await _refuse(send, 405, f"{method} is not taken here")
        else:
            await _refuse(send, 404, "there is nothing here")

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads the body, at most the limit, and hands on what is JSON without files."""
        body = bytearray()
        deadline = time.monotonic() + self.body_seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.001, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                await _refuse(send, 408, f"expected all of it within {self.body_seconds:g} s")
                return
            if message["type"] != "http.request":  # the client is gone
                return
            body += message.get("body", b"")
            if len(body) > self.max_body:
                await _refuse(send, 413, f"expected at most {self.max_body:,} bytes")
                return
            if not message.get("more_body", False):
                break
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            await _refuse(send, 400, "expected JSON")
            return
        if _names_a_file(content):
            await _refuse(send, 400, "files are not taken: pictures travel as data URLs")
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self.app(scope, replay, _with_headers(send))


def _path(scope: Scope) -> str:
    """The path inside of the application, wherever that is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root) else path


def _among(path: str, patterns: tuple[str, ...]) -> bool:
    return ".." not in path and any(re.fullmatch(pattern, path) for pattern in patterns)


def _names_a_file(content: Any) -> bool:
    """Whether Gradio could take a part of an input for a file: {"path": ..., "meta": {...}}."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "path" in value:
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return sending


async def _refuse(send: Send, status: int, why: str) -> None:
    body = json.dumps({"detail": why}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""What of Gradio the network reaches, asked of the running page without a browser."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from dalle1.web.guard import Guard
from tests.web.conftest import SECONDS, Server

# Addresses of Gradio's that read or write files, fetch addresses or describe the inside.
CLOSED = (
    "/gradio_api/file=/etc/passwd", "/gradio_api/file=README.md", "/gradio_api/file/etc/passwd",
    "/file=/etc/passwd", "/file/etc/passwd", "/gradio_api/proxy=http://127.0.0.1/",
    "/gradio_api/info", "/gradio_api/openapi.json", "/openapi.json", "/docs", "/redoc",
    "/gradio_api/app_id", "/gradio_api/runs", "/gradio_api/token", "/monitoring", "/dev/reload",
    "/gradio_api/upload_progress?upload_id=a", "/gradio_api/vibe-code", "/gradio_api/deep_link",
    "/gradio_api/stream/a/b/1/playlist.m3u8", "/custom_component/1/client/component/index.js",
    "/gradio_api/custom_component/1/client/component/index.js", "/login", "/manifest.json",
    "/svelte/../../../etc/passwd", "/static/../../../../../../etc/passwd",
    "/assets/..%2f..%2f..%2f..%2f..%2fetc%2fpasswd", "/static/%2e%2e/%2e%2e/routes.py",
)  # fmt: skip
CLOSED_POSTS = (
    "/gradio_api/upload", "/upload", "/gradio_api/run/draw", "/gradio_api/call/draw",
    "/gradio_api/api/draw", "/gradio_api/component_server", "/gradio_api/process_recording",
    "/gradio_api/vibe-edit", "/gradio_api/reset", "/gradio_api/cancel", "/login",
    "/gradio_api/run-history/connect", "/gradio_api/stream/a",
)  # fmt: skip


def ask(
    server: Server, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of an answer."""
    request = Request(server.address.rstrip("/") + path, body, headers or {})
    try:
        with urlopen(request, timeout=SECONDS) as answer:
            return answer.status, answer.read(), {k.lower(): v for k, v in answer.headers.items()}
    except HTTPError as error:
        return error.code, error.read(), {}


def join(server: Server, data: list[Any], **more: Any) -> int:
    body = {"data": data, "fn_index": 0, "session_hash": "test", **more}
    head = {"content-type": "application/json"}
    return ask(server, "/gradio_api/queue/join", json.dumps(body).encode(), head)[0]


def test_the_page_is_there(server: Server) -> None:
    """A guard that keeps out the page's own files."""
    status, body, headers = ask(server, "/")
    assert status == 200 and b"dalle1" in body
    assert "default-src 'self'" in headers["content-security-policy"]
    assert ask(server, "/theme.css")[0] == 200
    assert ask(server, "/config")[0] == 200


def test_nothing_of_the_server_is_read(server: Server) -> None:
    """An address of Gradio's by which a visitor reads files or the inside of the server."""
    for path in CLOSED:
        status, body, _ = ask(server, path)
        assert status == 404, path
        assert b"root:" not in body


def test_nothing_is_written_or_called(server: Server) -> None:
    """An upload that becomes a file, or a function that is called past the queue."""
    uploads = Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio")
    before = sorted(uploads.rglob("*")) if uploads.exists() else []
    form = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhi\r\n--x--'
    )
    for path in CLOSED_POSTS:
        head = {"content-type": "multipart/form-data; boundary=x"}
        assert ask(server, path, form, head)[0] == 404, path
    assert (sorted(uploads.rglob("*")) if uploads.exists() else []) == before


def test_inputs_that_name_files_are_refused(server: Server, tmp_path: Path) -> None:
    """A description of a file in place of a text, which Gradio opens or downloads."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    meta = {"_type": "gradio.FileData"}
    for path in (str(secret), "/etc/passwd", "http://127.0.0.1:9/a.png"):
        described = {"path": path, "meta": meta}
        assert join(server, [described]) == 400
        assert join(server, [{"deep": [{"in": described}]}]) == 400
        assert join(server, [], event_data={"picture": described}) == 400


def test_bodies_that_are_no_messages_are_refused(server: Server) -> None:
    """A body that ends in a traceback, or is read until the memory is full."""
    head = {"content-type": "application/json"}
    join_at = "/gradio_api/queue/join"
    assert ask(server, join_at, b"{", head)[0] == 400
    assert ask(server, join_at, b"[" * 100_000, head)[0] == 400
    assert ask(server, join_at, b'"' + b"x" * 300_000 + b'"', head)[0] == 413
    assert ask(server, join_at)[0] == 405
    assert ask(server, "/", b"{}", head)[0] == 405


def test_other_sites_cannot_draw(server: Server) -> None:
    """A page elsewhere that uses the visitor's browser to draw here."""
    head = {"content-type": "application/json", "sec-fetch-site": "cross-site"}
    assert ask(server, "/gradio_api/queue/join", b"{}", head)[0] == 403


@pytest.mark.parametrize("path", ["/", "/config"])
def test_no_path_of_the_server_is_told(server: Server, path: str) -> None:
    """Folders of the server's in what every visitor gets."""
    _, body, _ = ask(server, path)
    for folder in (str(Path.home()), tempfile.gettempdir(), str(Path(__file__).parents[2])):
        if len(folder) > 4:
            assert folder.encode() not in body
    assert b"site-packages" not in body


def test_nothing_comes_from_elsewhere(server: Server) -> None:
    """Fonts, scripts or counters of other servers."""
    _, body, _ = ask(server, "/theme.css")
    assert b"http" not in body.replace(b"http://www.w3.org", b"")
    _, config, _ = ask(server, "/config")
    assert b"fonts.googleapis" not in config


def test_a_body_that_does_not_come_is_given_up() -> None:
    """A client that sends a head and no body, and keeps its connection for ever."""
    sent: list[Any] = []

    async def app(*_: Any) -> None:
        raise AssertionError("the body was not there")

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/gradio_api/queue/join", "method": "POST", "headers": []}
    asyncio.run(Guard(app, 1000, 0.05)(scope, receive, send))
    assert sent[0]["status"] == 408

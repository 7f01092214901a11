"""Bad input and bad clients: each the right status and one line, and the server goes on."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle1 import Model
from dalle1.generation.generator import Generator
from tests.serving.conftest import Served, serving

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("python_multipart")

CAPTION = "a red cat"
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


@pytest.fixture(scope="module")
def served(model: Model) -> Iterator[Served]:
    with serving({"tiny": model}, {"letters": 200}, image_pixels=10_000, body_bytes=50_000) as s:
        yield s
        # After all that, it still draws.
        assert post(s, GENERATIONS, json.dumps({"prompt": CAPTION}).encode())[0] == 200


def post(
    served: Served, path: str, data: bytes, kind: str = "application/json"
) -> tuple[int, dict[str, Any]]:
    """Status and body of an answer."""
    request = Request(served.url + path, data, {"Content-Type": kind}, method="POST")
    try:
        with urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)


def form(fields: dict[str, str], files: list[tuple[str, bytes]]) -> tuple[bytes, str]:
    """A multipart body and its type."""
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    for name, data in files:
        head = f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="f"\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join([*parts, b"--x--\r\n"]), "multipart/form-data; boundary=x"


def edit(
    served: Served, fields: dict[str, str], files: list[tuple[str, bytes]]
) -> tuple[int, dict[str, Any]]:
    return post(served, EDITS, *form({"prompt": CAPTION, "rows": "2", **fields}, files))


def check(answer: tuple[int, dict[str, Any]], status: int, param: str | None, text: str) -> None:
    """An answer is the API's error, in one line, and says what it should."""
    found, body = answer
    error = body["error"]
    assert set(body) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert (found, error["param"]) == (status, param), error
    assert text in error["message"] and "\n" not in error["message"]
    assert len(error["message"]) < 320
    kinds = ("server_error",) if status >= 500 else ("invalid_request_error", "rate_limit_error")
    assert error["type"] in kinds


def picture(size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind)
    return file.getvalue()


def bomb(side: int = 50_000) -> bytes:
    """A PNG of a few hundred bytes that says that it has billions of pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("changes", "status", "param", "text"),
    [
        ({"prompt": ""}, 400, "prompt", "expected text"),
        ({"prompt": "  \n"}, 400, "prompt", "expected text"),
        ({"prompt": "x" * 201}, 400, "prompt", "at most 200 letters, got 201"),
        ({"prompt": "cat dog " * 20}, 400, "prompt", "fits the model's 10 text positions"),
        ({"prompt": 5}, 400, "prompt", "string"),
        ({"prompt": None}, 400, "prompt", "string"),
        ({"prompt": "\ud800"}, 400, "prompt", ""),
        ({"n": 10_000}, 400, "n", "at most 10, got 10000"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"n": 10**30}, 400, "n", ""),
        ({"n": "2"}, 400, "n", "integer"),
        ({"n": True}, 400, "n", "integer"),
        ({"size": "1024x1024"}, 400, "size", "expected 8x8, got '1024x1024'"),
        ({"model": "other"}, 404, "model", "none called 'other'"),
        ({"candidates": 10_000}, 400, "candidates", "at most 512"),
        ({"candidates": 1, "n": 2}, 400, "candidates", "at least n = 2"),
        ({"temperature": -1}, 400, "temperature", ""),
        ({"temperature": 1e400}, 400, "temperature", ""),
        ({"top_p": 0}, 400, "top_p", ""),
        ({"guidance": 1e9}, 400, "guidance", ""),
        ({"seed": 1.5}, 400, "seed", ""),
        ({"background": "transparent"}, 400, "background", "opaque"),
        ({"output_format": "gif"}, 400, "output_format", "webp"),
        ({"partial_images": 4}, 400, "partial_images", ""),
        ({"temprature": 1}, 400, "temprature", "no such parameter"),
        ({"rows": 2}, 400, "rows", "no such parameter"),
    ],
)
def test_generations(
    served: Served, changes: dict[str, Any], status: int, param: str, text: str
) -> None:
    """A mistake that ends in a 500, in another image than asked for, or in silence."""
    body = json.dumps({"prompt": CAPTION, **changes}).replace("Infinity", "1e400").encode()
    check(post(served, GENERATIONS, body), status, param, text)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"prompt": NaN}', b"[" * 40_000, b"1" * 10_000],
)
def test_no_json(served: Served, body: bytes) -> None:
    """A body that is none."""
    check(post(served, GENERATIONS, body), 400, None, "body: expected")


def test_missing_and_unknown(served: Served) -> None:
    """An error in the framework's form, which clients do not understand."""
    check(post(served, GENERATIONS, b"{}"), 400, "prompt", "is missing")
    check(post(served, "/v1/other", b"{}"), 404, None, "there is no /v1/other")
    check(post(served, "/v1/models", b"{}"), 405, None, "POST is not for /v1/models")
    check(post(served, EDITS, b"{}"), 400, None, "expected multipart/form-data")


@pytest.mark.parametrize(
    ("fields", "files", "status", "param", "text"),
    [
        ({}, [], 400, "image", "expected one file, got 0"),
        ({}, [("image", picture()), ("image[]", picture())], 400, "image", "got 2"),
        ({"image": "/etc/passwd"}, [], 400, "image", "expected a file, got text"),
        ({}, [("image", b"/etc/passwd")], 400, "image", "none that can be read"),
        ({}, [("image", b"")], 400, "image", "none that can be read"),
        ({}, [("image", picture()[:45])], 400, "image", "none that can be read"),
        ({}, [("image", picture(kind="GIF"))], 400, "image", "PNG, JPEG, WEBP"),
        ({}, [("image", bomb())], 400, "image", "expected at most 10,000"),
        ({}, [("image", picture((9, 8)))], 400, "image", "expected 8x8 pixels, got 9x8"),
        ({"rows": "4"}, [("image", picture())], 400, "rows", "expected 1 to 3"),
        ({"rows": "x"}, [("image", picture())], 400, "rows", "integer"),
        ({"rows": "0"}, [("image", picture())], 400, "rows", ""),
        ({}, [("image", picture()), ("mask", picture())], 400, "mask", "no such parameter"),
        ({"prompt": ""}, [("image", picture())], 400, "prompt", "expected text"),
        ({"n": "10000"}, [("image", picture())], 400, "n", "at most 10"),
        ({"image": "a"}, [("image", picture())], 400, "image", "got text"),
    ],
)
def test_edits(
    served: Served,
    fields: dict[str, str],
    files: list[tuple[str, bytes]],
    status: int,
    param: str,
    text: str,
) -> None:
    """A picture that takes the memory, names a file of the server's, or is none."""
    check(edit(served, fields, files), status, param, text)


FIELD = b"--x\r\nContent-Disposition: form-data; name="


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "multipart/form-data"),
        (b"--x\r\n", "multipart/form-data; boundary=x"),
        (b"\r\n\r\n--y--", "multipart/form-data; boundary=x"),
        (b"--x\r\nContent-Disposition: no\r\n\r\n1\r\n--x--", "multipart/form-data; boundary=x"),
        (form({str(i): "1" for i in range(100)}, [])[0], "multipart/form-data; boundary=x"),
        (FIELD + b'"prompt"\r\n\r\n\xff\xfe\r\n--x--', "multipart/form-data; boundary=x"),
        (FIELD + b'"a"\r\n\r\n1\r\n--x--', "multipart/form-data; boundary=x; charset=none"),
    ],
)
def test_no_form(served: Served, body: bytes, kind: str) -> None:
    """A form that ends in a 500."""
    status, content = post(served, EDITS, body, kind)
    assert status == 400 and content["error"]["message"]


def test_a_body_that_is_too_large(served: Served) -> None:
    """An upload that fills the memory."""
    large = json.dumps({"prompt": "x" * 60_000}).encode()
    check(post(served, GENERATIONS, large), 413, None, "at most 50,000 bytes")
    check(edit(served, {}, [("image", bytes(2_000_000))]), 413, None, "at most 50,000 bytes")


def exchange(served: Served, sent: bytes, seconds: float = 30) -> bytes:
    """What the server says until it closes the connection."""
    with socket.create_connection((served.host, served.port), seconds) as connection:
        connection.sendall(sent)
        received = b""
        while data := connection.recv(65536):
            received += data
    return received


def test_slow_clients(model: Model) -> None:
    """A client that sends nothing, half of a head or half of a body, and holds its connection."""
    with serving({"tiny": model}, head_seconds=0.3, body_seconds=0.3) as served:
        assert exchange(served, b"") == b""
        assert exchange(served, b"GET /health HTTP/1.1\r\nHost: ") == b""
        with socket.create_connection((served.host, served.port), 30) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in connection.recv(65536)
            connection.sendall(b"GET /hea")  # a second head, which stops
            while connection.recv(65536):
                pass
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
        answer = exchange(served, head + b'"prompt":')
        assert b"408" in answer.splitlines()[0] and b"within 0.3 s" in answer


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(
    served: Served, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """A device that draws for a client that is gone."""
    plain, rows = Generator.draw, []
    began, noticed = threading.Event(), threading.Event()

    def draw(self: Generator, text: Any, uniforms: Any, prefix: Any, on_step: Any) -> Tensor:
        def on_row(done: int, tokens: Tensor) -> None:
            rows.append(done)
            began.set()
            assert noticed.wait(60)
            on_step(done, tokens)

        return plain(self, text, uniforms, prefix, on_row)

    monkeypatch.setattr(Generator, "draw", draw)
    before = served.metric('dalle1_jobs_total{device="cpu",outcome="cancelled"}')
    body = {"prompt": CAPTION, "candidates": 200, "stream": stream, "partial_images": 3}
    data = json.dumps(body).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((served.host, served.port), 30) as connection:
        connection.sendall(head.encode() + data)
        assert began.wait(60)
    while served.worker.waiting:
        time.sleep(0.01)
    after = served.metric('dalle1_jobs_total{device="cpu",outcome="cancelled"}')
    assert after == before + 1
    monkeypatch.undo()
    noticed.set()
    assert post(served, GENERATIONS, json.dumps({"prompt": CAPTION}).encode())[0] == 200
    assert len(rows) == 1


def test_a_client_that_does_not_read(model: Model) -> None:
    """An answer that waits for ever for a client to take it."""

    from dalle1.serving.api.guard import Guard
    from dalle1.serving.api.settings import ServerSettings

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start"})
        raise AssertionError("went on")

    async def stuck(message: Any) -> None:
        await asyncio.sleep(60)

    async def call() -> None:
        guarded = Guard(app, ServerSettings(send_seconds=0.05), ("/v1/",))
        scope = {"type": "http", "path": "/v1/x", "headers": []}
        await asyncio.wait_for(guarded(scope, None, stuck), 10)  # type: ignore[arg-type]

    asyncio.run(call())


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 507), (errno.EIO, 500)])
def test_a_disk_that_is_full(
    served: Served, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    """A server that ends with its disk, or a link to half a file."""
    from dalle1.serving.api import image_files

    def fail(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(number, "no")

    monkeypatch.setattr(image_files, "write", fail)
    body = json.dumps({"prompt": CAPTION, "response_format": "url"}).encode()
    check(post(served, GENERATIONS, body), status, None, "ask for response_format b64_json")
    monkeypatch.undo()
    assert post(served, GENERATIONS, body)[0] == 200


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (RuntimeError("secret of the machine"), 500, "could not be made: RuntimeError"),
        (torch.OutOfMemoryError("tried to allocate"), 503, "ask for fewer candidates"),
        (ValueError("dtype: expected finite logits, got NaN"), 400, "finite logits"),
    ],
)
def test_drawing_that_fails(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, text: str
) -> None:
    """An error whose insides are told to strangers, or that ends a stream without a word."""

    def fail(*_: object) -> Tensor:
        raise error

    monkeypatch.setattr(Generator, "draw", fail)
    answer = post(served, GENERATIONS, json.dumps({"prompt": CAPTION}).encode())
    check(answer, status, "dtype" if status == 400 else None, text)
    assert "secret" not in str(answer)
    stream = json.dumps({"prompt": CAPTION, "stream": True}).encode()
    request = Request(served.url + GENERATIONS, stream, {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as response:
        event, data = response.read().decode().strip().split("\n")
    assert (
        event == "event: error"
        and text in json.loads(data.removeprefix("data: "))["error"]["message"]
    )


def test_files_go_after_their_time(tmp_path: Path) -> None:
    """A folder that grows for ever, a link that holds for ever, or images left behind."""
    from dalle1.serving.api.image_files import ImageFiles

    with ImageFiles(seconds=60, max_bytes=25) as files:
        names = [files.add(bytes([i]) * 10, "png") for i in range(3)]
        assert len(set(names)) == 3 and min(map(len, names)) > 30
        assert files.find(names[0]) is None  # 30 bytes are too many
        assert files.find(names[1]) == b"\1" * 10
        assert len(list(files.folder.iterdir())) == 2
    assert not files.folder.exists()
    with ImageFiles(seconds=0, max_bytes=25) as files:
        assert files.find(files.add(b"x", "png")) is None
        assert not list(files.folder.iterdir())

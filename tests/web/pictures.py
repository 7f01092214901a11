"""Pictures as a browser sends them, good and bad."""

from __future__ import annotations

import base64
import io
import struct
import zlib

from PIL import Image

from dalle1.web.uploads import data_url


def picture(width: int = 8, height: int = 8, color: str = "red", kind: str = "png") -> str:
    """A data URL of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, format=kind.upper())
    return data_url(buffer.getvalue(), kind)


def bomb(side: int = 30_000) -> str:
    """A PNG of a few hundred bytes that says it has side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(10_000))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return data_url(data)


def text_url(text: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(text.encode()).decode()}"


# What is no picture, and a word of the line that says so.
BAD = {
    "a path": ("/etc/passwd", "uploaded"),
    "an address": ("http://127.0.0.1/secret.png", "uploaded"),
    "a file's address": ("file:///etc/passwd", "uploaded"),
    "no text": ({"path": "/etc/passwd"}, "uploaded"),
    "no base 64": ("data:image/png,abc", "base 64"),
    "damaged base 64": ("data:image/png;base64,a*b", "damaged"),
    "a text": (text_url("hello"), "cannot be read"),
    "nothing": ("data:image/png;base64,", "cannot be read"),
    "an SVG": (text_url('<svg xmlns="http://www.w3.org/2000/svg"/>'), "cannot be read"),
    "a bomb": (bomb(), "pixels"),
    "too many bytes": ("data:image/png;base64," + "A" * 100_000, "at most"),
}

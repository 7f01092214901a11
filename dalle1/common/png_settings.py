"""What an image was drawn with, written into its PNG and read back.

The settings are JSON in a text chunk of the PNG standard with the keyword "dalle1"; see
`PngSettings`. Programs that know nothing of it show the image as before. Reading takes no pixels:
the file's chunks are walked through, and only a text chunk of this keyword is looked into.
"""

from __future__ import annotations

import io
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dalle1.common.files import expand_home, replacing
from dvae.storage import LISTED, SHOWN

KEYWORD = "dalle1"
FORMAT = 1
SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
# Bytes of a text chunk, before and after decompression. Pillow refuses larger ones in files
# (PngImagePlugin.MAX_TEXT_CHUNK), so none is written.
MAX_TEXT = 2**20
LARGEST = 2**31 - 1
COMPLETION = (
    "This image completes another one, of which it has the first rows. That one is not in this "
    "file and is needed to draw the same image again."
)


class PngSettings(BaseModel):
    """The settings of one image. An unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    format: Literal[1] = Field(1, description="of these settings")
    caption: str = Field(description="what was drawn", min_length=1)
    candidate: int = Field(description="number of this candidate", ge=0, le=2**63 - 1)
    seed: int = Field(description="of the random numbers")
    candidates: int = Field(description="that it was chosen among", ge=1, le=LARGEST)
    first_candidate: int = Field(0, description="number of their first", ge=0, le=2**63 - 1)
    keep: int = Field(description="best candidates that were kept", ge=1, le=LARGEST)
    temperature: float = Field(1.0, description="divides the logits", ge=0)
    top_k: int | None = Field(None, description="likeliest tokens that are kept", ge=1, le=LARGEST)
    top_p: float | None = Field(None, description="mass of the tokens kept", gt=0, le=1)
    guidance: float = Field(1.0, description="classifier-free; 1 is none", ge=0)
    window: int | None = Field(None, description="positions of a pass", ge=1, le=LARGEST)
    rows: int = Field(0, description="token rows of another image that this one completes", ge=0)
    dtype: str = Field("float32", description="of the prior's weights", max_length=40)
    score: float | None = Field(None, description="the ranker's")
    model: str | None = Field(
        None, description="fingerprint of the model (`Model.fingerprint`)", max_length=100
    )
    note: str | None = Field(None, description="what a reader should know", max_length=1000)


def write_png(
    image: Image.Image,
    path_or_file: str | os.PathLike[str] | BinaryIO,
    settings: Mapping[str, Any] | None,
) -> None:
    """Writes an image as a PNG with its settings inside.

    Args:
        image: of any mode that PNG knows.
        path_or_file: where to; a file at this path is replaced when the new one is complete. Or a
            file that is open for writing bytes.
        settings: those of `PngSettings`, by name; None: the image alone.

    Raises:
        ValueError: a setting is unknown, missing or wrong. Nothing is written then.
    """
    info = PngInfo()
    if settings is not None:
        info.add_text(KEYWORD, json.dumps(checked_settings(settings)))  # ASCII, as tEXt asks for
    if isinstance(path_or_file, str | os.PathLike):
        with replacing(Path(expand_home(path_or_file))) as temporary:
            image.save(temporary, format="PNG", pnginfo=info)
    else:
        image.save(path_or_file, format="PNG", pnginfo=info)


def png_bytes(image: Image.Image, settings: Mapping[str, Any] | None) -> bytes:
    """The PNG of `write_png` as bytes."""
    buffer = io.BytesIO()
    write_png(image, buffer, settings)
    return buffer.getvalue()


def read_png_settings(path_or_file: str | os.PathLike[str] | BinaryIO) -> dict[str, Any] | None:
    """The settings that `write_png` put into a PNG, checked; all those of `PngSettings`.

    Nothing of the file is trusted. No pixels are decoded, and no more memory is taken than a text
    chunk of MAX_TEXT bytes needs.

    Args:
        path_or_file: a path, or a file that is open for reading bytes and can seek. It is read
            from where it stands.

    Returns:
        The settings by name; None for a PNG without any, such as of another program.

    Raises:
        ValueError: it is no PNG, is cut short, or its settings are damaged, too large, unknown or
            wrong. The message names the file.
    """
    if not isinstance(path_or_file, str | os.PathLike):
        name = getattr(path_or_file, "name", None)
        return _read(path_or_file, f"image {name}" if isinstance(name, str) else "image")
    where = f"image {os.fspath(path_or_file)}"
    try:
        with open(expand_home(path_or_file), "rb") as file:
            return _read(file, where)
    except OSError as error:
        raise ValueError(f"{where}: cannot be read: {error.strerror or error}") from error


def sample_arguments(settings: Mapping[str, Any], alone: bool = False) -> dict[str, Any]:
    """The arguments of `dalle1.sample` that draw with settings of `read_png_settings`.

    With the same model they draw the same candidates and keep the same ones. The image that a
    completion begins with is not among them: where `rows` is not 0, `image` is to be given too.

    Args:
        alone: draws the image of the file and no other candidate.
    """
    names = ("candidates", "first_candidate", "keep", "temperature", "top_k", "top_p", "guidance")
    arguments = {name: settings[name] for name in (*names, "window", "rows", "seed")}
    arguments["captions"] = [settings["caption"]]
    if alone:
        arguments |= {"candidates": 1, "first_candidate": settings["candidate"], "keep": 1}
    return arguments


def checked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All of an image's settings, those that were left out with their defaults.

    Raises ValueError for one that is unknown, missing or wrong, and where they are too large.
    """
    checked = _checked(dict(settings), "settings")
    if checked["rows"] and checked["note"] is None:
        checked["note"] = COMPLETION
    size = len(json.dumps(checked))
    if size > MAX_TEXT - len(KEYWORD) - 1:
        raise ValueError(
            f"settings: expected at most {MAX_TEXT:,} bytes as JSON, got {size:,}; shorten the "
            "caption"
        )
    return checked


def _read(file: BinaryIO, where: str) -> dict[str, Any] | None:
    if file.read(len(SIGNATURE)) != SIGNATURE:
        raise ValueError(f"{where}: expected a PNG, got another kind of file")
    while True:
        head = file.read(8)
        if len(head) < 8:
            raise ValueError(f"{where}: expected a complete PNG, got one that is cut short")
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IEND":
            return None
        beginning = b""
        if kind in TEXT_CHUNKS:
            beginning = file.read(min(length, len(KEYWORD) + 1))
            if beginning == KEYWORD.encode() + b"\0":
                return _parsed(_text(file, kind, beginning, length, where), where)
        file.seek(length - len(beginning) + 4, os.SEEK_CUR)  # 4 bytes of checksum


def _text(file: BinaryIO, kind: bytes, beginning: bytes, length: int, where: str) -> str:
    """The text of our chunk, of which the keyword is read."""
    if length > MAX_TEXT:
        raise _too_large(where)
    data = file.read(length - len(beginning))
    checksum = file.read(4)
    if len(data) < length - len(beginning) or len(checksum) < 4:
        raise ValueError(f"{where}: expected a complete PNG, got one that is cut short")
    if zlib.crc32(kind + beginning + data) != int.from_bytes(checksum, "big"):
        raise ValueError(f"{where}: the settings are damaged: their checksum is wrong")
    compressed, encoding = kind == b"zTXt", "latin-1"
    if kind == b"zTXt":
        data = data[1:]  # the method of compression, of which there is one
    elif kind == b"iTXt":  # flag, method, language \0 translated keyword \0 text
        compressed, encoding = data[:1] == b"\1", "utf-8"
        data = data[2:].split(b"\0", 2)[-1]
    try:
        if compressed:
            inflate = zlib.decompressobj()
            data = inflate.decompress(data, MAX_TEXT)
            if inflate.unconsumed_tail:
                raise _too_large(where)
            if not inflate.eof:
                raise zlib.error("the compressed text is cut short")
        return data.decode(encoding)
    except (zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: the settings are damaged: {error}") from error


def _too_large(where: str) -> ValueError:
    return ValueError(
        f"{where}: expected settings of at most {MAX_TEXT:,} bytes, got more; dalle1 has not "
        "written them"
    )


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{where}: the settings are no JSON: {why}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected settings by name, got {type(content).__name__}")
    return _checked(content, where)


def _checked(content: dict[str, Any], where: str) -> dict[str, Any]:
    """All settings, with defaults for those that are left out."""
    found = content.get("format", FORMAT)
    if found != FORMAT or isinstance(found, bool):
        raise ValueError(
            f"{where}: expected settings of format {FORMAT}, got {_shown(found)}; a newer dalle1 "
            "may read them"
        )
    try:
        return PngSettings.model_validate(content).model_dump()
    except ValidationError as error:
        unknown = [str(e["loc"][0]) for e in error.errors() if e["type"] == "extra_forbidden"]
        lines = [
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}"
            + (f", got {_shown(e['input'])}" if e["type"] != "missing" else "")
            for e in error.errors()
            if e["type"] != "extra_forbidden"
        ]
        if unknown:
            names = ", ".join(map(_shown, unknown[:LISTED]))
            lines.insert(0, f"unknown settings {names}")
        raise ValueError(f"{where}: {'; '.join(lines[:LISTED])}") from error


def _shown(value: Any) -> str:
    """A value of a file in a message: one line, not long."""
    text = re.sub(r"\s+", " ", repr(value))
    return text if len(text) <= SHOWN else text[:SHOWN] + " ..."

"""Settings in a PNG: written as the standard has it, read without trust."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dalle1.common.png_settings import (
    KEYWORD,
    MAX_TEXT,
    PngSettings,
    png_bytes,
    read_png_settings,
    sample_arguments,
    write_png,
)

SETTINGS: dict[str, Any] = {
    "caption": "a “red” cat, 日本 \\ \n\0 👩‍👩‍👧",
    "candidate": 41,
    "seed": -3,
    "candidates": 512,
    "first_candidate": 7,
    "keep": 8,
    "temperature": 0.1 + 0.2,
    "top_k": 5,
    "top_p": 1 / 3,
    "guidance": 2,
    "window": None,
    "rows": 0,
    "dtype": "bfloat16",
    "score": 0.25,
    "model": "0123456789abcdef",
}
COMPLETE = {"format": 1, **SETTINGS, "note": None}


def image(mode: str = "RGB", width: int = 8) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (6, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    """A chunk as the PNG specification has it: length, type, data, CRC of type and data."""
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", checksum)


def png(*chunks: bytes) -> bytes:
    """A PNG of 1 x 1 pixels with chunks before its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    end = chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + end


def text(content: Any, **changes: Any) -> bytes:
    return (content if isinstance(content, str) else json.dumps({**content, **changes})).encode()


def read(data: bytes) -> dict[str, Any] | None:
    return read_png_settings(io.BytesIO(data))


def test_settings_come_back(tmp_path: Path) -> None:
    """A number that is rounded, a letter that is lost, or pixels that are not the image's."""
    path = tmp_path / "x.png"
    write_png(image(), path, SETTINGS)
    assert read_png_settings(path) == read_png_settings(str(path)) == COMPLETE
    assert read(png_bytes(image(), SETTINGS)) == COMPLETE
    assert path.read_bytes() == png_bytes(image(), SETTINGS)
    with Image.open(path) as saved:
        assert saved.tobytes() == image().tobytes() and saved.mode == "RGB"
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_other_programs_read_them() -> None:
    """A chunk that is not the standard's text, which only our own reader finds."""
    with Image.open(io.BytesIO(png_bytes(image(), SETTINGS))) as opened:
        assert isinstance(opened.info[KEYWORD], str)
        assert json.loads(opened.info[KEYWORD]) == COMPLETE


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "I;16"])
def test_a_png_without_settings(mode: str, tmp_path: Path) -> None:
    """An image of another program that is an error where it is only looked at."""
    other = PngInfo()
    other.add_text("Software", "dalle1")
    other.add_text("dalle10", "{}")
    other.add_itxt("Title", "日本", zip=True)
    picture = image("L").convert("I;16") if mode == "I;16" else image(mode)
    picture.save(tmp_path / "x.png", pnginfo=other)
    assert read_png_settings(tmp_path / "x.png") is None
    write_png(picture, tmp_path / "y.png", None)
    assert read_png_settings(tmp_path / "y.png") is None


@pytest.mark.parametrize(
    "written",
    [
        chunk(b"tEXt", b"dalle1\0" + text(SETTINGS)),
        chunk(b"zTXt", b"dalle1\0\0" + zlib.compress(text(SETTINGS))),
        chunk(b"iTXt", b"dalle1\0\0\0en\0Bild\0" + text(SETTINGS)),
        chunk(b"iTXt", b"dalle1\0\1\0\0\0" + zlib.compress(text(SETTINGS))),
        chunk(b"iTXt", b"dalle1\0\0\0\0\0" + json.dumps(SETTINGS, ensure_ascii=False).encode()),
    ],
    ids=["tEXt", "zTXt", "iTXt", "compressed iTXt", "iTXt in UTF-8"],
)
def test_all_forms_of_text(written: bytes) -> None:
    """Settings that are lost when another program saves the image, behind its pixels or packed."""
    assert read(png(written)) == COMPLETE
    whole = png()
    assert read(whole[:-12] + written + whole[-12:]) == COMPLETE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (text(SETTINGS, foo=1), r"unknown settings 'foo'"),
        (text(SETTINGS, seed="3"), r"seed: .*got '3'"),
        (text(SETTINGS, seed=True), r"seed: "),
        (text(SETTINGS, keep=0), r"keep: .*got 0"),
        (text(SETTINGS, candidate=-1), r"candidate: "),
        (text(SETTINGS, candidates=10**12), r"candidates: "),
        (text(SETTINGS, temperature=-1), r"temperature: "),
        (text(SETTINGS, top_p=1.5), r"top_p: "),
        (text(SETTINGS, caption=""), r"caption: "),
        (text(SETTINGS, caption=["a"]), r"caption: "),
        (text(SETTINGS, format=2), r"format 1, got 2; a newer dalle1"),
        (text(SETTINGS, format=True), r"format 1, got True"),
        (text({"caption": "a"}), r"candidate: Field required"),
        (text("[1]"), r"expected settings by name, got list"),
        (text("null"), r"expected settings by name, got NoneType"),
        (text("{"), r"no JSON"),
        (text(json.dumps(SETTINGS).replace("0.25", "NaN")), r"score: "),
        (text(json.dumps(SETTINGS).replace("0.25", "1e999")), r"score: "),
        (text(json.dumps(SETTINGS).replace("-3", "9" * 5000)), r"no JSON"),
        (text("[" * 100_000), r"nested too deeply"),
    ],
)
def test_what_is_no_setting_is_named(content: bytes, message: str) -> None:
    """A file from the network whose settings are taken as they are, or end in a traceback."""
    with pytest.raises(ValueError, match=rf"^image: .*{message}") as raised:
        read(png(chunk(b"tEXt", b"dalle1\0" + content)))
    assert len(str(raised.value)) < 1500 and "\n" not in str(raised.value)


def test_bombs() -> None:
    """Gigabytes of memory for a small file: text that unpacks to them, a length that claims them,
    pixels that nobody asked for."""
    bomb = zlib.compress(b" " * 100 * MAX_TEXT)
    for kind, head in ((b"zTXt", b"dalle1\0\0"), (b"iTXt", b"dalle1\0\1\0\0\0")):
        with pytest.raises(ValueError, match="settings of at most"):
            read(png(chunk(kind, head + bomb)))
    with pytest.raises(ValueError, match="settings of at most"):
        read(png(chunk(b"tEXt", b"dalle1\0" + b" " * MAX_TEXT)))
    claimed = png()[:33] + struct.pack(">I4s", 2**32 - 1, b"tEXt") + b"dalle1\0{}"
    with pytest.raises(ValueError, match="settings of at most"):
        read(claimed)
    elsewhere = png()[:33] + struct.pack(">I4s", 2**32 - 1, b"tEXt") + b"comment\0{}"
    with pytest.raises(ValueError, match="cut short"):
        read(elsewhere)
    huge = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    settings = chunk(b"tEXt", b"dalle1\0" + text(SETTINGS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", huge) + settings
        assert read(pixels) == COMPLETE


@pytest.mark.parametrize("cut", [0, 4, 8, 12, 40, 60, 150, -5, -13])
def test_a_file_that_is_cut_short(cut: int, tmp_path: Path) -> None:
    """A file of a broken download, answered with None as if it never had settings."""
    data = png_bytes(image(), None)[:cut]
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"^image .*x\.png: expected a (complete )?PNG"):
        read_png_settings(tmp_path / "x.png")


def test_damage_is_told(tmp_path: Path) -> None:
    """A flipped bit that changes a seed and draws something else."""
    written = chunk(b"tEXt", b"dalle1\0" + text(SETTINGS))
    assert read(png(written)) == COMPLETE
    damaged = png(written).replace(b'"seed": -3', b'"seed": -7')
    with pytest.raises(ValueError, match="checksum"):
        read(damaged)
    for data in (b"not deflate", zlib.compress(text(SETTINGS))[:-9]):
        with pytest.raises(ValueError, match="damaged"):
            read(png(chunk(b"zTXt", b"dalle1\0\0" + data)))
    with pytest.raises(ValueError, match="damaged"):
        read(png(chunk(b"iTXt", b"dalle1\0\0\0\0\0\xff")))
    for data in (b"", b"GIF89a", b"\xff\xd8\xff\xe0" + bytes(50)):
        with pytest.raises(ValueError, match="expected a PNG"):
            read(data)
    with pytest.raises(ValueError, match=r"image .*gone\.png: cannot be read: No such file"):
        read_png_settings(tmp_path / "gone.png")


def test_wrong_settings_are_not_written(tmp_path: Path) -> None:
    """A PNG that our own reader refuses, found when its settings are needed."""
    for changes in ({"foo": 1}, {"seed": "3"}, {"score": float("nan")}, {"caption": "x" * 2**20}):
        with pytest.raises(ValueError, match=r"^settings: "):
            write_png(image(), tmp_path / "x.png", {**SETTINGS, **changes})
    assert list(tmp_path.iterdir()) == []
    buffer = io.BytesIO()
    with pytest.raises(ValueError, match="caption: Field required"):
        write_png(image(), buffer, {"seed": 3})
    assert buffer.getvalue() == b""


def test_a_completion_says_what_is_missing() -> None:
    """Settings of a completed image that look as if the image could be drawn from them."""
    found = read(png_bytes(image(), {**SETTINGS, "rows": 3}))
    assert found is not None and found["rows"] == 3 and "completes another one" in found["note"]


def test_arguments_of_sample() -> None:
    """A setting that is written and never used again, or an image redrawn as another one."""
    arguments = sample_arguments(COMPLETE)
    kept = {"candidate", "format", "caption", "dtype", "score", "model", "note"}
    assert arguments == {
        "captions": [SETTINGS["caption"]],
        **{name: value for name, value in COMPLETE.items() if name not in kept},
    }
    assert arguments.keys() | kept == PngSettings.model_fields.keys() | {"captions"}
    alone = sample_arguments(COMPLETE, alone=True)
    changed = {"candidates": 1, "keep": 1, "first_candidate": 41}
    assert alone == {**arguments, **changed}

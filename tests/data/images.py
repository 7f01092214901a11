"""Images and tars for the tests of the data."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from dalle1.common.files import add_file


def encoded(number: int, kind: str = "PNG", mode: str = "RGB", side: int = 20) -> bytes:
    """An image of one grey, `side` high and 4 wider."""
    buffer = io.BytesIO()
    pixels = np.full((side, side + 4, 3), number % 250, np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write_members(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    """A tar of files by name, in a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            add_file(tar, name, data)
    return path


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> Path:
    """Samples of files by extension; their keys are the tar's name and their number."""
    return write_members(
        path,
        (
            (f"{path.stem}-{i:04d}.{extension}", data)
            for i, sample in enumerate(samples)
            for extension, data in sample.items()
        ),
    )


def good(count: int, first: int = 0) -> list[dict[str, bytes]]:
    """Samples that can be used, with numbers as captions."""
    return [{"png": encoded(i), "txt": f"number {i}".encode()} for i in range(first, first + count)]

"""Images that are answered as links: files of random names, for a limited time and size."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from dalle1.common.files import FULL
from dalle1.serving.api.errors import SERVER, ApiError


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    expires: float


class ImageFiles:
    """A temporary folder of images, which is removed in the end.

    A name is 192 random bits: whoever has it may see the image, and nobody can guess it. What a
    client sends is looked up in a table and never becomes a path.
    """

    def __init__(self, seconds: float, max_bytes: int) -> None:
        """
        Args:
            seconds: for which an image is kept.
            max_bytes: of all images together; of more, the oldest go.
        """
        self.seconds, self.max_bytes = seconds, max_bytes
        self.folder = Path(tempfile.mkdtemp(prefix="dalle1-images-"))
        self._files: OrderedDict[str, _File] = OrderedDict()  # the oldest first
        self._lock = threading.Lock()

    def __enter__(self) -> ImageFiles:
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, data: bytes, suffix: str) -> str:
        """Keeps an image; its name. Raises ApiError where it cannot be written."""
        name = f"{secrets.token_urlsafe(24)}.{suffix}"
        path = self.folder / name
        self._drop(len(data))
        try:
            write(path, data)
        except OSError as error:
            path.unlink(missing_ok=True)
            full = error.errno in FULL
            why = "the disk is full" if full else "the image could not be written"
            message = f"{why}; ask for response_format b64_json"
            raise ApiError(507 if full else 500, message, None, "storage", SERVER) from error
        with self._lock:
            self._files[name] = _File(path, len(data), time.monotonic() + self.seconds)
        return name

    def find(self, name: str) -> bytes | None:
        """An image's bytes; None where there is none of this name any more."""
        self._drop(0)
        with self._lock:
            file = self._files.get(name)
        try:
            return file.path.read_bytes() if file else None
        except FileNotFoundError:  # dropped since
            return None

    def _drop(self, wanted: int) -> None:
        """Removes what has expired, and the oldest where so many bytes find no room."""
        with self._lock:
            total = sum(file.size for file in self._files.values()) + wanted
            now, gone = time.monotonic(), []
            for name, file in self._files.items():
                if file.expires > now and total <= self.max_bytes:
                    break
                gone.append(name)
                total -= file.size
            paths = [self._files.pop(name).path for name in gone]
        for path in paths:
            path.unlink(missing_ok=True)


def write(path: Path, data: bytes) -> None:
    """Writes a file that nobody knows of yet."""
    path.write_bytes(data)

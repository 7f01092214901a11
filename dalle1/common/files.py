"""Files: text in UTF-8, written whole or not at all; paths as users type them; tars; full disks."""

from __future__ import annotations

import errno
import io
import itertools
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dvae.storage import make_folder as make_folder
from dvae.storage import replacing as replacing
from dvae.storage import sync as sync

FULL = (errno.ENOSPC, errno.EDQUOT)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, whatever the locale, without the mark (U+FEFF) that some editors put in
    front.

    Raises OSError, or UnicodeDecodeError (a ValueError) where it is no UTF-8.
    """
    return Path(path).read_text(encoding="utf-8-sig")


def expand_home(path: str) -> str:
    """A path or an address as it was typed, with the home folder for a `~` or `~user` in front.

    A shell leaves the `~` of `run=~/out` alone.
    """
    return os.path.expanduser(path)


def check_writable(folder: str | Path, name: str) -> None:
    """Raises ValueError where files cannot be written into a folder, which need not exist yet.

    To be called before the work whose results go there. Nothing of the attempt stays.

    Args:
        folder: where something is to be written.
        name: of the setting or option, for the message.
    """
    folder = Path(folder)
    missing: list[Path] = []
    try:
        # Tried, since permissions do not tell of read-only and virtual file systems.
        for parent in (folder, *folder.parents):
            if parent.exists():
                break
            missing.append(parent)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = "it is a file" if os.path.isfile(folder) else error.strerror or error
        raise ValueError(
            f"{name}: expected a folder that can be written, got {str(folder)!r} ({why}); name "
            "another"
        ) from error
    finally:
        for made in missing:
            with suppress(OSError):  # another process has written there meanwhile
                made.rmdir()


def put_aside(path: Path) -> Path:
    """Renames what is at a path, and is not ours to remove, to `path`.old; the new path."""
    names = (f"{path.name}.old{i or ''}" for i in itertools.count())
    aside = next(p for p in map(path.with_name, names) if not os.path.lexists(p))
    os.replace(path, aside)
    return aside


def flush(file: Any) -> None:
    """Waits until what was written to an open file is on the disk: a rename may get there first."""
    file.flush()
    os.fsync(file.fileno())


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file to a tar that is open for writing. The same content is the same bytes: the file
    has no time and no owner."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def size_text(count: int) -> str:
    """A number of bytes, for people."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


@contextmanager
def saying_what_is_missing(folder: Path, what: str, needed: int, hint: str = "") -> Iterator[None]:
    """An OSError of a full disk, in this block, becomes one that says how much is missing.

    Args:
        folder: where the disk is full.
        what: is written there.
        needed: bytes of it.
        hint: stands at the end of the message.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(folder).free
        lack = needed - free
        missing = f"{size_text(lack)} are missing" if lack > 0 else "the space is taken or barred"
        raise OSError(
            error.errno,
            f"{str(folder)!r} is full: {what} needs about {size_text(needed)}, {size_text(free)} "
            f"are free: {missing}{hint}",
        ) from error

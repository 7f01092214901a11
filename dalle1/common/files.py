"""Files: text in UTF-8, written whole or not at all; paths as users type them; tars; full disks."""

from __future__ import annotations

import errno
import io
import itertools
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dvae.storage import expand_home as expand_home
from dvae.storage import make_folder as make_folder
from dvae.storage import replacing as replacing
from dvae.storage import sync as sync

FULL = (errno.ENOSPC, errno.EDQUOT)
SLUG = 60  # letters of a text in a name, at most


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8; what is no character, such as a name's odd bytes, is escaped."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, whatever the locale, without the mark (U+FEFF) that some editors put in
    front.

    Raises OSError, or UnicodeDecodeError (a ValueError) where it is no UTF-8.
    """
    return Path(path).read_text(encoding="utf-8-sig")


def slug(text: str, empty: str) -> str:
    """A text as a part of a file's name: letters, digits, hyphens; `empty` where none is left."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:SLUG] or empty


def is_inside(name: str) -> bool:
    """Whether a path stays in the folder that it is put into, on every system."""
    return bool(name) and all(
        not path.anchor and ".." not in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def name_text(path: Path) -> str:
    """The name of a file as text, the same in every locale."""
    return os.fsencode(path.as_posix()).decode("utf-8", "surrogateescape")


def check_writable(folder: str | Path, name: str) -> None:
    """Raises ValueError where files cannot be written into a folder, which need not exist yet.

    To be called before the work whose results go there. Nothing of the attempt stays, and several
    ranks may call it at once. A full disk stays an OSError.

    Args:
        folder: where something is to be written.
        name: of the setting or option, for the message.
    """
    path = Path(folder).absolute()
    try:
        # Tried, since permissions do not tell of read-only and virtual file systems. What is
        # missing is made below a name of its own, which no other rank uses or removes.
        there = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
        with tempfile.TemporaryDirectory(dir=there) as made:
            (Path(made) / path.relative_to(there)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in FULL:
            raise
        why = "it is a file" if os.path.isfile(folder) else error.strerror or error
        raise ValueError(
            f"{name}: expected a folder that can be written, got {str(folder)!r} ({why}); name "
            "another"
        ) from error


def check_writable_file(path: Path, name: str) -> None:
    """The same for a file, which may exist; its folder need not."""
    if os.path.exists(path) and not os.path.isfile(path):
        why = "it is a folder" if os.path.isdir(path) else "it is a device"
        raise ValueError(
            f"{name}: expected a file that can be written, got {str(path)!r} ({why}); name another"
        )
    check_writable(path.parent, name)
    try:
        os.lstat(f"{path}.tmp")  # what `replacing` writes first
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ValueError(
            f"{name}: expected a file that can be written, got {str(path)!r} "
            f"({error.strerror or error}); name another"
        ) from error


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


def check_space(folder: Path, expected: int, name: str) -> None:
    """Raises ValueError where a disk has no room for so many bytes of shards.

    Args:
        folder: where they are to be written; need not exist yet.
        expected: bytes of them.
        name: of the setting or option, for the message.
    """
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < expected:
        raise ValueError(
            f"{name}: the shards need about {size_text(expected)} and {str(there)!r} has "
            f"{size_text(free)} free: {size_text(expected - free)} are missing"
        )


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

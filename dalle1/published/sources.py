"""Where other people's files lie: a file, a folder, an archive, or a cache of the Hugging Face Hub.

Nothing is fetched from a network unless the caller says so.
"""

from __future__ import annotations

import lzma
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dalle1.common.files import expand_home, is_inside
from dalle1.hub.cache import (
    CACHED,
    check_links,
    find_commit,
    held_commits,
    hub_cache,
    repository_folder,
    snapshot_folder,
)
from dalle1.hub.errors import HubUnreachableError, warn_of_cache
from dalle1.hub.names import MAIN, PREFIX, HubName, parse_source

Fetch = Callable[[HubName], Path]
# Weights hardly get smaller in an archive; one that unpacks to far more is made to fill a disk.
LARGEST_RATIO, SPARE = 20, 10**9
MAX_MEMBERS = 10_000
PART = 2**20  # bytes that are unpacked at once
LARGEST_HEADER = 2**20  # bytes of a tar's long name or attributes


@contextmanager
def opened(
    source: str | Path, work: Path | None = None, fetch: Fetch | None = None, name: str = "SOURCE"
) -> Iterator[Path]:
    """The file or folder that a source stands for, for as long as the block lasts.

    Args:
        source: a file or folder; an archive (tar, also compressed, or zip), which is unpacked; a
            folder of the Hub's cache; or `hub:OWNER/NAME[@REVISION][/FILE]`, which is looked for in
            that cache or fetched.
        work: folder for what is unpacked, which is removed afterwards; None: the system's.
        fetch: what fetches files of the Hub; None: they must be in the cache.
        name: of the argument, for messages.

    Raises:
        ValueError: there is no such source, or it is not safe to read.
        ConnectionError: the Hub cannot be reached.
    """
    if isinstance(source, str) and source.startswith(PREFIX):
        yield _from_hub(source, fetch)
        return
    path = Path(expand_home(source))
    if not path.exists():
        why = "a link to nothing" if os.path.lexists(path) else "nothing"
        raise ValueError(f"{name}: expected a file or folder, got {str(path)!r}, where is {why}")
    with _errors_of(path):
        is_archive = path.is_file() and _is_archive(path)
    if is_archive:
        with tempfile.TemporaryDirectory(prefix="unpacked-", dir=work) as folder:
            with _errors_of(path):
                _unpack(path, Path(folder))
            yield _only_folder(Path(folder))
        return
    if path.is_dir() and path.name.startswith(CACHED):
        path = _snapshot(path, None)
    cache = next((p for p in path.absolute().parents if p.name.startswith(CACHED)), None)
    if cache is not None:
        check_links(path, cache)
    yield path


def _from_hub(source: str, fetch: Fetch | None) -> Path:
    """A folder, or a file, of the Hub's cache on this machine."""
    name = parse_source(source)
    folder = repository_folder(hub_cache(), name.repository)
    if fetch is not None:
        try:
            path = fetch(name)
        except HubUnreachableError as error:
            if find_commit(folder, name.revision) is None:
                raise
            warn_of_cache(error)
        else:
            check_links(path, folder)
            return path
    hint = (
        "fetch it with --download, or as `hf download` does, or give a folder that holds the files"
    )
    if not folder.is_dir():
        raise ValueError(f"SOURCE: {source} is not in the cache {folder.parent}; {hint}")
    path = _snapshot(folder, name.revision)
    if name.file is not None:
        path /= name.file
        if not path.exists():
            raise ValueError(f"SOURCE: {source} is not in the cache: no {path}; {hint}")
    check_links(path, folder)
    return path


def _snapshot(folder: Path, revision: str | None) -> Path:
    """The folder of a revision, or of the newest one, of a repository in the cache."""
    commit = find_commit(folder, revision)
    if commit is None:
        there = ", ".join(held_commits(folder)) or "none"
        raise ValueError(
            f"SOURCE: {folder}: expected the revision {revision or MAIN}, got {there}; say which"
        )
    return snapshot_folder(folder, commit)


@dataclass(frozen=True)
class _Member:
    """A file or folder of an archive."""

    name: str
    size: int
    is_folder: bool
    is_file: bool
    read: Callable[[], IO[bytes] | None]


class _Entry(tarfile.TarInfo):
    """A member of a tar whose header does not take more memory than headers need.

    tarfile itself reads as many bytes of names, attributes and maps of holes as a header claims,
    and a compressed file of a few kilobytes may hold gigabytes of them.
    """

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("a file with holes")
        if self.size < 0 or (self.type in _HEADERS and self.size > LARGEST_HEADER):
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        entry: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return entry

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise tarfile.ReadError("a file with holes")


_HEADERS = {
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Raises ValueError, with the archive's name, for what the readers of archives raise."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{path}: a member is there twice: {error.filename}") from error
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        RuntimeError,  # a zip that is encrypted, or compressed in a way that is not supported
        OSError,
        EOFError,
        UnicodeError,  # a name in a zip
        zlib.error,
        lzma.LZMAError,
    ) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system; those of gzip and bz2 have no number
        raise ValueError(
            f"{path}: truncated, or no readable archive: {error}; fetch it again, or unpack it "
            "yourself and give the folder"
        ) from error


def _is_archive(path: Path) -> bool:
    """Whether a file is a tar, or a zip that is no file of torch.save (which is one, too)."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return not any(
                n.count("/") == 1 and n.endswith("/data.pkl") for n in archive.namelist()
            )
    try:
        tarfile.open(path, tarinfo=_Entry).close()
        return True
    except (tarfile.TarError, OSError, EOFError, lzma.LZMAError, zlib.error):
        return False


def _members(path: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.header_offset < 0:
                    raise zipfile.BadZipFile(f"bad offset of {info.filename!r}")
                kind = info.external_attr >> 28  # of Unix; 0 elsewhere, 8 a file, 10 a link
                yield _Member(
                    info.filename,
                    info.file_size,
                    info.is_dir(),
                    not info.is_dir() and kind in (0, 8),
                    lambda info=info: archive.open(info),  # type: ignore[misc]
                )
        return
    with tarfile.open(path, tarinfo=_Entry) as tar:
        for entry in tar:
            yield _Member(
                entry.name,
                entry.size,
                entry.isdir(),
                entry.isreg(),
                lambda entry=entry: tar.extractfile(entry),  # type: ignore[misc]
            )
        assert tar.fileobj is not None
        left = _most(path)
        while part := tar.fileobj.read(PART):  # to the end, where a compressed file's checksum is
            left -= len(part)
            if left < 0:
                raise tarfile.ReadError("what follows its members has no end")


def _most(path: Path) -> int:
    """Bytes that an archive may unpack to."""
    return SPARE + LARGEST_RATIO * path.stat().st_size


def _unpack(path: Path, folder: Path) -> None:
    """Unpacks the files of an archive, in their order; ValueError for one that is not safe."""
    left = _most(path)
    for count, member in enumerate(_members(path)):
        if count >= MAX_MEMBERS:
            raise ValueError(f"{path}: expected at most {MAX_MEMBERS:,} members, got more")
        if not is_inside(member.name):
            raise ValueError(f"{path}: the member {member.name!r} leads out of the archive")
        target = folder / member.name
        if member.is_folder:
            target.mkdir(parents=True, exist_ok=True)
            continue
        if not member.is_file:
            raise ValueError(f"{path}: expected files and folders, got {member.name!r}, a link")
        left -= member.size
        if left < 0:
            raise ValueError(
                f"{path}: unpacks to more than {LARGEST_RATIO} times its size at "
                f"{member.name!r}; unpack it yourself if that is right, and give the folder"
            )
        free = shutil.disk_usage(folder).free
        if member.size > free:
            raise ValueError(
                f"{path}: {member.name!r} needs {member.size:,} bytes in {folder.parent}, "
                f"{free:,} are free"
            )
        _unpack_file(path, member, target)


def _unpack_file(path: Path, member: _Member, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    done = 0
    content = member.read()
    assert content is not None  # of a file
    with content, open(target, "xb") as file:
        while part := content.read(PART):
            done += len(part)
            if done > member.size:
                break
            file.write(part)
    if done != member.size:
        raise ValueError(
            f"{path}: {member.name!r}: expected {member.size:,} bytes, got {done:,}; fetch the "
            "archive again"
        )


def _only_folder(folder: Path) -> Path:
    """The one folder in a folder, where that is all."""
    held = list(folder.iterdir())
    return held[0] if len(held) == 1 and held[0].is_dir() else folder

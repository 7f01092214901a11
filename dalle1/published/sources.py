"""Where other people's files lie: a file, a folder, an archive, or a cache of the Hugging Face Hub.

Nothing is fetched from a network unless the caller says so.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from dalle1.common.files import expand_home

HUB = "hub:"
ADDRESS = re.compile(
    r"hub:(?P<owner>[^/@]+)/(?P<name>[^/@]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?"
)
CACHED = "models--"  # in front of a repository's name in the cache
# Weights hardly get smaller in an archive; one that unpacks to far more is made to fill a disk.
LARGEST_RATIO, SPARE = 20, 10**9
MAX_MEMBERS = 10_000
PART = 2**20  # bytes that are unpacked at once
LARGEST_HEADER = 2**20  # bytes of a tar's long name or attributes


@contextmanager
def opened(
    source: str | Path, work: Path | None = None, download: bool = False, name: str = "SOURCE"
) -> Iterator[Path]:
    """The file or folder that a source stands for, for as long as the block lasts.

    Args:
        source: a file or folder; an archive (tar, also compressed, or zip), which is unpacked; a
            folder of the Hub's cache; or `hub:OWNER/NAME[@REVISION][/FILE]`, which is looked for in
            that cache.
        work: folder for what is unpacked, which is removed afterwards; None: the system's.
        download: whether what the cache lacks is fetched, by the package huggingface_hub.
        name: of the argument, for messages.

    Raises:
        ValueError: there is no such source, or it is not safe to read.
    """
    if isinstance(source, str) and source.startswith(HUB):
        yield _from_hub(source, download)
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
        _check_links(path, cache)
    yield path


def _from_hub(source: str, download: bool) -> Path:
    """A folder, or a file, of the Hub's cache on this machine."""
    match = ADDRESS.fullmatch(source)
    if match is None or (match["file"] and not _is_inside(match["file"])):
        raise ValueError(f"SOURCE: expected hub:OWNER/NAME[@REVISION][/FILE], got {source!r}")
    name, revision, file = f"{match['owner']}/{match['name']}", match["revision"], match["file"]
    if download:
        return _download(name, revision, file)
    cache = hub_cache()
    folder = cache / f"{CACHED}{match['owner']}--{match['name']}"
    hint = (
        "fetch it with --download, or as `hf download` does, or give a folder that holds the files"
    )
    if not folder.is_dir():
        raise ValueError(f"SOURCE: {source} is not in the cache {cache}; {hint}")
    path = _snapshot(folder, revision)
    if file is not None:
        path /= file
        if not path.exists():
            raise ValueError(f"SOURCE: {source} is not in the cache: no {path}; {hint}")
    _check_links(path, folder)
    return path


def hub_cache() -> Path:
    """The folder of the Hub's cache, by the variables that its own package reads."""
    variables = os.environ
    for name, below in (("HF_HUB_CACHE", "."), ("HUGGINGFACE_HUB_CACHE", "."), ("HF_HOME", "hub")):
        if variables.get(name):
            return Path(expand_home(variables[name])) / below
    home = variables.get("XDG_CACHE_HOME") or expand_home("~/.cache")
    return Path(home) / "huggingface" / "hub"


def _download(name: str, revision: str | None, file: str | None) -> Path:
    if find_spec("huggingface_hub") is None:
        raise ValueError(
            "--download: expected the package huggingface_hub, got none; "
            "`pip install huggingface_hub`"
        )
    import huggingface_hub

    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(name, file, revision=revision))
        return Path(huggingface_hub.snapshot_download(name, revision=revision))
    except Exception as error:  # of several libraries: no network, no such repository, a gate
        raise ValueError(f"--download: {name}: {error}") from error


def _snapshot(folder: Path, revision: str | None) -> Path:
    """The folder of a revision, or of the newest one, of a repository in the cache."""
    snapshots = folder / "snapshots"
    held = sorted(p.name for p in snapshots.iterdir()) if snapshots.is_dir() else []
    reference = folder / "refs" / (revision or "main")
    if revision in held:
        commit = revision
    elif reference.is_file():
        commit = reference.read_text(encoding="utf-8").strip()
    elif revision is None and len(held) == 1:
        (commit,) = held
    else:
        commit = None
    if commit not in held or commit is None:
        there = ", ".join(held) or "none"
        raise ValueError(
            f"SOURCE: {folder}: expected the revision {revision or 'main'}, got {there}; say which"
        )
    return snapshots / commit


def _check_links(path: Path, cache: Path) -> None:
    """Raises ValueError for a link that leads out of the repository's folder, or to nothing."""
    root = cache.resolve()
    files = [path] if path.is_file() or path.is_symlink() else []
    for folder, folders, names in os.walk(path):
        files += [Path(folder) / name for name in (*folders, *names)]
    for file in files:
        if not file.is_symlink():
            continue
        target = file.resolve()
        if root not in target.parents:
            raise ValueError(f"SOURCE: {file}: expected a link within {cache}, got one to {target}")
        if not target.exists():
            raise ValueError(
                f"SOURCE: {file}: a link to {target}, which is missing; fetch it again"
            )


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
        if not _is_inside(member.name):
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


def _is_inside(name: str) -> bool:
    """Whether a path stays in the folder that it is put into, on every system."""
    return bool(name) and all(
        not path.anchor and ".." not in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def _only_folder(folder: Path) -> Path:
    """The one folder in a folder, where that is all."""
    held = list(folder.iterdir())
    return held[0] if len(held) == 1 and held[0].is_dir() else folder

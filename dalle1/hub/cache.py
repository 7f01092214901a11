"""The Hub's cache on this machine, in the layout that its own package gives it.

    CACHE/models--OWNER--NAME/refs/main               a commit
    CACHE/models--OWNER--NAME/blobs/CHECKSUM          a file's content
    CACHE/models--OWNER--NAME/snapshots/COMMIT/FILE   a link to it, or a copy where links are barred

`hf download` and transformers find what is fetched here, and the other way round. A newer
huggingface_hub may keep blobs of several repositories in CACHE/blobs.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dalle1.common.files import expand_home, is_inside, make_folder, read_text, write_text
from dalle1.hub.names import MAIN

CACHED = "models--"  # in front of a repository's name
BLOBS, REFS, SNAPSHOTS = "blobs", "refs", "snapshots"
ABSENT = ".no_exist"  # below it, empty files stand for what a commit does not hold


def hub_cache(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the cache: the one that is named, else by the variables that the Hub's own
    package reads."""
    if cache_dir is not None:
        return Path(expand_home(cache_dir))
    variables = os.environ
    for name, below in (("HF_HUB_CACHE", "."), ("HUGGINGFACE_HUB_CACHE", "."), ("HF_HOME", "hub")):
        if variables.get(name):
            return Path(expand_home(os.path.expandvars(variables[name]))) / below
    home = variables.get("XDG_CACHE_HOME") or expand_home("~/.cache")
    return Path(home) / "huggingface" / "hub"


def repository_folder(cache: Path, repository: str) -> Path:
    """Where the cache keeps a repository, which it need not hold yet."""
    return cache / f"{CACHED}{repository.replace('/', '--')}"


def held_commits(folder: Path) -> list[str]:
    """The commits that a repository's folder holds files of."""
    snapshots = folder / SNAPSHOTS
    return sorted(p.name for p in snapshots.iterdir()) if snapshots.is_dir() else []


def find_commit(folder: Path, revision: str | None) -> str | None:
    """The commit of a revision, or of the newest one, as the cache knows it; None where it does
    not hold it."""
    held = held_commits(folder)
    if revision in held:
        return revision
    reference = folder / REFS / (revision or MAIN)
    if reference.is_file():
        commit = read_text(reference).strip()
        return commit if commit in held else None
    return held[0] if revision is None and len(held) == 1 else None


def snapshot_folder(folder: Path, commit: str) -> Path:
    """The folder of a commit, with the repository's own names of its files."""
    return folder / SNAPSHOTS / commit


def cached_file(folder: Path, commit: str, name: str) -> Path | None:
    """The path of a commit's file; None where the cache does not hold it.

    Raises ValueError where a link leads out of the cache.
    """
    path = snapshot_folder(folder, commit) / name
    if not path.is_file():
        return None
    check_links(path, folder)
    return path


def check_links(path: Path, folder: Path) -> None:
    """Raises ValueError for a link, of a repository's file or below a folder of it, that leads out
    of what the cache keeps of the repository, or to nothing.

    folder: the repository's, in the cache.
    """
    roots = (folder.resolve(), (folder.parent / BLOBS).resolve())
    files = [path] if path.is_file() or path.is_symlink() else []
    for below, folders, names in os.walk(path):
        files += [Path(below) / name for name in (*folders, *names)]
    for file in files:
        # A folder on the way may be a link, too.
        target = file.resolve()
        if not any(root in target.parents for root in roots):
            raise ValueError(
                f"SOURCE: {file}: expected a link within {folder}, got one to {target}; remove it"
            )
        if not target.exists():
            raise ValueError(
                f"SOURCE: {file}: a link to {target}, which is missing; fetch it again"
            )


def remember(folder: Path, revision: str, commit: str) -> None:
    """Writes down which commit a branch or tag is, for the time without a network."""
    path = folder / REFS / revision
    if revision == commit or (path.is_file() and read_text(path).strip() == commit):
        return
    make_folder(path.parent)
    write_text(path, commit)


def remember_absent(folder: Path, commit: str, name: str) -> None:
    """Writes down that a commit does not hold a file that some models have."""
    path = folder / ABSENT / commit / name
    make_folder(path.parent)
    path.touch()


def is_known_absent(folder: Path, commit: str, name: str) -> bool:
    """Whether that is written down."""
    return (folder / ABSENT / commit / name).is_file()


@contextmanager
def new_blob(folder: Path, checksum: str) -> Iterator[BinaryIO]:
    """A file to write a blob to, which is complete in the cache when the block ends and else gone.

    Its name while it is written is its own, so that several processes may fetch the same file.
    """
    blobs = folder / BLOBS
    make_folder(blobs)
    temporary = blobs / f"{checksum}.{secrets.token_hex(4)}.incomplete"
    try:
        with open(temporary, "xb+") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, blobs / checksum)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def link_blob(folder: Path, commit: str, name: str, checksum: str) -> Path:
    """Gives a blob the name that it has in a commit; the path of that name.

    Raises ValueError where the name leads out of the commit's folder.
    """
    blob, snapshot = folder / BLOBS / checksum, snapshot_folder(folder, commit)
    path = snapshot / name
    inside = is_inside(name) and snapshot.resolve() in (path.parent / "_").resolve().parents
    if not inside:
        raise ValueError(f"{name!r}: expected a name within the repository, got one that leads out")
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    _link(blob, temporary)
    os.replace(temporary, path)
    return path


def _link(blob: Path, path: Path) -> None:
    """A symbolic link; where the system bars them, as Windows may, another name or a copy."""
    with suppress(OSError):
        return os.symlink(os.path.relpath(blob, path.parent), path)
    with suppress(OSError):
        return os.link(blob, path)
    shutil.copyfile(blob, path)

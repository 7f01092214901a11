"""Names of files: which are data, and which shards, images and captions a folder holds.

What systems and tools leave beside the data (see `is_data`) is skipped by all that read: it is
neither a sample nor a bad one. Endings may be written in either case.
"""

from __future__ import annotations

import heapq
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from dalle1.data.samples import IMAGE_KEYS

TAR = ".tar"
TAR_ENDING = re.compile(r"\.(tar(\.\w+)?|tgz)$", re.IGNORECASE)
# What systems, file servers, backups and tools of versions keep: copies, previews, records.
NO_FOLDERS = frozenset(
    {
        *("__macosx", ".appledouble", ".appledb", ".appledesktop", ".spotlight-v100"),
        *(".trashes", ".trash", ".fseventsd", ".temporaryitems", ".documentrevisions-v100"),
        *("$recycle.bin", "system volume information", "lost+found", ".thumbnails", ".xvpics"),
        *("@eadir", "@__thumb", "@recycle", "#recycle", "#snapshot", ".snapshot", ".snapshots"),
        *("~snapshot", ".zfs", ".stversions", ".sync", ".dropbox.cache", ".tmp.drivedownload"),
        *(".ipynb_checkpoints", ".git", ".svn", "_svn", ".hg", "__pycache__"),
        *("recycler", "network trash folder", "temporary items", ".mobilebackups"),
        *(".@__thumb", ".thumbs", ".thumb", ".tmb", ".picasaoriginals", ".dtrash", ".comments"),
        *(".rsync-partial", ".~tmp~", "paxheader", "paxheaders"),
    }
)
# With a number behind: of each user, or of each run of a tar that knew no pax headers.
NO_FOLDERS_BEGIN = (".trash-", "paxheaders.", "paxheader.")
NO_FILES = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"),
        *("autorun.inf", "picasa.ini", "zbthumbnail.info", "pspbrwse.jbf", "descript.ion"),
        *("ws_ftp.log", "sync.ffs_db", "@longlink", "cachedir.tag"),
    }
)
STREAMS = (":zone.identifier", ":encryptable")  # of NTFS, where they became files
# Of several captions the first of these counts: .txt, then the first in the order of a listing.
CAPTION_ENDINGS = (".txt", ".TXT", ".TXt", ".TxT", ".Txt", ".tXT", ".tXt", ".txT")


def is_data(name: str) -> bool:
    """Whether a file or folder of this name may be a part of the data.

    Not so: hidden ones, such as the twin `._0001.jpg` that macOS writes beside `0001.jpg`; what
    systems keep their notes in, such as `Thumbs.db`; all that is in folders such as `__MACOSX`.
    Other hidden folders above a file do not count: the names in a tar may begin with the place
    where it was made.

    Args:
        name: of a member of a tar, or of a file or folder, relative to the one that is read.
    """
    *folders, last = name.rstrip("/").lower().split("/")
    if last.startswith(".") and last.strip("."):
        return False
    if last in NO_FILES or last.endswith(STREAMS):
        return False
    # What an office program or Emacs keeps beside a file that is open.
    if last.startswith("~$") or (last.startswith("#") and last.endswith("#")):
        return False
    parts = (*folders, last)
    return not any(part in NO_FOLDERS or part.startswith(NO_FOLDERS_BEGIN) for part in parts)


def is_tar(address: str) -> bool:
    """Whether an address ends as a tar that is not compressed."""
    return address.lower().endswith(TAR)


def shards_in(folder: str | Path, ending: str) -> list[str]:
    """The paths of a folder's files with an ending, sorted; none where there is no folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = (name for name in names if name.lower().endswith(ending) and is_data(name))
    paths = (Path(folder) / name for name in found)
    return sorted(str(path) for path in paths if not path.is_dir())  # such as an unpacked 0.tar


def count_skipped(folder: str | Path) -> int:
    """How many files of a folder of shards are no part of the data."""
    with os.scandir(folder) as entries:
        return sum(_count(entry) for entry in entries if not is_data(entry.name))


def walk(folder: str | Path) -> tuple[list[Path], int]:
    """The files of a folder and of those below it, sorted, and how many others are no data.

    Links are followed, those to nowhere are listed. Each folder is read once: under its own path if
    it lies below, else under that of the first link to it. A link to a folder that holds the link
    or all of this is a loop, and ends there.

    Raises:
        OSError: the folder cannot be read. Of those below, one that this user must not read is
            skipped with a warning.
    """
    top = Path(folder)
    around = os.path.realpath(top)
    files, skipped, read = list[Path](), 0, set[str]()
    waiting, links = [top], list[Path]()
    while waiting or links:
        # Links come last, so that what lies below keeps its path, and in order.
        linked = not waiting
        path = heapq.heappop(links) if linked else waiting.pop()
        real = os.path.realpath(path)
        loop = linked and (_holds(real, around) or _holds(real, os.path.realpath(path.parent)))
        if loop or real in read:
            continue
        read.add(real)
        for entry in _entries(path, top):
            inner = path / entry.name
            if not is_data(entry.name):
                skipped += _count(entry)
            elif entry.is_symlink():
                if os.path.isdir(inner):
                    heapq.heappush(links, inner)
                else:
                    files.append(inner)
            elif entry.is_dir():
                waiting.append(inner)
            elif entry.is_file():
                files.append(inner)
    return sorted(files), skipped


def _holds(folder: str, inner: str) -> bool:
    return os.path.commonpath([folder, inner]) == folder


def _entries(path: Path, top: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except (PermissionError, FileNotFoundError) as error:
        if path == top:
            raise
        warnings.warn(f"{path} cannot be read, what is in it is skipped: {error}", stacklevel=3)
        return []


def _count(entry: os.DirEntry[str]) -> int:
    """How many files an entry of a folder is."""
    if entry.is_dir(follow_symlinks=False):
        return sum(len(names) for _, _, names in os.walk(entry.path))
    return 1


@dataclass
class PairFolder:
    """The images of a folder with their captions, at any depth."""

    images: dict[Path, Path | None]  # in order, and the caption of each
    lonely: list[Path]  # captions without an image
    files: list[Path]  # these and others
    skipped: int  # files that are no part of the data


def read_folder(folder: str | Path) -> PairFolder:
    """Finds the images of a folder, and for each the .txt of the same name next to it.

    Raises:
        OSError: the folder cannot be read.
    """
    files, skipped = walk(folder)
    captions: dict[Path, Path] = {}  # by their paths without the ending
    for path in files:
        if path.suffix == ".txt":
            captions[path.with_suffix("")] = path
        elif path.suffix in CAPTION_ENDINGS:
            captions.setdefault(path.with_suffix(""), path)
    images = [path for path in files if path.suffix[1:].lower() in IMAGE_KEYS]
    pairs = {path: captions.get(path.with_suffix("")) for path in images}
    used = set(pairs.values())
    return PairFolder(
        pairs, [path for path in captions.values() if path not in used], files, skipped
    )


def caption_beside(image: Path) -> Path:
    """The caption that `read_folder` finds for an image; its .txt where there is none."""
    found = (path for end in CAPTION_ENDINGS if (path := image.with_suffix(end)).is_file())
    return next(found, image.with_suffix(".txt"))

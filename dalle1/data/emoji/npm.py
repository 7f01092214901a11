"""Packages fetched by the user's own npm, and unpacked with care.

npm decides where packages come from, as the user has set it up, and checks what it gets. A tarball
is still read as a stranger's: what leads out of its folder, links, and what is too large or many
are refused, and of the rest only the parts that are used are written.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from dalle1.common.files import check_writable, make_folder, size_text
from dalle1.data.emoji.packages import INSIDE, Package

KEPT = ("package.json", "LICENSE", "README.md")  # beside the parts that are used
MAX_FILES = 20_000  # in a tarball; the published ones have 3,809 at most
MAX_FILE = 32 * 2**20  # bytes of a file that is kept
MAX_KEPT = 128 * 2**20  # bytes of all of them
MAX_UNPACKED = 2**28  # bytes of a whole tarball, what is not kept included
PART = 2**20


def fetch_packages(
    packages: Sequence[Package], folder: Path, say: Callable[[str], None] = lambda _: None
) -> None:
    """Unpacks packages into `folder/STEM-VERSION/package`, each there only when it is complete.

    A tarball of the version that lies in the folder already is taken; npm is asked for the others.

    Args:
        packages: those that are wanted.
        folder: is made where it does not exist.
        say: takes a line before each package.

    Raises:
        ValueError: npm is not installed or fails, a tarball that is damaged or not safe, a folder
            that cannot be written.
        OSError: the disk is full.
    """
    check_writable(folder, "--packages")
    if any(not (folder / p.tarball).is_file() for p in packages):
        _npm()  # before anything is unpacked
    make_folder(folder)
    for package in packages:
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{package.stem}-") as made:
            tarball = folder / package.tarball
            if tarball.is_file():
                say(f"unpacking {tarball}")
            else:
                say(f"asking npm for {package.name}@{package.version}")
                tarball = _pack(package, Path(made))
            target = Path(made) / "unpacked"
            unpack(tarball, target, package.parts)
            target.replace(folder / package.tarball.removesuffix(".tgz"))


def unpack(tarball: Path, target: Path, parts: Sequence[str]) -> None:
    """Unpacks parts of npm's tarball, and what tells its version and license, into `target`.

    Args:
        tarball: a gzipped tar whose files lie in `package/`.
        target: a folder that does not exist.
        parts: folders and files, relative to `package/`.

    Raises:
        ValueError: the file is no such tarball or damaged, has none of the parts, or holds what is
            refused: a name with .. or from the root, a link or device, a file twice, too much.
    """
    left, written = MAX_KEPT, 0
    try:
        with tarball.open("rb") as file:
            stream = _Bounded(file)
            # Nothing to close: it holds only the stream.
            tar = tarfile.open(fileobj=stream, mode="r|")  # type: ignore[call-overload]  # noqa: SIM115
            for count, member in enumerate(tar):
                if count >= MAX_FILES:
                    raise ValueError(f"expected at most {MAX_FILES:,} files, got more")
                path = _checked(member)
                if member.isdir() or not _is_wanted(path, parts):
                    continue
                left -= member.size
                if member.size > MAX_FILE or left < 0:
                    raise ValueError(
                        f"expected files of at most {size_text(MAX_FILE)} and {size_text(MAX_KEPT)}"
                        f" of all, got more at {member.name!r}"
                    )
                source = tar.extractfile(member)
                assert source is not None  # it is a regular file
                place = target / path
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("xb") as out:
                    shutil.copyfileobj(source, out, PART)
                written += path.name not in KEPT
            stream.drain()  # to the checksum
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{tarball}: holds a name twice: {error.filename}; {_REMEDY}") from error
    except (ValueError, tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{tarball}: not unpacked: {error}; {_REMEDY}") from error
    if not written:
        raise ValueError(f"{tarball}: not unpacked: it has no {' or '.join(parts)}; {_REMEDY}")


_REMEDY = "delete it and try again, or unpack a package that you trust yourself"


def _checked(member: tarfile.TarInfo) -> PurePosixPath:
    """Where a member goes, relative to the target; ValueError for one that must not be unpacked."""
    path = PurePosixPath(member.name)
    unsafe = path.is_absolute() or ".." in path.parts or not path.parts
    if unsafe or any(c in member.name for c in "\\:\0"):
        raise ValueError(f"the name {member.name!r} leads out of the package")
    if not member.isdir() and (not member.isreg() or member.issparse()):
        raise ValueError(f"expected files and folders, got {member.name!r}, a link or device")
    if member.size < 0:
        raise ValueError(f"{member.name!r} has {member.size} bytes")
    return path


def _is_wanted(path: PurePosixPath, parts: Sequence[str]) -> bool:
    """Whether a file of a tarball is of the parts that are used, or tells version or license."""
    if path.parts[0] != INSIDE or len(path.parts) < 2:
        return False
    inner = path.relative_to(INSIDE)
    return str(inner) in KEPT or any(inner.is_relative_to(part) for part in parts)


class _Bounded:
    """The bytes of a gzipped file, of which at most `MAX_UNPACKED` are made.

    tarfile reads what headers ask for at once, so the bound must lie below it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, MAX_UNPACKED
        self._stream = zlib.decompressobj(wbits=31)
        self._buffer = bytearray()

    def read(self, count: int) -> bytes:
        """The next `count` bytes, or fewer at the end."""
        if count > self._left:
            raise ValueError(f"expected at most {size_text(MAX_UNPACKED)} unpacked, got more")
        while len(self._buffer) < count and not self._stream.eof:
            packed = self._stream.unconsumed_tail or self._file.read(PART)
            if not packed:
                raise EOFError("it was cut short")
            self._buffer += self._stream.decompress(packed, PART)
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        self._left -= len(data)
        return data

    def drain(self) -> None:
        """Reads on to the end."""
        while self.read(min(PART, self._left or 1)):
            pass


def _npm() -> str:
    """The user's npm; ValueError where there is none."""
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            "--download: expected npm to be installed, got none; install it (it comes with "
            "Node.js), or unpack the packages yourself and name their folder by --packages"
        )
    return npm


def _pack(package: Package, folder: Path) -> Path:
    """Has npm write the tarball of a package into an empty folder; the tarball."""
    wanted = f"{package.name}@{package.version}"
    done = subprocess.run(
        [_npm(), "pack", wanted, "--ignore-scripts", "--loglevel=error"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    tarballs = sorted(folder.glob("*.tgz"))
    if done.returncode or len(tarballs) != 1 or not tarballs[0].is_file():
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = "; ".join(said[:2]) or f"it wrote {len(tarballs)} tarballs"
        raise ValueError(
            f"--download: `npm pack {wanted}` failed with status {done.returncode}: {why}; mend "
            "that, or unpack the package yourself and name its folder by --packages"
        )
    return tarballs[0]

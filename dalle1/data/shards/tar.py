"""The samples of one tar, on a disk or remote: names, order, damage.

A sample is neighbors of one key: the members whose names are the same up to the first dot.
"""

from __future__ import annotations

import errno
import re
import shlex
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext

from dalle1.data.samples import RawSample
from dalle1.data.shards.names import is_data, is_tar

META = re.compile(r"__[^/]*__($|/)")  # members that are no part of a sample
REMOTE_PREFIXES = ("pipe:", "http://", "https://")
CURL = "exec curl --connect-timeout 30 --speed-limit 1 --speed-time 60 --retry 5 -f -s -L"
MAX_BYTES = 2**26  # of a file of a sample
RETRIES = (1.0, 4.0, 16.0)  # seconds before what failed is tried again
MAX_HEADER = 2**16  # bytes of what lengthens a header: a long name
LONG = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
MALFORMED = (None, errno.EINVAL, errno.EOVERFLOW)  # the latter two: of places that no file has
MAX_READS = 100  # behind the end of a remote tar


@dataclass
class TarSample:
    """A sample of a tar and where it begins, in bytes."""

    key: str
    offset: int = 0
    files: list[tuple[tarfile.TarInfo, bytes]] = field(default_factory=list)
    too_large: bool = False  # a file is left out for its size

    def raw(self) -> RawSample:
        """Extensions in lower case; of several with the same one, the first."""
        found: RawSample = {"__key__": self.key}
        for member, data in self.files:
            found.setdefault(base_plus_ext(member.name)[1].lower(), data)
        return found

    def repeated(self) -> int:
        """Files whose extension another one of the sample had before."""
        return 1 + len(self.files) - len(self.raw())

    def merged(self) -> int:
        """Samples of the same key right behind this one, which are read as a part of it."""
        names = Counter(member.name.lower() for member, _ in self.files)
        return max(names.values()) - 1


class Shard:
    """The samples of a tar in order, up to its end or to what is damaged.

    Members that are no part of a sample (folders, links, names without a dot or such as __meta__)
    are skipped, and so are files that are no part of the data (`names.is_data`), which `skipped`
    counts. After the last sample `damage` says what is wrong, if anything is, and `cut` is the key
    of the sample that is lost in part.

    Raises OSError where the disk fails, rather than what is read.
    """

    def __init__(
        self,
        address: str,
        offset: int = 0,
        headers_alone: bool = False,
        max_bytes: int = MAX_BYTES,
        extensions: frozenset[str] | None = None,
    ) -> None:
        """Nothing is read before the samples are asked for.

        Args:
            address: of the tar.
            offset: where a sample begins, in bytes, for tars on a disk.
            headers_alone: all files are empty.
            max_bytes: larger files are left out, whatever size a header claims.
            extensions: other files are empty.
        """
        self.extensions = extensions
        self.address, self.offset = address, offset
        self.headers_alone, self.max_bytes = headers_alone, max_bytes
        self.damage = self.cut = ""
        self.skipped = 0

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        how: Any = {"tarinfo": _Header, "encoding": "utf-8", "errors": "backslashreplace"}
        with ExitStack() as stack:
            if is_remote(self.address):
                stream = stack.enter_context(_open_remote(self.address))
                tar = stack.enter_context(tarfile.open(fileobj=stream, mode="r|*", **how))
            elif is_tar(self.address):
                file = stack.enter_context(open(self.address, "rb"))
                file.seek(self.offset)
                tar = stack.enter_context(tarfile.TarFile(fileobj=file, **how))
            else:  # compressed
                tar = stack.enter_context(tarfile.open(self.address, **how))
            yield tar
            # Zeros in place of a header end a tar, too. And a command is read to its end.
            while rest := tar.fileobj.read(2**16):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("an end mark, and more behind it")

    def _wanted(self, extension: str) -> bool:
        return self.extensions is None or extension.lower() in self.extensions

    def __iter__(self) -> Iterator[TarSample]:
        self.damage = self.cut = ""
        self.skipped = 0
        sample, usual, complete = TarSample(""), 1, True
        try:
            with self._opened() as tar:
                for member in tar:
                    tar.members = []  # it would keep all of them
                    key, extension = base_plus_ext(member.name)
                    if not member.isreg():
                        continue
                    if not is_data(member.name):
                        self.skipped += 1
                        continue
                    if key is None or META.match(member.name):
                        continue
                    if key != sample.key or not sample.files:
                        if sample.files:
                            yield sample
                            usual = len(sample.files)
                        sample = TarSample(key, member.offset)
                    complete = False
                    data = b""
                    if member.size > self.max_bytes:
                        sample.too_large = True
                    elif not self.headers_alone and self._wanted(extension):
                        data = tar.extractfile(member).read()
                    sample.files.append((member, data))
                    complete = True
        except Exception as error:  # malformed data make tarfile raise more than its own errors
            if isinstance(error, OSError) and error.errno not in MALFORMED:
                raise  # another try may read it
            self.damage = " ".join(str(error).split()) or type(error).__name__
            # Between two files nothing says whether the sample had more of them.
            if not complete or len(sample.files) < usual:
                self.cut = sample.key
                return
        if sample.files:
            yield sample


def is_remote(address: str) -> bool:
    """Whether an address is read from its beginning to its end, by webdataset's `gopen`."""
    return address.startswith(REMOTE_PREFIXES)


class _Header(tarfile.TarInfo):
    """Raises ReadError for what tarfile takes for the end of a tar, or would follow for ever."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:  # cut off between two members, or malformed there
            raise tarfile.ReadError(f"no end mark: {error}") from error

    def _proc_member(self, tar: Any) -> Any:
        """tarfile's own place for what a subclass makes of a header."""
        _refuse(self, self.size < 0 or (self.type in LONG and self.size > MAX_HEADER))
        member = super()._proc_member(tar)  # type: ignore[misc]
        _refuse(member, member.size < 0 or tar.offset < tar.fileobj.tell())  # as long ones may say
        return member


def _refuse(header: tarfile.TarInfo, absurd: bool) -> None:
    if absurd:
        raise tarfile.ReadError(f"a header that claims {header.size} bytes")


class _RemoteFile:
    """What `gopen` gave, up to its end; only there a command that fails is an error."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.reads_left = stream, MAX_READS
        stream.ignore_errors = True  # at once, what it wrote before would be lost

    def read(self, size: int) -> bytes:
        data: bytes = self.stream.read(size)
        if not data:
            process = getattr(self.stream, "proc", None)
            if process is not None and process.wait() not in self.stream.ignore_status:
                raise tarfile.ReadError(f"exit status {process.returncode} of the command")
            # tarfile seeks by reading on, however far away a header puts the next one.
            if self.reads_left == 0:
                raise tarfile.ReadError("unexpected end of data")
            self.reads_left -= 1
        return data


@contextmanager
def _open_remote(address: str) -> Iterator[Any]:
    if not address.startswith("pipe:"):
        # webdataset's own call waits for ever where a server says nothing more.
        address = f"pipe:{CURL} {shlex.quote(address)}"
    stream = gopen(address)
    try:
        yield _RemoteFile(stream)
    finally:
        stream.ignore_errors = True
        if getattr(stream, "proc", None) is not None:
            stream.proc.kill()  # workers ignore milder signals, and so do their children
        stream.close()

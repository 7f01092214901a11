"""What is asked of the Hub: the files of a revision, and the bytes of one of them.

Names, sizes and checksums are what the Hub tells. A file is taken into the cache when exactly so
many bytes have come, and their checksum is right; one byte more ends the download. Files are
fetched over plain HTTP and not by the package's own downloader, which writes for as long as a
server sends, under the name that the server gives.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from dalle1.common.files import is_inside, size_text
from dalle1.hub.cache import (
    BLOBS,
    cached_file,
    check_links,
    hub_cache,
    link_blob,
    new_blob,
    remember,
    repository_folder,
)
from dalle1.hub.errors import HubError, NoSuchFileError, hub_errors, import_hub
from dalle1.hub.names import MAIN, HubName
from dalle1.version import __version__

LIBRARY = "dalle1"
TRUE = {"1", "ON", "YES", "TRUE"}  # of the Hub's variables
PART = 2**20  # bytes that are read at once
SPARE = 2**26  # bytes of the disk that a download leaves
# What a server may call a commit or a blob, as both become names of files.
_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,128}")
_SHA1, _SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, as the Hub tells of it.

    Attributes:
        name: in the repository.
        size: bytes.
        checksum: what the cache calls its content: the SHA-256 of a large file, Git's SHA-1 of
            another.
        checked: whether the content is compared with it; a mirror may call its files otherwise.
    """

    name: str
    size: int
    checksum: str
    checked: bool


@dataclass(frozen=True)
class Listing:
    """The files of a repository at a commit.

    Attributes:
        name: what was asked for.
        commit: the revision's.
        files: by name; None for one that the Hub has told nothing but the name of. Empty where a
            mirror lists none.
    """

    name: HubName
    commit: str
    files: Mapping[str, RemoteFile | None] = field(default_factory=dict)


@dataclass(frozen=True)
class HubAccess:
    """How the Hub is reached.

    Attributes:
        token: of a user; None: HF_TOKEN's, or the one of `hf auth login`; False: none.
        cache_dir: folder of the cache; None: HF_HUB_CACHE, or HF_HOME, or the usual one.
        local_files_only: whether nothing is asked of the network, as HF_HUB_OFFLINE=1 says too.
    """

    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False

    @property
    def offline(self) -> bool:
        """Whether the network is not to be used."""
        said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
        return self.local_files_only or said.upper() in TRUE

    @property
    def endpoint(self) -> str | None:
        """The Hub's address; None for its usual one."""
        return (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None

    def folder(self, name: HubName) -> Path:
        """Where the cache keeps a repository."""
        return repository_folder(hub_cache(self.cache_dir), name.repository)

    def api(self) -> Any:
        """The Hub's own `HfApi`; ValueError where its package is not installed."""
        hub = import_hub()
        return hub.HfApi(
            endpoint=self.endpoint,
            token=self.token,
            library_name=LIBRARY,
            library_version=__version__,
        )

    def list_files(self, name: HubName) -> Listing:
        """The commit of a revision, and its files.

        Raises:
            ValueError: there is no such repository or revision, or the token is not accepted.
            ConnectionError: the Hub cannot be reached.
        """
        api = self.api()
        with hub_errors(name, self.endpoint):
            told = api.model_info(
                name.repository,
                revision=name.revision or MAIN,
                files_metadata=True,
                timeout=import_hub("huggingface_hub.constants").HF_HUB_ETAG_TIMEOUT,
            )
            siblings = {s.rfilename: s for s in told.siblings or ()}
        if not isinstance(told.sha, str) or not _PLAIN.fullmatch(told.sha):
            raise HubError(f"{name}: expected a commit from the Hub, got {told.sha!r}")
        for file in siblings:
            if not isinstance(file, str) or not is_inside(file):
                raise HubError(f"{name}: expected names within the repository, got {file!r}")
        files = {file: _remote_file(sibling) for file, sibling in siblings.items()}
        return Listing(name, told.sha, files)

    def find(self, listing: Listing, file: str) -> RemoteFile | None:
        """A file of the listing; None where the repository does not hold it.

        Raises ValueError for a name that leads out of the repository, and where size or checksum
        are not told.
        """
        if not is_inside(file):
            raise HubError(f"{listing.name}: expected names within the repository, got {file!r}")
        if listing.files and file not in listing.files:
            return None
        return listing.files.get(file) or self._ask(listing, file)

    def _ask(self, listing: Listing, file: str) -> RemoteFile | None:
        """The same from the file's own address, as mirrors list nothing but names."""
        hub = import_hub()
        try:
            with hub_errors(listing.name, self.endpoint):
                told = hub.get_hf_file_metadata(
                    self._address(listing, file),
                    token=self.token,
                    library_name=LIBRARY,
                    library_version=__version__,
                )
        except NoSuchFileError:
            return None
        size, checksum = told.size, told.etag
        if not isinstance(size, int) or size < 0 or not _PLAIN.fullmatch(str(checksum)):
            raise HubError(
                f"{listing.name}: {file}: expected its size and checksum from the Hub, got "
                f"{size!r} and {checksum!r}"
            )
        return RemoteFile(file, size, str(checksum), bool(_SHA256.fullmatch(str(checksum))))

    def _address(self, listing: Listing, file: str) -> str:
        """Where a file is asked for."""
        # The package's own `hf_hub_url` knows the address that was set when it was imported.
        hub = self.endpoint or import_hub("huggingface_hub.constants").ENDPOINT
        return f"{hub}/{listing.name.repository}/resolve/{listing.commit}/{quote(file)}"

    def fetch(self, listing: Listing, file: RemoteFile) -> Path:
        """The path of a file in the cache, where it is put if it is not there yet.

        Raises:
            ValueError: the Hub sends other bytes than it has told, or the disk is too small.
            ConnectionError: the Hub cannot be reached.
        """
        folder = self.folder(listing.name)
        held = cached_file(folder, listing.commit, file.name)
        if held is not None and held.stat().st_size == file.size:
            return held
        blob = folder / BLOBS / file.checksum
        if not blob.is_file() or blob.stat().st_size != file.size:
            self._download(listing, file, folder)
        path = link_blob(folder, listing.commit, file.name, file.checksum)
        check_links(path, folder)
        return path

    def _download(self, listing: Listing, file: RemoteFile, folder: Path) -> None:
        hub = import_hub("huggingface_hub.file_download")
        where = f"{listing.name}: {file.name}"
        headers = self._headers()
        with new_blob(folder, file.checksum) as target, hub_errors(where, self.endpoint):
            _check_space(folder, file.size, where)
            try:
                hub.http_get(
                    self._address(listing, file.name),
                    _Limited(target, file.size, where),
                    headers=headers,
                    expected_size=file.size,
                    displayed_filename=file.name,
                )
            except OSError as error:  # of another length than was told
                if type(error) is OSError and error.errno is None:
                    raise _other_bytes(where, file.size, f"{target.tell():,}") from error
                raise
            if target.tell() != file.size:
                raise _other_bytes(where, file.size, f"{target.tell():,}")
            if file.checked and _checksum_of(target, file) != file.checksum:
                raise HubError(
                    f"{where}: expected content of the checksum {file.checksum}, got another; "
                    "fetch it again, or ask its owner"
                )

    def _headers(self) -> dict[str, str]:
        """Of a request for a file's bytes; the token goes to the Hub's address alone."""
        headers: dict[str, str] = import_hub("huggingface_hub.utils").build_hf_headers(
            token=self.token, library_name=LIBRARY, library_version=__version__
        )
        # Compressed, a few bytes could become any number.
        return headers | {"Accept-Encoding": "identity"}

    def remember(self, listing: Listing) -> None:
        """Writes the revision's commit into the cache, for the time without a network."""
        remember(self.folder(listing.name), listing.name.revision or MAIN, listing.commit)


class _Limited:
    """A file that takes so many bytes and no more."""

    def __init__(self, file: BinaryIO, limit: int, where: str) -> None:
        self.file, self.limit, self.where = file, limit, where

    def write(self, data: bytes) -> int:
        if self.file.tell() + len(data) > self.limit:
            raise _other_bytes(self.where, self.limit, "more")
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(position, whence)

    def truncate(self, size: int | None = None) -> int:
        return self.file.truncate(size)


def _remote_file(told: Any) -> RemoteFile | None:
    """What a listing says of a file; None where it says no more than the name."""
    large = told.lfs
    size, checksum = told.size, told.blob_id if large is None else large.sha256
    pattern = _SHA1 if large is None else _SHA256
    if not isinstance(size, int) or size < 0 or not pattern.fullmatch(str(checksum)):
        return None
    return RemoteFile(told.rfilename, size, str(checksum), True)


def _check_space(folder: Path, size: int, where: str) -> None:
    free = shutil.disk_usage(folder).free - SPARE
    if size > free:
        raise HubError(
            f"{where}: expected {size_text(size)} of free disk in {folder}, got "
            f"{size_text(max(free, 0))}; set HF_HOME to a larger one"
        )


def _other_bytes(where: str, expected: int, got: str) -> HubError:
    return HubError(
        f"{where}: expected {expected:,} bytes, as the Hub tells, got {got}; fetch it again, or "
        "ask its owner"
    )


def _checksum_of(file: BinaryIO, told: RemoteFile) -> str:
    """The SHA-256 of a file's content, or its name in Git, whichever was told."""
    is_large = _SHA256.fullmatch(told.checksum) is not None
    found = hashlib.sha256() if is_large else hashlib.sha1(b"blob %d\0" % told.size)
    file.seek(0)
    while part := file.read(PART):
        found.update(part)
    return found.hexdigest()

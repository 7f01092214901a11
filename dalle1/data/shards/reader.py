"""Samples of a data set by shard and number, for the streams of one process.

What cannot be read comes as a `BadSample` in its place, so that a stream's count of samples holds.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import BinaryIO, Protocol

import numpy as np
from webdataset.tariterators import base_plus_ext

from dalle1.data.samples import (
    DAMAGED,
    DUPLICATE_KEY,
    IMAGE_TOO_LARGE,
    MISSING,
    UNREADABLE,
    BadSample,
    RawSample,
)
from dalle1.data.shards.index import PAIRS, TOKENS, Index, read_pair
from dalle1.data.shards.names import is_tar
from dalle1.data.shards.tar import RETRIES, Shard, TarSample, is_remote
from dalle1.data.shards.token_shard import TokenSample, TokenShard

Found = RawSample | TokenSample | BadSample
MAX_OPEN = 64  # shards that are kept open, or whose headers are; more for many streams
MAX_OFFSET = 2**62  # bytes: arrays hold no larger numbers


class Reading(Protocol):
    """Where a process's streams read; `noticed` counts what is wrong with shards, by cause."""

    noticed: Counter[str]

    def read(self, stream: int, shard: int, first: int, last: int) -> list[Found]:
        """Samples [first, last) of a shard, exactly so many."""


def make_reading(index: Index, streams: int, extensions: frozenset[str] | None = None) -> Reading:
    """A reader of what the index lists, for so many streams of the data order.

    extensions: files with others may be empty.
    """
    if index.kind == TOKENS:
        return _TokenShards(index, streams)
    if index.kind == PAIRS:
        return _Pairs(index)
    return _Tars(index, streams, extensions)


def _checked(sample: TarSample, known: set[str], noticed: Counter[str]) -> Found:
    """A sample as it is handed on; `known` are the keys that the shard had before."""
    noticed[DUPLICATE_KEY] += sample.repeated()
    if sample.key in known:
        return BadSample(DUPLICATE_KEY)
    known.add(sample.key)
    return BadSample(IMAGE_TOO_LARGE) if sample.too_large else sample.raw()


@dataclass(frozen=True)
class _Scan:
    """What the headers of a tar say: enough to read a sample's files without parsing them again.

    Arrays, as there may be ten thousand samples and a hundred shards.
    """

    keys: list[str]
    first: np.ndarray  # int64 [samples + 1]: a sample's files are [first[i], first[i + 1])
    offsets: np.ndarray  # int64 [files], of the data, bytes
    sizes: np.ndarray  # int64 [files], bytes
    kinds: np.ndarray  # int64 [files]: places in `extensions`
    extensions: list[str]
    begins: dict[int, int]  # of samples with a file that does not lie there as it is (sparse)
    bad: dict[int, str]  # causes, of samples that need not be read
    damage: str

    def raw(self, file: BinaryIO, i: int, wanted: frozenset[str] | None) -> RawSample:
        """A sample's files; of several with one extension the first, of unwanted ones nothing."""
        found: RawSample = {"__key__": self.keys[i]}
        for f in range(self.first[i], self.first[i + 1]):
            extension = self.extensions[self.kinds[f]]
            if extension not in found and (wanted is None or extension in wanted):
                file.seek(self.offsets[f])
                found[extension] = file.read(self.sizes[f])
        return found

    def repeated(self, i: int) -> int:
        """Files of a sample whose extension another one of it had before."""
        kinds = self.kinds[self.first[i] : self.first[i + 1]].tolist()
        return len(kinds) - len(set(kinds))


def _scan(address: str) -> _Scan:
    """Raises OSError."""
    shard = Shard(address, headers_alone=True)
    keys: list[str] = []
    first, offsets, sizes, kinds = [0], [], [], []
    extensions: dict[str, int] = {}
    begins: dict[int, int] = {}
    bad: dict[int, str] = {}
    known: set[str] = set()
    for i, sample in enumerate(shard):
        keys.append(sample.key)
        if sample.key in known:
            bad[i] = DUPLICATE_KEY
        elif sample.too_large:
            bad[i] = IMAGE_TOO_LARGE
        known.add(sample.key)
        for member, _ in sample.files:
            extension = base_plus_ext(member.name)[1].lower()
            kinds.append(extensions.setdefault(extension, len(extensions)))
            offsets.append(min(member.offset_data, MAX_OFFSET))  # of a file that is too large
            sizes.append(min(member.size, MAX_OFFSET))
            if member.issparse():
                begins[i] = sample.offset
        first.append(len(offsets))
    return _Scan(
        keys,
        first=np.array(first, np.int64),
        offsets=np.array(offsets, np.int64),
        sizes=np.array(sizes, np.int64),
        kinds=np.array(kinds, np.int64),
        extensions=list(extensions),
        begins=begins,
        bad=bad,
        damage=shard.damage,
    )


class _Tars:
    """Tars on a disk are read from where a sample begins, remote tars from their beginning."""

    def __init__(self, index: Index, streams: int, extensions: frozenset[str] | None) -> None:
        self.noticed: Counter[str] = Counter()
        self._index, self._extensions = index, extensions
        self._scans = lru_cache(maxsize=max(MAX_OPEN, 2 * streams))(_scan)
        self._remote: dict[int, _RemoteTar] = {}  # by stream
        self._ends: dict[str, int] = {}  # where remote tars break off, again and again

    def read(self, stream: int, shard: int, first: int, last: int) -> list[Found]:
        address, count = self._index.shards[shard], self._index.counts[shard]
        seekable = is_tar(address) and not is_remote(address)
        found = (
            self._read_local(address, first, last, count)
            if seekable
            else self._read_remote(stream, address, first, last, count)
        )
        return found + [BadSample(MISSING) for _ in range(last - first - len(found))]

    def _read_local(self, address: str, first: int, last: int, count: int) -> list[Found]:
        for wait in (*RETRIES, None):
            found: list[Found] = []
            try:
                scan = self._scans(address)
                there = len(scan.keys)
                if last == count:  # once an epoch
                    self._compare(address, there, count, scan.damage)
                if first >= there:
                    return []
                with open(address, "rb") as file:
                    for i in range(first, min(last, there)):
                        self.noticed[DUPLICATE_KEY] += scan.repeated(i)
                        if i in scan.bad:
                            found.append(BadSample(scan.bad[i]))
                        elif i in scan.begins:
                            sample = next(iter(Shard(address, scan.begins[i])), None)
                            found.append(sample.raw() if sample else BadSample(MISSING))
                        else:
                            found.append(scan.raw(file, i, self._extensions))
                return found
            except OSError as error:
                _wait(address, str(error), wait)
        return found

    def _read_remote(
        self, stream: int, address: str, first: int, last: int, count: int
    ) -> list[Found]:
        last = min(last, self._ends.get(address, last))
        if first >= last:
            return []
        remote = self._remote.get(stream)
        if remote is None or remote.address != address or remote.next > first:
            remote = self._open(stream, address)
        found: list[Found] = []
        for wait in (*RETRIES, None):
            try:
                found += remote.take(first + len(found), last, self.noticed)
                broken = remote.shard.damage if remote.next < last else ""
            except OSError as error:
                broken = str(error)
            if not broken:
                break
            # What is damaged on a disk is damaged at the next try, too.
            _wait(address, broken, wait if is_remote(address) else None)
            if wait is None or not is_remote(address):
                self._ends[address] = remote.next
                self._compare(address, remote.next, count, broken)
                return found
            remote = self._open(stream, address)
        if remote.next < last or last == count:
            self._compare(address, remote.next, count, "")
        return found

    def _open(self, stream: int, address: str) -> _RemoteTar:
        if stream in self._remote:
            self._remote[stream].close()
        self._remote[stream] = _RemoteTar(address)
        return self._remote[stream]

    def _compare(self, address: str, there: int, count: int, damage: str) -> None:
        if damage:
            self.noticed[DAMAGED] += 1
            warnings.warn(f"{address} is damaged, its rest is lost: {damage}", stacklevel=2)
        if there != count:
            warnings.warn(
                f"{address} holds {there} samples, where its _stats.json (or reader.counts) says "
                f"{count}: "
                + ("the others are missing" if there < count else "the rest is unread")
                + "; without the file, samples are counted",
                stacklevel=2,
            )


def _wait(address: str, why: str, seconds: float | None) -> None:
    again = "" if seconds is None else ", trying again"
    warnings.warn(f"{address} broke off{again}: {why}", stacklevel=3)
    time.sleep(seconds or 0)


@dataclass
class _RemoteTar:
    """A tar that is read from its beginning to its end, and how far it has been."""

    address: str
    next: int = 0
    known: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.shard = Shard(self.address)
        self._samples: Iterator[TarSample] = iter(self.shard)

    def take(self, first: int, last: int, noticed: Counter[str]) -> list[Found]:
        """Samples [first, last), fewer where the tar ends before; earlier ones are skipped."""
        found: list[Found] = []
        while self.next < last and (sample := next(self._samples, None)) is not None:
            self.next += 1
            if self.next <= first:
                self.known.add(sample.key)
            else:
                found.append(_checked(sample, self.known, noticed))
        return found

    def close(self) -> None:
        close = getattr(self._samples, "close", None)
        if close is not None:
            close()


class _Pairs:
    """Each image of a folder is a shard of one."""

    def __init__(self, index: Index) -> None:
        self.noticed: Counter[str] = Counter()
        self._index = index

    def read(self, stream: int, shard: int, first: int, last: int) -> list[Found]:
        try:
            return [read_pair(self._index.shards[shard])]
        except OSError:  # gone since it was listed
            return [BadSample(UNREADABLE)]


class _TokenShards:
    """Token shards, mapped into memory."""

    def __init__(self, index: Index, streams: int) -> None:
        self.noticed: Counter[str] = Counter()
        self._index = index
        self._open = lru_cache(maxsize=max(MAX_OPEN, 2 * streams))(TokenShard)
        self._settings = TokenShard(index.shards[0]).settings

    def read(self, stream: int, shard: int, first: int, last: int) -> list[Found]:
        found: list[Found] = []
        try:
            held = self._open(self._index.shards[shard])
            if held.settings != self._settings:
                raise ValueError(f"{held.path} was made with {held.settings}, not {self._settings}")
            found += held.read(first, last)
        except (OSError, ValueError) as error:  # gone or damaged since it was listed
            warnings.warn(str(error), stacklevel=2)
        return found + [BadSample(MISSING) for _ in range(last - first - len(found))]

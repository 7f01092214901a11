"""Samples of a data set by shard and number, for the lanes of one process.

What cannot be read comes as a `Bad` in its place, so that a lane's count of samples holds.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Protocol

from dalle1.data.dirt import DAMAGED, DUPLICATE, MISSING, MOST_BYTES, TOO_LARGE, UNREADABLE, Bad
from dalle1.data.sources import PAIRS, TOKENS, Index, read_pair
from dalle1.data.tars import Raw, Sample, Shard, is_stream
from dalle1.data.tokens import TokenSample, TokenShard

Found = Raw | TokenSample | Bad
SCANNED = 256  # shards whose offsets are kept
OPEN = 64  # token shards and pipes
RETRIES = (1.0, 4.0, 16.0)  # seconds before a stream that broke off is opened again


class Reading(Protocol):
    """Where a process's lanes read; `noticed` counts what is wrong with shards, by cause."""

    noticed: Counter[str]

    def read(self, lane: int, shard: int, first: int, last: int) -> list[Found]:
        """Samples [first, last) of a shard, exactly so many."""


def make_reading(index: Index) -> Reading:
    """Reads what the index lists."""
    if index.kind == TOKENS:
        return _TokenShards(index)
    if index.kind == PAIRS:
        return _Pairs(index)
    return _Tars(index)


def _checked(sample: Sample, known: set[str], noticed: Counter[str]) -> Found:
    """A sample as it is handed on; `known` are the keys that the shard had before."""
    noticed[DUPLICATE] += sample.repeated()
    if sample.key in known:
        return Bad(DUPLICATE)
    known.add(sample.key)
    return Bad(TOO_LARGE) if sample.too_large else sample.raw()


@dataclass(frozen=True)
class _Scan:
    """What the headers of a tar say."""

    offsets: list[int]  # of the samples, bytes
    duplicates: set[int]  # numbers of those whose key another one had before
    damage: str


def _scan(address: str) -> _Scan:
    shard = Shard(address, headers_alone=True)
    offsets: list[int] = []
    duplicates: set[int] = set()
    known: set[str] = set()
    try:
        for sample in shard:
            if sample.key in known:
                duplicates.add(len(offsets))
            known.add(sample.key)
            offsets.append(sample.offset)
    except OSError as error:
        return _Scan(offsets, duplicates, str(error))
    return _Scan(offsets, duplicates, shard.damage)


class _Tars:
    """Tars on a disk are read from where a sample begins, streams from their beginning."""

    def __init__(self, index: Index) -> None:
        self.noticed: Counter[str] = Counter()
        self._index = index
        self._scans = lru_cache(maxsize=SCANNED)(_scan)
        self._streams: dict[int, _Stream] = {}  # by lane

    def read(self, lane: int, shard: int, first: int, last: int) -> list[Found]:
        address, count = self._index.shards[shard], self._index.counts[shard]
        seekable = address.endswith(".tar") and not is_stream(address)
        found = (
            self._at(address, first, last, count)
            if seekable
            else self._on(lane, address, first, last, count)
        )
        return found + [Bad(MISSING) for _ in range(last - first - len(found))]

    def _at(self, address: str, first: int, last: int, count: int) -> list[Found]:
        scan = self._scans(address)
        there = len(scan.offsets)
        if last == count:  # once an epoch
            self._compare(address, there, count, scan.damage)
        if first >= there:
            return []
        found: list[Found] = []
        shard = Shard(address, scan.offsets[first], most_bytes=MOST_BYTES)
        try:
            for i, sample in enumerate(islice(shard, min(last, there) - first), first):
                known = {sample.key} if i in scan.duplicates else set()
                found.append(_checked(sample, known, self.noticed))
        except OSError as error:
            warnings.warn(f"{address} cannot be read: {error}", stacklevel=2)
        return found

    def _on(self, lane: int, address: str, first: int, last: int, count: int) -> list[Found]:
        stream = self._streams.get(lane)
        if stream is None or stream.address != address or stream.next > first:
            if stream is not None:
                stream.close()
            stream = self._streams[lane] = _Stream(address)
        found: list[Found] = []
        for wait in (*RETRIES, None):
            try:
                found += stream.take(first + len(found), last, self.noticed)
                broken = stream.next < last and stream.shard.damage
            except OSError as error:
                broken = str(error)
            if stream.next >= last or not broken or stream.given_up:
                break
            if wait is None:
                stream.given_up = True
                break
            warnings.warn(f"{address} broke off, trying again: {broken}", stacklevel=2)
            time.sleep(wait)
            stream.close()
            stream = self._streams[lane] = _Stream(address)
        if stream.next < last or last == count:
            self._compare(address, min(stream.next, count), count, stream.shard.damage)
        return found

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


@dataclass
class _Stream:
    """A tar that is read from its beginning to its end, and how far it has been."""

    address: str
    next: int = 0
    given_up: bool = False  # it breaks off at the same place again and again
    known: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.shard = Shard(self.address, most_bytes=MOST_BYTES)
        self._samples: Iterator[Sample] = iter(self.shard)

    def take(self, first: int, last: int, noticed: Counter[str]) -> list[Found]:
        """Samples [first, last), fewer where the stream ends before; those before are passed."""
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
    """Each picture of a folder is a shard of one."""

    def __init__(self, index: Index) -> None:
        self.noticed: Counter[str] = Counter()
        self._index = index

    def read(self, lane: int, shard: int, first: int, last: int) -> list[Found]:
        try:
            return [read_pair(self._index.shards[shard])]
        except OSError:  # gone since it was listed
            return [Bad(UNREADABLE)]


class _TokenShards:
    """Token shards, mapped into memory."""

    def __init__(self, index: Index) -> None:
        self.noticed: Counter[str] = Counter()
        self._index = index
        self._open = lru_cache(maxsize=OPEN)(TokenShard)

    def read(self, lane: int, shard: int, first: int, last: int) -> list[Found]:
        found: list[Found] = []
        try:
            found += self._open(self._index.shards[shard]).read(first, last)
        except (OSError, ValueError) as error:  # gone or damaged since it was listed
            warnings.warn(str(error), stacklevel=2)
        return found + [Bad(MISSING) for _ in range(last - first - len(found))]

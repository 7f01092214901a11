"""What the tools need of the addresses of raw shards: their names, sizes, and a second try."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from dalle1.data.shards.index import PAIRS, TOKENS, find_shards, kind_of, no_images
from dalle1.data.shards.names import TAR_ENDING
from dalle1.data.shards.tar import Shard, TarSample, is_remote


def raw_shards(data: str) -> list[str]:
    """The tars of `data`, for tools that read or write whole shards.

    Raises:
        ValueError: data that are missing, a folder of pairs, or token shards.
    """
    shards = find_shards(data)
    kind = kind_of(data, shards)
    if kind == PAIRS:
        raise ValueError(
            f"data: {data!r} holds no .tar shards; a folder of images with captions is made into "
            "shards by launch/shard.py first"
        )
    if kind == TOKENS:
        raise ValueError(no_images(data))
    return shards


def shard_name(address: str) -> str:
    """00012 of x/00012.tar, of x/00012.tar.gz and of pipe:curl http://x/00012.tar?y; empty where
    nothing ends in .tar."""
    if is_remote(address):
        found = re.findall(r"([^/\s'\"=?&|<>]+?)\.tar\b", address, re.IGNORECASE)
        return str(found[-1]) if found else ""
    return TAR_ENDING.sub("", Path(address).name)


def size_of(address: str) -> int | None:
    """Bytes of a shard on a disk; None for a remote one."""
    return None if is_remote(address) else Path(address).stat().st_size


def read_samples(shard: Shard, retries: Sequence[float]) -> Iterator[TarSample]:
    """Samples in order; a remote tar that breaks off is opened again.

    Args:
        shard: whose `damage` says in the end whether it broke off at the last try, too.
        retries: seconds before each further try.

    Raises:
        OSError: not one sample could be read of a remote tar, or a disk failed.
    """
    taken, remote = 0, is_remote(shard.address)
    waits = iter(retries if remote else ())
    while True:
        try:
            for sample in islice(shard, taken, None):
                taken += 1
                yield sample
            why = shard.damage
            if not why:
                return
            if (wait := next(waits, None)) is None:
                if remote and not taken:  # an address that is wrong, or a server that is down
                    raise OSError(why)
                return
        except OSError as error:
            why = str(error)
            if (wait := next(waits, None)) is None:
                raise
        warnings.warn(f"{shard.address} broke off, trying again: {why}", stacklevel=2)
        time.sleep(wait)

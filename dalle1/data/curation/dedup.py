"""Samples that are the same as one before, or nearly so."""

from __future__ import annotations

from array import array
from itertools import pairwise

import numpy as np

DUPLICATE, NEAR_DUPLICATE = "duplicate", "near duplicate"
MAX_DISTANCE = 7
DIGEST = 10  # bytes: among 10⁹ samples two different ones are equal with probability 4e-7


class Digests:
    """A set of digests in 9 bytes each, where a set of Python takes a hundred.

    They lie in 65,536 arrays by their first two bytes, so that few are compared with.
    """

    def __init__(self) -> None:
        self._held: dict[bytes, array[int]] = {}

    def __contains__(self, digest: bytes) -> bool:
        held = self._held.get(digest[:2])
        return held is not None and bool((np.frombuffer(held, np.uint64) == _rest(digest)).any())

    def add(self, digest: bytes) -> None:
        """Takes it in, once more if it is there."""
        self._held.setdefault(digest[:2], array("Q")).append(int(_rest(digest)))


def _rest(digest: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(digest[2:], "big"))


class Looks:
    """64-bit hashes, found by others that differ from them in at most `distance` bits.

    The bits are cut in distance + 1 bands. Two hashes that differ in no more than `distance` bits
    have at least one band in common, so it is enough to compare with those that share one: all
    pairs are found, and of N random hashes (distance + 1) N / 2^b are compared with, b the bits of
    a band. A hash lies in an array of each of its bands: 9 (distance + 1) bytes.
    """

    def __init__(self, distance: int) -> None:
        self.distance = distance
        edges = [64 * i // (distance + 1) for i in range(distance + 2)]
        # Wider than 16 bits, a band would have an array for almost every hash.
        self._bands: list[tuple[int, int, dict[int, array[int]]]] = [
            (low, (1 << min(16, high - low)) - 1, {}) for low, high in pairwise(edges)
        ]

    def near(self, look: int) -> bool:
        """Whether one that was added differs in at most `distance` bits."""
        for shift, mask, table in self._bands:
            held = table.get((look >> shift) & mask)
            if held is not None:
                differing = np.bitwise_count(np.frombuffer(held, np.uint64) ^ np.uint64(look))
                if (differing <= self.distance).any():
                    return True
        return False

    def add(self, look: int) -> None:
        """Takes it in."""
        for shift, mask, table in self._bands:
            table.setdefault((look >> shift) & mask, array("Q")).append(look)


class Seen:
    """The samples that stay, as far as later ones are compared with them."""

    def __init__(self, duplicates: bool, distance: int | None) -> None:
        self.digests = Digests() if duplicates else None
        self.looks = Looks(distance) if distance is not None else None

    def cause(self, digest: bytes, look: int) -> str | None:
        """Why a sample is dropped for one before it; None: it stays, and is seen from now on.

        digest: of what makes it the same as another. look: 64 bits, few of which differ between
        images that look alike.
        """
        if self.digests is not None and digest in self.digests:
            return DUPLICATE
        if self.looks is not None and self.looks.near(look):
            return NEAR_DUPLICATE
        if self.digests is not None:
            self.digests.add(digest)
        if self.looks is not None:
            self.looks.add(look)
        return None

    def take(self, digests: np.ndarray, looks: np.ndarray) -> None:
        """Those of a shard that was done before: uint8 [k, DIGEST], uint64 [k]."""
        if self.digests is not None:
            for digest in digests:
                self.digests.add(digest.tobytes())
        if self.looks is not None:
            for look in looks.tolist():
                self.looks.add(look)

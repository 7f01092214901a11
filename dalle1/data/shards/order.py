"""Which sample comes when: a function of the shards' counts, the seed and the batch alone.

A global batch has B places. L streams (as Mosaic's canonical nodes) fill them, each m = B / L
neighboring ones, and each reads a part of the data of its own. An epoch's shards are permuted and
taken as one ring of N samples. The streams divide the ring in order, from a random place on, so
that each sample of the epoch belongs to one stream. A stream shuffles its part window by window. As
long as no sample is bad, samples [e N, (e + 1) N) of the run are epoch e. A stream that meets bad
samples begins its next epoch a little before the others.

A stream belongs to one rank and to one of its workers. So nothing depends on their number, no
sample is read by two of them, and each shard is read by as few as can be, also where shards are
fewer than ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Piece:
    """Samples [first, last) of a shard."""

    shard: int
    first: int
    last: int


@dataclass(frozen=True)
class Window:
    """Samples that a stream reads together, in the order of the pieces, and then shuffles."""

    epoch: int
    begin: int  # samples of the stream before it, since the first epoch
    pieces: list[Piece]
    shuffle: np.ndarray  # which of them comes first, second ...


class Order:
    """The order of all samples without end; see above."""

    def __init__(
        self, counts: Sequence[int], batch_size: int, streams: int, buffer: int, seed: int
    ) -> None:
        """The same arguments give the same order.

        Args:
            counts: samples of each shard.
            batch_size: of all ranks, B.
            streams: L, a divisor of B.
            buffer: samples in the windows of all streams at a time.
            seed: of the permutations.
        """
        self._counts = np.asarray(counts, np.int64)
        self.samples = int(self._counts.sum())
        self._batch, self._streams, self._places = batch_size, streams, batch_size // streams
        self._window, self._seed = max(1, buffer // streams), seed
        self._shards = lru_cache(maxsize=4)(self._permuted)

    def _permuted(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The shards of an epoch in order, where each begins in the ring, and where streams do."""
        rng = np.random.default_rng([self._seed, epoch, 0])
        order = rng.permutation(len(self._counts))
        starts = np.concatenate([[0], self._counts[order].cumsum()])
        return order, starts, int(rng.integers(self.samples))

    def before(self, stream: int, epoch: int) -> int:
        """How many samples belong to a stream before the epoch: its places in full batches, and
        those in the batch that the epoch begins in."""
        batches, places = divmod(epoch * self.samples, self._batch)
        first = stream * self._places
        return batches * self._places + min(max(places - first, 0), self._places)

    def _of_lower_streams(self, stream: int, epoch: int) -> int:
        batches, places = divmod(epoch * self.samples, self._batch)
        first = stream * self._places
        return batches * first + min(places, first)

    def epoch_of(self, stream: int, taken: int) -> int:
        """The epoch of a stream's next sample, of which it has taken so many."""
        epoch = taken * self._streams // self.samples
        while self.before(stream, epoch) > taken:
            epoch -= 1
        while self.before(stream, epoch + 1) <= taken:
            epoch += 1
        return epoch

    def window(self, stream: int, taken: int) -> Window:
        """The window that holds a stream's next sample."""
        epoch = self.epoch_of(stream, taken)
        begin, end = self.before(stream, epoch), self.before(stream, epoch + 1)
        number = (taken - begin) // self._window
        first = number * self._window
        last = min(first + self._window, end - begin)
        rng = np.random.default_rng([self._seed, epoch, 1, stream, number])
        shuffle = rng.permutation(last - first) if last - first > 1 else np.zeros(1, np.int64)
        # Where the stream's part lies among those of the epoch.
        part = self._of_lower_streams(stream, epoch + 1) - self._of_lower_streams(stream, epoch)
        return Window(epoch, begin + first, self._pieces(epoch, part + first, part + last), shuffle)

    def _pieces(self, epoch: int, first: int, last: int) -> list[Piece]:
        order, starts, begin = self._shards(epoch)
        first, last = first + begin, last + begin
        if first < self.samples < last:  # once around
            rest = last - self.samples
            return [
                *self._pieces(epoch, first - begin, self.samples - begin),
                *self._pieces(epoch, self.samples - begin, self.samples - begin + rest),
            ]
        if first >= self.samples:
            first, last = first - self.samples, last - self.samples
        pieces = []
        # The last shard that begins at or before `first`: empty ones are skipped.
        place = int(np.searchsorted(starts, first, side="right")) - 1
        while first < last:
            start, end = int(starts[place]), int(starts[place + 1])
            if end > first:
                stop = min(end, last)
                pieces.append(Piece(int(order[place]), first - start, stop - start))
                first = stop
            place += 1
        return pieces

"""Which sample comes when: a function of the shards' counts, the seed and the batch alone.

A global batch of B places is fed by L lanes, each of which fills m = B / L places that lie beside
each other and reads its own part of the data. An epoch's shards are permuted and taken as one ring
of N samples, which the lanes share out in order from a random place on, so that each sample of the
epoch belongs to one lane; a lane shuffles its part window by window. As long as no sample is bad,
stream positions [e N, (e + 1) N) are epoch e; a lane that meets bad samples goes on to its next
epoch a little before the others.

Ranks and their workers are given whole lanes: nothing hangs on their number, no sample is read by
two of them, and each shard by as few as can be, also where shards are fewer than ranks.
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
    """Samples that a lane reads together, in the order of the pieces, and then shuffles."""

    epoch: int
    begin: int  # samples of the lane before it, since the first epoch
    pieces: list[Piece]
    shuffle: np.ndarray  # which of them comes first, second ...


class Order:
    """The order of all samples for ever; see above."""

    def __init__(
        self, counts: Sequence[int], batch_size: int, lanes: int, buffer: int, seed: int
    ) -> None:
        """buffer: samples in the windows of all lanes at a time."""
        self._counts = np.asarray(counts, np.int64)
        self.samples = int(self._counts.sum())
        self._batch, self._lanes, self._places = batch_size, lanes, batch_size // lanes
        self._window, self._seed = max(1, buffer // lanes), seed
        self._shards = lru_cache(maxsize=4)(self._permuted)

    def _permuted(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The shards of an epoch in order, where each begins in the ring, where the lanes begin."""
        rng = np.random.default_rng([self._seed, epoch, 0])
        order = rng.permutation(len(self._counts))
        starts = np.concatenate([[0], self._counts[order].cumsum()])
        return order, starts, int(rng.integers(self.samples))

    def before(self, lane: int, epoch: int) -> int:
        """How many samples belong to a lane before the epoch: its places in whole batches, and
        those in the batch that the epoch begins in."""
        batches, places = divmod(epoch * self.samples, self._batch)
        first = lane * self._places
        return batches * self._places + min(max(places - first, 0), self._places)

    def _of_lower_lanes(self, lane: int, epoch: int) -> int:
        batches, places = divmod(epoch * self.samples, self._batch)
        first = lane * self._places
        return batches * first + min(places, first)

    def epoch_of(self, lane: int, taken: int) -> int:
        """The epoch of a lane's next sample, of which it has taken so many."""
        epoch = taken * self._lanes // self.samples
        while self.before(lane, epoch) > taken:
            epoch -= 1
        while self.before(lane, epoch + 1) <= taken:
            epoch += 1
        return epoch

    def window(self, lane: int, taken: int) -> Window:
        """The window that holds a lane's next sample."""
        epoch = self.epoch_of(lane, taken)
        begin, end = self.before(lane, epoch), self.before(lane, epoch + 1)
        number = (taken - begin) // self._window
        first = number * self._window
        last = min(first + self._window, end - begin)
        rng = np.random.default_rng([self._seed, epoch, 1, lane, number])
        shuffle = rng.permutation(last - first) if last - first > 1 else np.zeros(1, np.int64)
        # Where the lane's part lies among those of the epoch.
        part = self._of_lower_lanes(lane, epoch + 1) - self._of_lower_lanes(lane, epoch)
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
        # The last shard that begins at or before `first`: empty ones are passed over.
        place = int(np.searchsorted(starts, first, side="right")) - 1
        while first < last:
            start, end = int(starts[place]), int(starts[place + 1])
            if end > first:
                stop = min(end, last)
                pieces.append(Piece(int(order[place]), first - start, stop - start))
                first = stop
            place += 1
        return pieces

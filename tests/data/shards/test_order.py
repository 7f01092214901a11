"""The order of samples against its definition, by enumeration."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from dalle1.data.shards.order import Order

# Counts of the shards, batch, streams, buffer.
CASES = [
    ([10, 10, 10], 6, 6, 8),
    ([7], 4, 2, 1000),
    ([3, 0, 0, 11, 1], 5, 5, 5),
    ([1, 2], 12, 6, 4),  # several epochs in a batch
    ([1] * 40, 8, 4, 40),
    ([100, 1, 57, 300], 48, 12, 96),
]


def stream_samples(order: Order, stream: int, count: int) -> list[tuple[int, tuple[int, int]]]:
    """Epoch, and (shard, number), of a stream's first samples."""
    found: list[tuple[int, tuple[int, int]]] = []
    while len(found) < count:
        window = order.window(stream, len(found))
        assert window.begin == len(found)
        read = [(p.shard, i) for p in window.pieces for i in range(p.first, p.last)]
        assert sorted(window.shuffle) == list(range(len(read)))
        found += [(window.epoch, read[i]) for i in window.shuffle]
    return found[:count]


@pytest.mark.parametrize(("counts", "batch", "streams", "buffer"), CASES)
def test_each_epoch_has_each_sample_once(
    counts: list[int], batch: int, streams: int, buffer: int
) -> None:
    """Parts of streams that overlap or leave a gap; an epoch that is not N samples in a row."""
    order, n = Order(counts, batch, streams, buffer, seed=3), sum(counts)
    batches, places = 5 * n // batch + 2, batch // streams
    columns = [stream_samples(order, stream, batches * places) for stream in range(streams)]
    stream = [
        columns[stream][g * places + i]
        for g in range(batches)
        for stream in range(streams)
        for i in range(places)
    ]
    every = Counter((s, i) for s, count in enumerate(counts) for i in range(count))
    for epoch in range(5):
        part = stream[epoch * n : (epoch + 1) * n]
        assert {e for e, _ in part} == {epoch}
        assert Counter(sample for _, sample in part) == every


def test_an_epoch_is_another_order_and_a_seed_too() -> None:
    """Epochs that repeat one order, also where there is a single shard."""
    for counts in ([50] * 8, [400]):
        orders = [
            stream_samples(Order(counts, 8, 8, 64, seed), 3, 150)[50 * e : 50 * (e + 1)]
            for seed in (0, 1)
            for e in range(3)
        ]
        samples = {tuple(sample for _, sample in part) for part in orders}
        assert len(samples) == 6


def test_any_place_is_found_again() -> None:
    """Windows that depend on where reading began."""
    order = Order([100, 1, 57, 300], 48, 12, 96, seed=5)
    whole = stream_samples(order, 7, 200)
    for taken in (0, 1, 37, 38, 39, 76, 150):
        window = order.window(7, taken)
        read = [(p.shard, i) for p in window.pieces for i in range(p.first, p.last)]
        assert read[window.shuffle[taken - window.begin]] == whole[taken][1]
        assert window.epoch == whole[taken][0] == order.epoch_of(7, taken)


def test_lanes_read_shards_apart() -> None:
    """Every stream opening every shard: what a thousand ranks would ask of the disks."""
    order = Order([1000] * 64, 16, 16, 1600, seed=0)
    for stream in range(16):
        assert len({sample[0] for _, sample in stream_samples(order, stream, 4000)}) <= 5


def test_samples_far_apart_meet() -> None:
    """A shuffle that hands out neighbors together: batches of a sorted data set of one class."""
    order = Order([10_000], 64, 64, 4096, seed=0)
    firsts = [stream_samples(order, stream, 1)[0][1][1] for stream in range(64)]
    assert np.ptp(firsts) > 9000 and min(np.diff(sorted(firsts))) > 50

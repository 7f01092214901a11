"""Images (or their tokens) with captions as batches, in an order that a seed fixes.

The order is `order.Order`'s. Streams fill the places of the global batch. Each rank has a part of
the streams and each of its workers a part of these, so neither the number of ranks nor of workers
changes what a step trains on. A bad sample is skipped and counted, and its stream takes its next
one. A run that knows how many samples each stream has taken resumes with the very next sample.

Dimensions: b batch of this rank, B batch over all ranks, R side of the images, n tokens of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dalle1.data.samples import (
    EMPTY_CAPTION,
    IMAGE_KEYS,
    MAX_ASPECT,
    MAX_PIXELS,
    MISSING,
    BadSample,
    captions_of,
    image_of,
)
from dalle1.data.shards.index import Index, make_index, no_good
from dalle1.data.shards.order import Order
from dalle1.data.shards.reader import Found, Reading, make_reading
from dalle1.data.shards.token_shard import TokenSample
from dalle1.data.shards.workers import ending_workers, prepare_worker
from dalle1.data.transforms import Augmentation, read_image

Decoded = tuple[np.ndarray, str, str]  # uint8 [3, R, R] or uint16 [n], caption, key
MAX_BAD = 0.5  # a larger share of bad samples points to a wrong setting
MIN_SAMPLES = 64  # before that share says anything


def samples_of_share(index: Index) -> int:
    """Over how many samples the share of bad ones is taken: those of some shards, so that a single
    bad shard does not end a run."""
    return max(MIN_SAMPLES, min(4 * max(index.counts), index.samples))


def too_many_bad(
    index: Index, caption_key: str, max_bad: float, causes: Counter[str]
) -> ValueError:
    """The error of a run where a larger share than `max_bad` cannot be used."""
    text = no_good(index.data, caption_key, causes)
    return ValueError(f"{text}; reader.max_bad is {max_bad}")


@dataclass
class Batch:
    """Samples of one step of one rank: images, or tokens where the data are token shards."""

    images: Tensor | None  # uint8 [b, 3, R, R]
    captions: list[str]
    seeds: list[int]  # for what a step draws for each: a function of (seed, step, place in B)
    tokens: Tensor | None = None  # int32 [b, n]
    keys: list[str] = field(default_factory=list)  # the samples' names
    dropped: Counter[str] = field(default_factory=Counter)  # bad samples by cause
    taken: dict[int, int] = field(default_factory=dict)  # by stream, after this batch
    epoch: float = 0.0  # epochs done after this batch, of this rank's streams

    def split(self, size: int) -> list[Batch]:
        """Batches of `size` samples, in order; b must be a multiple of it."""

        def part(values: Any, i: int) -> Any:
            return None if values is None else values[i : i + size]

        fields = (self.images, self.captions, self.seeds, self.tokens, self.keys)
        return [
            Batch(*(part(values, i) for values in fields))
            for i in range(0, len(self.captions), size)
        ]


@dataclass
class _Part:
    """What one worker makes of its streams, for a batch."""

    images: Tensor | None
    # No tensor: a small one takes its way to another process far slower than an array.
    tokens: np.ndarray | None  # uint16 [its places, n]
    captions: list[str]
    seeds: list[int]
    keys: list[str]
    dropped: Counter[str]
    taken: dict[int, int]


@dataclass
class _Failure:
    """What a worker says instead of a batch: raised as it is, without the worker's traceback."""

    text: str


class Batches(IterableDataset[_Part | _Failure]):
    """This rank's batches, without end, from the first one or from where a state left off."""

    def __init__(
        self,
        data: str | Index,
        batch_size: int,
        image_size: int,
        augmentation: Augmentation,
        seed: int,
        caption_key: str = "txt",
        caption_lines: bool = False,
        buffer: int = 4096,
        streams: int | None = None,
        max_bad: float = MAX_BAD,
        max_aspect: float | None = MAX_ASPECT,
        max_pixels: int | None = MAX_PIXELS,
        rank: int = 0,
        world_size: int = 1,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """The settings are those of `training.config.DataSettings`.

        Args:
            data: as the setting of a run, or its index.
            batch_size: of all ranks.
            image_size: side of the images, pixels.
            augmentation: makes an image of that size.
            seed: of the order and of the augmentation.
            rank: of this process.
            world_size: number of ranks.
            state: what `state` gave, of a run with any number of ranks and workers.

        Raises:
            ValueError: the settings, the data and the state do not fit.
        """
        self.streams = batch_size if streams is None else streams
        if batch_size % world_size:
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of the {world_size} ranks"
            )
        if batch_size % self.streams or self.streams % world_size:
            raise ValueError(
                f"reader.streams {streams} must divide batch_size {batch_size} and be a multiple "
                f"of the {world_size} ranks"
            )
        self.index = make_index(data) if isinstance(data, str) else data
        self.caption_key, self.caption_lines = caption_key, caption_lines
        self.buffer, self.max_bad = buffer, max_bad
        self.max_aspect, self.max_pixels = max_aspect, max_pixels
        self.batch_size, self.image_size, self.augmentation = batch_size, image_size, augmentation
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.first, self.taken = 0, [0] * self.streams
        if state is not None:
            self._load(state)

    def state(self, batches: int, taken: Sequence[int]) -> dict[str, Any]:
        """What a run resumes from, for a JSON file.

        Args:
            batches: global batches so far.
            taken: samples that each stream has taken (`Batch.taken`, of all ranks).
        """
        order = self._order()
        return {
            "data": self.index.fingerprint(),
            "samples": self.index.samples,
            "seed": self.seed,
            "shuffle_buffer": self.buffer,
            "streams": self.streams,
            "batches": batches,
            "epoch": min(order.epoch_of(stream, n) for stream, n in enumerate(taken)),
            "taken": list(taken),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        if state["data"] != self.index.fingerprint():
            raise ValueError(
                f"data: {self.index.data!r} ({len(self.index.shards)} shards, {self.index.samples} "
                f"samples) is not what the run was trained on ({state['samples']} samples): "
                "resume with the same shards, or begin a new run"
            )
        # A checkpoint of before calls the streams lanes.
        streams = state["streams"] if "streams" in state else state["lanes"]
        for name, held, mine in (
            ("shuffle_buffer", state["shuffle_buffer"], self.buffer),
            ("streams", streams, self.streams),
        ):
            if held != mine:
                raise ValueError(
                    f"reader.{name}: the run was trained with {held}, the config says {mine}; the "
                    "order of the samples depends on it"
                )
        if state["seed"] != self.seed:
            raise ValueError(f"seed: the run was trained with {state['seed']}, not {self.seed}")
        self.first, self.taken = int(state["batches"]), list(state["taken"])

    def _order(self) -> Order:
        return Order(self.index.counts, self.batch_size, self.streams, self.buffer, self.seed)

    def _streams_of(self, worker: int, workers: int) -> range:
        """Those of a worker of this rank."""
        mine = self.streams // self.world_size
        start, end = (mine * i // workers for i in (worker, worker + 1))
        return range(self.rank * mine + start, self.rank * mine + end)

    def __iter__(self) -> Iterator[_Part | _Failure]:
        """One worker's parts of the batches, see `loader`."""
        worker = get_worker_info()
        streams = self._streams_of(*((worker.id, worker.num_workers) if worker else (0, 1)))
        caption = "txt" if self.caption_key == "txt" else "json"
        reading = make_reading(self.index, len(streams), frozenset({*IMAGE_KEYS, caption}))
        reader = _Reader(self, streams, self._order(), reading)
        step = self.first
        try:
            while True:
                yield reader.part(step)
                step += 1
        except ValueError as error:
            yield _Failure(str(error))

    def loader(self, workers: int = 0) -> Iterator[Batch]:
        """Batches in order, decoded by `workers` processes ahead of time (0: in this one).

        Raises:
            ValueError: a larger share of samples than `max_bad` cannot be used.
        """
        workers = min(workers, self.streams // self.world_size)  # each needs a stream
        parts = ending_workers(
            iter(
                DataLoader(
                    self, batch_size=None, num_workers=workers, worker_init_fn=prepare_worker
                )
            )
        )
        while True:
            found: list[_Part] = []
            for _ in range(max(1, workers)):
                part = next(parts)
                if isinstance(part, _Failure):
                    raise ValueError(part.text)
                found.append(part)
            yield self._joined(found)

    def _joined(self, parts: list[_Part]) -> Batch:
        images = [p.images for p in parts if p.images is not None]
        tokens = [p.tokens for p in parts if p.tokens is not None]
        taken = {stream: n for p in parts for stream, n in p.taken.items()}
        return Batch(
            (images[0] if len(images) == 1 else torch.cat(images)) if images else None,
            [caption for p in parts for caption in p.captions],
            [seed for p in parts for seed in p.seeds],
            torch.from_numpy(np.concatenate(tokens).astype(np.int32)) if tokens else None,
            [key for p in parts for key in p.keys],
            sum((p.dropped for p in parts), Counter()),
            taken,
            sum(taken.values()) * self.streams / (len(taken) * self.index.samples),
        )


class _Stream:
    """One stream's samples, undecoded, in its order."""

    def __init__(self, number: int, taken: int, order: Order, reading: Reading) -> None:
        self.number, self.taken = number, taken
        self._order, self._reading = order, reading
        self._found: list[Found] = []
        self._end = -1  # of the window that they are of

    def next(self) -> Found:
        """The next sample, or why it cannot be read."""
        if not 0 <= self.taken < self._end:
            window = self._order.window(self.number, self.taken)
            read = [
                sample
                for p in window.pieces
                for sample in self._reading.read(self.number, p.shard, p.first, p.last)
            ]
            # The last comes first, to be popped.
            rest = window.shuffle[self.taken - window.begin :][::-1]
            self._found = [read[i] for i in rest]
            self._end = window.begin + len(read)
        self.taken += 1
        return self._found.pop()


class _Reader:
    """Makes batches of the streams of one process."""

    def __init__(self, batches: Batches, streams: range, order: Order, reading: Reading) -> None:
        self._b, self._order, self._reading = batches, order, reading
        self._streams = [_Stream(i, batches.taken[i], order, reading) for i in streams]
        places = batches.batch_size // batches.streams
        self._places = [
            (stream, stream.number * places + i) for stream in self._streams for i in range(places)
        ]
        self._seen: Counter[str] = Counter()  # of late
        self._of_share = samples_of_share(batches.index)

    def part(self, step: int) -> _Part:
        """The places of this process's streams in global batch `step`."""
        b = self._b
        dropped: Counter[str] = Counter()
        # Two words for each place: for what the step draws, and for the augmentation.
        words = np.random.SeedSequence([b.seed, step]).generate_state(2 * b.batch_size)
        good = [
            self._good(stream, int(words[b.batch_size + place]), dropped)
            for stream, place in self._places
        ]
        dropped.update(self._reading.noticed)
        self._reading.noticed.clear()
        values, captions, keys = zip(*good, strict=True)
        stacked = np.stack(values)
        are_images = stacked.ndim == 4
        return _Part(
            torch.from_numpy(stacked) if are_images else None,
            None if are_images else stacked,
            list(captions),
            [int(words[place]) for _, place in self._places],
            list(keys),
            +dropped,
            {stream.number: stream.taken for stream in self._streams},
        )

    def _good(self, stream: _Stream, word: int, dropped: Counter[str]) -> Decoded:
        """The stream's next sample that is good."""
        failures = 0
        while True:
            found = stream.next()
            try:
                sample = self._decoded(found, word)
            except BadSample as error:
                failures += 1
                dropped[error.cause] += 1
                self._check_share(error.cause, failures, stream)
                continue
            self._seen["good"] += 1
            return sample

    def _decoded(self, found: Found, word: int) -> Decoded:
        """A sample that was read; raises BadSample. word: seeds what is drawn."""
        b = self._b
        if isinstance(found, BadSample):
            raise found
        if isinstance(found, TokenSample):
            views, texts = len(found.tokens), found.captions
            if not texts:
                raise BadSample(EMPTY_CAPTION)
            return found.tokens[word % views], texts[word // views % len(texts)], found.key
        captions = captions_of(found, b.caption_key, b.caption_lines)
        image = read_image(image_of(found), b.max_pixels, b.max_aspect)
        pixels = b.augmentation(image, b.image_size, np.random.default_rng(word))
        planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        return planes, captions[word % len(captions)], found["__key__"]

    def _check_share(self, cause: str, failures: int, stream: _Stream) -> None:
        """ValueError where too many samples of late were bad, or all of an epoch of a stream."""
        seen = self._seen
        if cause != MISSING:  # a shard that was cut short is not what is meant
            seen[cause] += 1
        order, number = self._order, stream.number
        epoch = order.epoch_of(number, stream.taken)
        length = order.before(number, epoch + 1) - order.before(number, epoch)
        bad = seen.total() - seen["good"]
        share = seen.total() >= self._of_share and bad > self._b.max_bad * seen.total()
        if share or failures > length + MIN_SAMPLES:
            causes = seen - Counter(good=seen["good"])
            b = self._b
            raise too_many_bad(b.index, b.caption_key, b.max_bad, causes or Counter([cause]))
        if seen.total() > 2 * self._of_share:
            self._seen = Counter({name: n // 2 for name, n in seen.items()})

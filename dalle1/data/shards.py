"""Pictures with captions as batches: WebDataset shards, folders of pairs, the built-in shapes.

The order is one global stream, a function of the seed alone: epoch after epoch, shards permuted,
samples shuffled through a buffer. Global batch g is stream positions [g B, (g + 1) B), each rank
takes its part of it and each worker every so-manieth batch, so neither the number of ranks nor of
workers changes what a step trains on, and resuming at step g is skipping g B positions.

Dimensions: b batch of this rank, B batch over all ranks, R side of the pictures.
"""

from __future__ import annotations

import json
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from braceexpand import braceexpand
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dalle1.data.images import Augmentation, read_image

IMAGE_KEYS = ("png", "jpg", "jpeg", "webp")
MOST_BAD = 0.5  # a larger share of bad samples is a wrong setting, not dirt
Raw = dict[str, Any]


@dataclass
class Batch:
    """Pictures and captions of one step of one rank."""

    images: Tensor  # uint8 [b, 3, R, R]
    captions: list[str]
    seeds: list[int]  # for what a step draws for each: a function of (seed, step, place in B)
    dropped: Counter[str] = field(default_factory=Counter)  # bad samples by cause

    def split(self, size: int) -> list[Batch]:
        """Batches of `size` samples, in order; b is a multiple of it."""
        return [
            Batch(self.images[i : i + size], self.captions[i : i + size], self.seeds[i : i + size])
            for i in range(0, len(self.captions), size)
        ]


def find_shards(data: str) -> list[str]:
    """Shards of a brace pattern, or of a folder that holds tars; ValueError if one is missing."""
    if Path(data).is_dir():
        return sorted(str(path) for path in Path(data).glob("*.tar"))
    try:
        paths = list(braceexpand(data))
    except ValueError as error:
        raise ValueError(f"data: {data!r} is not a valid brace pattern: {error}") from error
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise ValueError(
            f"data: {missing[0]} does not exist ({len(missing)} of {len(paths)} shards of "
            f"{data!r} are missing); give shards such as 'path/{{0000..0009}}.tar', a folder of "
            "tars, or a folder of pictures with a .txt of the same name beside each"
        )
    return paths


def raw_samples(data: str, seed: int | None, epoch: int = 0) -> Iterator[Raw]:
    """Undecoded samples of one epoch; with a seed, shards (or pairs) are permuted.

    A sample maps `__key__` to its name and extensions (png, txt, json ...) to bytes.
    """
    units: list[Any] = list(find_shards(data)) or _pairs(Path(data))
    if not units:
        raise ValueError(f"data: {data!r} has neither .tar shards nor pictures with .txt captions")
    if seed is not None:
        order = np.random.default_rng([seed, epoch, 0]).permutation(len(units))
        units = [units[i] for i in order]
    if isinstance(units[0], str):
        # The splitters pass all on: dividing among ranks and workers is `Batches`' work.
        yield from wds.DataPipeline(
            wds.SimpleShardList(units), wds.tarfile_to_samples(handler=_warn_and_go_on)
        )
    else:
        for image, caption in units:
            yield {
                "__key__": image.stem,
                image.suffix[1:].lower(): image.read_bytes(),
                "txt": caption.read_bytes(),
            }


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    images = (p for p in sorted(folder.rglob("*")) if p.suffix[1:].lower() in IMAGE_KEYS)
    return [(p, p.with_suffix(".txt")) for p in images if p.with_suffix(".txt").is_file()]


def _warn_and_go_on(error: BaseException) -> bool:
    warnings.warn(f"a shard is damaged and its rest is skipped: {error!r}", stacklevel=2)
    return True


def shuffled(samples: Iterator[Raw], size: int, rng: np.random.Generator) -> Iterator[Raw]:
    """Shuffles through a buffer of `size` samples."""
    buffer: list[Raw] = []
    for sample in samples:
        if len(buffer) < size:
            buffer.append(sample)
            continue
        i = int(rng.integers(size))
        buffer[i], sample = sample, buffer[i]
        yield sample
    for i in rng.permutation(len(buffer)):
        yield buffer[i]


def image_of(sample: Raw) -> bytes:
    """The encoded picture of a raw sample; KeyError where it has none."""
    for key in IMAGE_KEYS:
        if key in sample:
            data: bytes = sample[key]
            return data
    raise KeyError("no picture")


def caption_of(sample: Raw, caption_key: str) -> str:
    """The caption of a raw sample: its txt, or the named key of its json; KeyError, ValueError."""
    if caption_key == "txt":
        caption = sample["txt"].decode()
    else:
        caption = json.loads(sample["json"])[caption_key]
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError("empty caption")
    return caption.strip()


def read_captions(data: str, caption_key: str, most: int) -> list[str]:
    """The first `most` captions in the order of the files; bad samples are left out."""
    captions: list[str] = []
    for sample in raw_samples(data, seed=None):
        try:
            captions.append(caption_of(sample, caption_key))
        except (KeyError, ValueError, TypeError):
            continue
        if len(captions) == most:
            break
    if not captions:
        raise ValueError(_no_good(data, caption_key, Counter()))
    return captions


def _no_good(data: str, caption_key: str, causes: Counter[str]) -> str:
    found = ", ".join(f"{count} x {cause}" for cause, count in causes.most_common()) or "none read"
    return (
        f"data: hardly a usable sample in {data!r} ({found}); pictures must be "
        f"{', '.join(IMAGE_KEYS)}, captions in {caption_key!r} "
        "(caption_key: txt, or the name of a key of the json)"
    )


class Batches(IterableDataset[Batch]):
    """This rank's batches from global batch `first` on, without end."""

    def __init__(
        self,
        data: str,
        batch_size: int,
        image_size: int,
        augmentation: Augmentation,
        seed: int,
        caption_key: str = "txt",
        buffer: int = 1000,
        first: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if batch_size % ranks:
            raise ValueError(f"batch_size {batch_size} must be a multiple of the {ranks} ranks")
        self.data, self.caption_key, self.buffer = data, caption_key, buffer
        self.batch_size, self.image_size, self.augmentation = batch_size, image_size, augmentation
        self.seed, self.first, self.rank, self.ranks = seed, first, rank, ranks

    def _stream(self) -> Iterator[Raw]:
        epoch = 0
        while True:
            rng = np.random.default_rng([self.seed, epoch, 1])
            count = 0
            for sample in shuffled(raw_samples(self.data, self.seed, epoch), self.buffer, rng):
                count += 1
                yield sample
            if count == 0:
                raise ValueError(_no_good(self.data, self.caption_key, Counter()))
            epoch += 1

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        part = self.batch_size // self.ranks
        stream = self._stream()
        reserve: list[tuple[Tensor, str]] = []
        seen: Counter[str] = Counter()
        for step, block in enumerate(_blocks(stream, self.batch_size)):
            if step < self.first or (step - self.first) % workers != mine:
                continue
            dropped: Counter[str] = Counter()
            good: list[tuple[Tensor, str]] = []
            for i in range(self.rank * part, (self.rank + 1) * part):
                rng = np.random.default_rng([self.seed, step, i])
                try:
                    good.append(self._decode(block[i], rng))
                except Exception as error:  # whatever a decoder raises on dirt costs one sample
                    dropped[type(error).__name__] += 1
            seen.update(dropped)
            seen["good"] += len(good)
            bad = seen.total() - seen["good"]
            if not (good or reserve) or (seen.total() >= 64 and bad > MOST_BAD * seen.total()):
                del seen["good"]
                raise ValueError(_no_good(self.data, self.caption_key, seen))
            # Bad samples are replaced by the latest good ones, so that a batch keeps its size.
            reserve = (reserve + good)[-part:]
            while len(good) < part:
                good.append(reserve[len(good) % len(reserve)])
            images, captions = zip(*good, strict=True)
            places = range(self.rank * part, (self.rank + 1) * part)
            seeds = [_draw_seed(self.seed, step, place) for place in places]
            yield Batch(torch.stack(images), list(captions), seeds, dropped)

    def _decode(self, sample: Raw, rng: np.random.Generator) -> tuple[Tensor, str]:
        data, caption = image_of(sample), caption_of(sample, self.caption_key)
        pixels = self.augmentation(read_image(data), self.image_size, rng)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), caption

    def loader(self, workers: int = 0) -> Iterator[Batch]:
        """Batches in order, decoded by `workers` processes ahead of time (0: in this one)."""
        return iter(
            DataLoader(self, batch_size=None, num_workers=workers, worker_init_fn=ignore_signals)
        )


def ignore_signals(worker: int) -> None:
    """A signal to all processes of a run is for the rank alone, which needs its workers to end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _draw_seed(seed: int, step: int, place: int) -> int:
    # The last word sets it apart from the augmentation's stream of the same sample.
    return int(np.random.SeedSequence([seed, step, place, 1]).generate_state(1)[0])


def _blocks(stream: Iterator[Raw], size: int) -> Iterator[list[Raw]]:
    block: list[Raw] = []
    for sample in stream:
        block.append(sample)
        if len(block) == size:
            yield block
            block = []

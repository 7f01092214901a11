"""Views of the pictures of raw shards, decoded ahead of the dVAE that encodes them (listing 2).

Dimensions: b samples, v views of each, R side of a picture in pixels.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dalle1.common.config import Section
from dalle1.data.samples import (
    DAMAGED,
    DUPLICATE,
    MAX_PIXELS,
    NO_CAPTION,
    TOO_LARGE,
    Bad,
    caption_keys,
    captions_of,
    image_of,
)
from dalle1.data.shards.tar import MAX_BYTES, RETRIES, Raw, Sample, Shard, is_stream
from dalle1.data.transforms import augment_dalle, no_augmentation, read_image


class ViewSettings(Section):
    """What is taken of a sample."""

    caption_key: str = Field("txt", description="txt, or the name of a key of the json")
    caption_lines: bool = Field(False, description="each line of the txt is a caption of its own")
    views: int = Field(1, ge=1, description="draws of each picture, for as many epochs")
    augment: bool = Field(False, description="views are crops of listing 2; else the middle square")
    seed: int = Field(0, ge=0, description="of the views")
    max_aspect: float = Field(
        20.0, ge=1, allow_inf_nan=False, description="longer side / shorter side; more is dirt"
    )
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="of a picture; more is dirt")

    @model_validator(mode="after")
    def _check(self) -> ViewSettings:
        if not self.augment and self.views > 1:
            raise ValueError(
                f"views={self.views} of the middle square are all the same: set augment=true, or "
                "views=1"
            )
        if not self.augment and self.seed:
            raise ValueError(f"seed={self.seed} is read with augment=true alone: take it out")
        if self.caption_lines and self.caption_key != "txt":
            raise ValueError(
                f"caption_lines is read with caption_key=txt, not {self.caption_key!r}: take it out"
            )
        return self


@dataclass
class End:
    """What there is to say of a raw shard when it is read."""

    bytes: int | None = None  # none: streamed
    dropped: Counter[str] = field(default_factory=Counter)  # samples by cause
    there: Counter[str] = field(default_factory=Counter)  # keys of text where a caption is missing
    damage: str = ""
    failure: str = ""  # of the disk or the network


class Chunk(NamedTuple):
    """Good samples of a shard that lie behind one another; the last chunk has an end."""

    shard: int
    keys: list[str]
    captions: list[list[str]]
    pictures: Tensor  # uint8 [b * v, 3, R, R]
    end: End | None


class Decoding(IterableDataset[Chunk]):
    """Chunks of the shards; of several workers each has shards of its own."""

    def __init__(
        self, addresses: Sequence[str], settings: ViewSettings, at_once: int, side: int
    ) -> None:
        """at_once: pictures of a chunk. side: of a view, in pixels."""
        self._addresses, self._settings = addresses, settings
        self._at_once, self._side = max(1, at_once // settings.views), side

    def __iter__(self) -> Iterator[Chunk]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for i in range(first, len(self._addresses), step):
            yield from _decode(i, self._addresses[i], self._settings, self._at_once, self._side)


def _decode(
    number: int, address: str, settings: ViewSettings, at_once: int, side: int
) -> Iterator[Chunk]:
    shard, end = Shard(address, max_bytes=MAX_BYTES), End()
    known: set[str] = set()
    held: list[tuple[str, list[str], np.ndarray]] = []

    def chunk(last: End | None) -> Chunk:
        keys, captions = [key for key, _, _ in held], [texts for _, texts, _ in held]
        empty = np.empty((0, side, side, 3), np.uint8)
        pictures = np.concatenate([empty, *(views for _, _, views in held)])
        planes = torch.from_numpy(rearrange(pictures, "n h w c -> n c h w").copy())
        held.clear()
        return Chunk(number, keys, captions, planes, last)

    try:
        end.bytes = size_of(address)  # before it is read: it may be changed meanwhile
        for sample in _samples(shard):
            raw = sample.raw()
            end.dropped[DUPLICATE] += _glued(sample)
            try:
                if sample.key in known:
                    raise Bad(DUPLICATE)
                known.add(sample.key)
                if sample.too_large:
                    raise Bad(TOO_LARGE)
                held.append((sample.key, *_captions_and_views(raw, settings, side)))
            except Bad as error:
                end.dropped[error.cause] += 1
                if error.cause == NO_CAPTION:
                    end.there.update(caption_keys(raw))
                continue
            if len(held) == at_once:
                yield chunk(None)
    except OSError as error:
        end.failure = f"{address} cannot be read: {error}"
    end.damage = shard.damage
    end.dropped[DAMAGED] += bool(shard.cut)
    yield chunk(end)


def _samples(shard: Shard) -> Iterator[Sample]:
    """Samples in order; of a stream that breaks off it is tried whether there are more."""
    taken, stream = 0, is_stream(shard.address)
    waits = iter(RETRIES if stream else ())
    while True:
        try:
            for sample in islice(shard, taken, None):
                taken += 1
                yield sample
            why = shard.damage
            if not why:
                return
            if (wait := next(waits, None)) is None:
                if stream and not taken:  # an address that is wrong, or a server that is down
                    raise OSError(why)
                return
        except OSError as error:
            why = str(error)
            if (wait := next(waits, None)) is None:
                raise
        warnings.warn(f"{shard.address} broke off, trying again: {why}", stacklevel=2)
        time.sleep(wait)


def _glued(sample: Sample) -> int:
    """Samples of the same key that lie right behind it, and so are no samples of their own."""
    endings = Counter(member.name.lower() for member, _ in sample.files)
    return max(endings.values()) - 1


def _captions_and_views(
    raw: Raw, settings: ViewSettings, side: int
) -> tuple[list[str], np.ndarray]:
    """All captions; uint8 [v, R, R, 3]. Raises Bad."""
    captions = captions_of(raw, settings.caption_key, settings.caption_lines)
    picture = read_image(image_of(raw), settings.max_pixels, settings.max_aspect)
    augmentation = augment_dalle if settings.augment else no_augmentation
    views = [
        augmentation(picture, side, draws(settings.seed, raw["__key__"], view))
        for view in range(settings.views)
    ]
    return captions, np.stack(views)


def draws(seed: int, key: str, view: int) -> np.random.Generator:
    """What a view is drawn with, whoever draws it."""
    text = f"{seed} {view} {key}".encode(errors="surrogatepass")  # names are any bytes
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest(), "little"))


def size_of(address: str) -> int | None:
    """Bytes of a shard on a disk; None for a stream."""
    return None if is_stream(address) else Path(address).stat().st_size

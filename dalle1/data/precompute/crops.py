"""Views of the images of raw shards, decoded ahead of the dVAE that encodes them (listing 2).

Dimensions: b samples, v views of each, R side of a view in pixels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
    DUPLICATE_KEY,
    IMAGE_TOO_LARGE,
    MAX_ASPECT,
    MAX_PIXELS,
    NO_CAPTION,
    BadSample,
    RawSample,
    caption_keys,
    captions_of,
    image_of,
)
from dalle1.data.shards.addresses import read_samples, size_of
from dalle1.data.shards.tar import MAX_BYTES, RETRIES, Shard
from dalle1.data.transforms import augment_dalle, no_augmentation, read_image


class ViewSettings(Section):
    """What is taken of a sample."""

    caption_key: str = Field("txt", description="txt, or the name of a key of the json")
    caption_lines: bool = Field(False, description="each line of the txt is a caption of its own")
    views: int = Field(1, ge=1, description="crops of each image, for as many epochs")
    augment: bool = Field(False, description="views are crops of listing 2; else the middle square")
    seed: int = Field(0, ge=0, description="of the views")
    max_aspect: float = Field(
        MAX_ASPECT,
        ge=1,
        allow_inf_nan=False,
        description="longer side / shorter side; images beyond are skipped",
    )
    max_pixels: int = Field(
        MAX_PIXELS, ge=1, description="of an image; larger ones are skipped, undecoded"
    )

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
    """What is known of a raw shard once it is read."""

    bytes: int | None = None  # none: remote
    dropped: Counter[str] = field(default_factory=Counter)  # samples by cause
    there: Counter[str] = field(default_factory=Counter)  # keys of text where a caption is missing
    damage: str = ""
    failure: str = ""  # of the disk or the network


class Chunk(NamedTuple):
    """Consecutive good samples of a shard; the last chunk of a shard has an end."""

    shard: int
    keys: list[str]
    captions: list[list[str]]
    images: Tensor  # uint8 [b * v, 3, R, R]
    end: End | None


class Decoding(IterableDataset[Chunk]):
    """Chunks of the shards; of several workers each has shards of its own."""

    def __init__(
        self, addresses: Sequence[str], settings: ViewSettings, at_once: int, side: int
    ) -> None:
        """The chunks of some shards.

        Args:
            addresses: of the shards.
            settings: what is taken of a sample.
            at_once: views of a chunk, at most.
            side: of a view, in pixels.
        """
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
        images = np.concatenate([empty, *(views for _, _, views in held)])
        planes = torch.from_numpy(rearrange(images, "n h w c -> n c h w").copy())
        held.clear()
        return Chunk(number, keys, captions, planes, last)

    try:
        end.bytes = size_of(address)  # before it is read: it may be changed meanwhile
        for sample in read_samples(shard, RETRIES):
            raw = sample.raw()
            end.dropped[DUPLICATE_KEY] += sample.merged()
            try:
                if sample.key in known:
                    raise BadSample(DUPLICATE_KEY)
                known.add(sample.key)
                if sample.too_large:
                    raise BadSample(IMAGE_TOO_LARGE)
                held.append((sample.key, *_captions_and_views(raw, settings, side)))
            except BadSample as error:
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


def _captions_and_views(
    raw: RawSample, settings: ViewSettings, side: int
) -> tuple[list[str], np.ndarray]:
    """All captions; uint8 [v, R, R, 3]. Raises BadSample."""
    captions = captions_of(raw, settings.caption_key, settings.caption_lines)
    image = read_image(image_of(raw), settings.max_pixels, settings.max_aspect)
    augmentation = augment_dalle if settings.augment else no_augmentation
    views = [
        augmentation(image, side, view_rng(settings.seed, raw["__key__"], view))
        for view in range(settings.views)
    ]
    return captions, np.stack(views)


def view_rng(seed: int, key: str, view: int) -> np.random.Generator:
    """The random numbers of a sample's view, a function of the arguments alone."""
    text = f"{seed} {view} {key}".encode(errors="surrogatepass")  # names are any bytes
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest(), "little"))

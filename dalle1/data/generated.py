"""Data sets that a program makes, as WebDataset shards."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dalle1.common.files import add_file, expand_home, make_folder, replacing

TAR_FORMAT = tarfile.USTAR_FORMAT


class GeneratedSample(Protocol):
    """An image (uint8 [side, side, 3]), its caption, the dataclass that both come from, and a key
    that is unique within a data set of one seed."""

    @property
    def key(self) -> str: ...
    @property
    def image(self) -> np.ndarray: ...
    @property
    def caption(self) -> str: ...
    @property
    def scene(self) -> Any: ...


def write_generated(
    make: Callable[[int], GeneratedSample],
    folder: str | os.PathLike[str],
    split: str,
    count: int,
    seed: int,
    samples_per_shard: int,
) -> list[Path]:
    """Writes samples 0 ... count - 1 as shards and returns their paths.

    A sample is `<key>.png`, `<key>.txt` (the caption) and `<key>.json` (caption, seed, split,
    index, scene). Shards are called `train-00000.tar` and so on after the split, have the same
    bytes every time, and appear under that name only when complete. Those of an earlier call are
    written over: nothing tells whether they are of the same seed and size.

    Args:
        make: gives a sample by its index.
        folder: is made where it does not exist.
        split: for the names of the shards.
        count: of samples.
        seed: that `make` uses, for the json.
        samples_per_shard: the last shard may have fewer.

    Raises:
        ValueError: a count or samples_per_shard below 1; a folder with shards of this split beyond
            those to be written (a reader that globs would mix two data sets).
    """
    for name, value in (("count", count), ("samples_per_shard", samples_per_shard)):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    folder = Path(expand_home(folder))
    make_folder(folder)
    starts = range(0, count, samples_per_shard)
    paths = [folder / f"{split}-{number:05d}.tar" for number in range(len(starts))]
    stale = sorted(set(folder.glob(f"{split}-*.tar")) - set(paths))
    if stale:
        raise ValueError(f"{folder} holds {stale[0].name} of a larger data set: use an empty one")
    for path, start in zip(paths, starts, strict=True):
        with replacing(path) as temporary, tarfile.open(temporary, "w", format=TAR_FORMAT) as tar:
            for index in range(start, min(start + samples_per_shard, count)):
                sample = make(index)
                details = {"caption": sample.caption, "seed": seed, "split": split, "index": index}
                details["scene"] = asdict(sample.scene)
                add_file(tar, f"{sample.key}.png", _png(sample.image))
                add_file(tar, f"{sample.key}.txt", sample.caption.encode())
                add_file(tar, f"{sample.key}.json", json.dumps(details).encode())
    return paths


def sample_bytes(sample: GeneratedSample) -> int:
    """About how many bytes of a shard a sample takes: its three files in whole blocks, each with a
    header; the json is taken to need two blocks."""
    blocks = [-(-len(data) // tarfile.BLOCKSIZE) for data in (_png(sample.image), sample.caption)]
    return tarfile.BLOCKSIZE * (3 + sum(blocks) + 2)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()

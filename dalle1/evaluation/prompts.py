"""The captions of a benchmark, and the true images that generated ones are compared with.

Dimensions: H W image height and width.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from dalle1.common.config import SHAPES
from dalle1.common.files import read_text
from dalle1.common.images import to_tensor
from dalle1.data import shapes
from dalle1.data.samples import (
    BadSample,
    RawSample,
    captions_of,
    cleaned,
    image_of,
    split_lines,
)
from dalle1.data.shards.index import (
    TOKENS,
    find_pairs,
    find_shards,
    kind_of,
    no_good,
    raw_samples,
)
from dalle1.data.shards.tar import is_remote
from dalle1.data.shards.token_shard import TokenShard
from dalle1.data.transforms import middle_square, read_image
from dalle1.evaluation.config import RankSettings

TEST_SEED = 1  # of the built-in test images; the training images have another
UNSEEN, HELDOUT, GIVEN = "unseen captions", "held-out pairs", "captions"


@dataclass(frozen=True)
class Prompt:
    """A caption and the group that it is reported in."""

    caption: str
    group: str
    scene: shapes.Scene | None = None  # what the caption describes; built-in data only


def read_prompts(settings: RankSettings) -> list[Prompt]:
    """The captions of a benchmark.

    Those of the built-in data occur in no training sample; the held-out pairs are a group of their
    own.

    Raises:
        ValueError: the data cannot be read or has no captions.
    """
    if settings.data == SHAPES:
        trained = training_captions(settings.training_captions or 0)
        unseen = unseen_samples("test", settings.captions, trained)
        heldout = unseen_samples("heldout", settings.heldout_captions or 0, trained)
        return [
            Prompt(sample.caption, group, sample.scene)
            for group, samples in ((UNSEEN, unseen), (HELDOUT, heldout))
            for sample in samples
        ]
    captions = _chosen(_caption_lists(settings), settings)
    if not captions:
        raise ValueError(f"data: {settings.data} holds no captions")
    return [Prompt(caption, GIVEN) for caption in captions]


def _chosen(samples: Iterable[list[str]], settings: RankSettings) -> list[str]:
    """The captions that are drawn, of the captions of each sample.

    Without a seed they are the first of the data. With one they are chosen at random among all and
    all differ, since two of one text would be drawn as the same images; an image whose caption is
    taken already gives another one of its captions, or none.
    """
    if settings.captions_per_image == "all":
        samples = ([caption] for captions in samples for caption in captions)
    if settings.caption_seed is None:
        return [captions[0] for captions in islice(samples, settings.captions)]
    rng = np.random.default_rng(settings.caption_seed)
    listed = list(samples)
    chosen: dict[str, None] = {}  # in order
    for i in rng.permutation(len(listed)):
        captions = [listed[i][j] for j in rng.permutation(len(listed[i]))]
        if new := next((caption for caption in captions if caption not in chosen), None):
            chosen[new] = None
        if len(chosen) == settings.captions:
            break
    return list(chosen)


def _caption_lists(settings: RankSettings) -> Iterator[list[str]]:
    """The captions of each sample of the data, at least one; bad samples are skipped."""
    if _is_list(settings.data):
        yield from ([caption] for line in _lines(settings.data) if (caption := cleaned(line)))
        return
    shards = find_shards(settings.data)
    if kind_of(settings.data, shards) == TOKENS:
        for path in shards:
            yield from filter(None, TokenShard(path).captions())
        return
    bad: Counter[str] = Counter()
    good = False
    for sample in raw_samples(settings.data, frozenset({"txt", "json"})):
        try:
            yield captions_of(sample, settings.caption_key)
            good = True
        except BadSample as error:
            bad[error.cause] += 1
    if not good and bad:
        raise ValueError(no_good(settings.data, settings.caption_key, bad))


def _lines(path: str) -> list[str]:
    """The lines of a list of captions."""
    try:
        return split_lines(read_text(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} cannot be read: {error}; save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"data: {path} cannot be read: {error}") from error


def _is_list(data: str) -> bool:
    """Whether data are a file of captions, one a line, and not a folder that is called so."""
    return data.lower().endswith(".txt") and not is_remote(data) and not Path(data).is_dir()


def _are_tokens(data: str) -> bool:
    return kind_of(data, find_shards(data)) == TOKENS


def data_digest(settings: RankSettings) -> str:
    """16 digits that change with the names or sizes of the files that the data are.

    Of remote shards only the addresses count.
    """
    files: list[str] = []
    if settings.data != SHAPES:
        listed = _is_list(settings.data)
        files = [settings.data] if listed else find_shards(settings.data)
        files = files or find_pairs(settings.data)
    sizes = [(Path(f).name, Path(f).stat().st_size) for f in files if not is_remote(f)]
    remote = [f for f in files if is_remote(f)]
    return hashlib.sha256(json.dumps([sizes, remote]).encode()).hexdigest()[:16]


def true_images(
    settings: RankSettings, side: int, wanted: Callable[[int], bool] = lambda index: True
) -> Iterator[tuple[int, Tensor | None]] | None:
    """The true images to compare with, by the number of their sample; None where the data has none.

    Each is the middle square of a sample's image, resized: float [3, side, side] in [0, 1]. It is
    None where the sample has no image that can be read.

    Args:
        settings: of the benchmark.
        side: of the images, in pixels.
        wanted: tells the samples that are asked for; no other one is decoded or returned.
    """
    limit = settings.reference_images
    if settings.data == SHAPES:
        numbers = filter(wanted, range(limit))
        return ((i, to_tensor(shapes.make(TEST_SEED, i, "test", side).image)) for i in numbers)
    if _is_list(settings.data) or _are_tokens(settings.data):
        return None
    samples = enumerate(islice(raw_samples(settings.data), limit))
    return ((i, _true_image(sample, side)) for i, sample in samples if wanted(i))


def _true_image(sample: RawSample, side: int) -> Tensor | None:
    try:
        return to_tensor(np.array(middle_square(read_image(image_of(sample)), side)))
    except BadSample:
        return None


def training_captions(count: int) -> set[str]:
    """The captions of the first `count` built-in training samples."""
    return {shapes.make(0, i, "train", shapes.MIN_SIDE).caption for i in range(count)}


def unseen_samples(split: str, count: int, trained: set[str]) -> list[shapes.ShapesSample]:
    """The first samples of a built-in split with different captions that are not in `trained`."""
    used = set(trained)
    samples: list[shapes.ShapesSample] = []
    index = 0
    while len(samples) < count:
        sample = shapes.make(TEST_SEED, index, split, shapes.MIN_SIDE)
        if sample.caption not in used:
            used.add(sample.caption)
            samples.append(sample)
        index += 1
    return samples

"""The captions of a benchmark, and the true images that generated ones are compared with.

Dimensions: H W image height and width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from dalle1.common.config import SHAPES
from dalle1.common.files import read_text
from dalle1.common.images import to_tensor
from dalle1.data import shapes
from dalle1.data.samples import BadSample, caption_of, cleaned, image_of, split_lines
from dalle1.data.shards.index import (
    TOKENS,
    find_shards,
    kind_of,
    no_good,
    raw_samples,
    read_captions,
)
from dalle1.data.shards.tar import is_remote
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
    if _is_list(settings.data):
        try:
            lines = split_lines(read_text(settings.data))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data: {settings.data} cannot be read: {error}; save it as UTF-8"
            ) from error
        except OSError as error:
            raise ValueError(f"data: {settings.data} cannot be read: {error}") from error
        captions = [caption for line in lines if (caption := cleaned(line))]
    else:
        captions = list(_captions(settings))
    if not captions:
        raise ValueError(f"data: {settings.data} holds no captions")
    return [Prompt(caption, GIVEN) for caption in captions[: settings.captions]]


def _is_list(data: str) -> bool:
    """Whether data are a file of captions, one a line, and not a folder that is called so."""
    return data.lower().endswith(".txt") and not is_remote(data) and not Path(data).is_dir()


def _captions(settings: RankSettings) -> Iterator[str]:
    """The first captions of shards or of a folder of pairs; bad samples are skipped."""
    if _are_tokens(settings.data):
        yield from read_captions(settings.data, settings.caption_key, settings.captions)
        return
    bad: Counter[str] = Counter()
    count = 0
    for sample in raw_samples(settings.data):
        try:
            caption = caption_of(sample, settings.caption_key)
        except BadSample as error:
            bad[error.cause] += 1
            continue
        yield caption
        count += 1
        if count == settings.captions:
            return
    if not count and bad:
        raise ValueError(no_good(settings.data, settings.caption_key, bad))


def _are_tokens(data: str) -> bool:
    return kind_of(data, find_shards(data)) == TOKENS


def true_images(settings: RankSettings, side: int) -> Iterator[Tensor] | None:
    """Images [3, side, side] in [0, 1] to compare with; None where the data has none.

    Each is the middle square of a sample's image, resized.
    """
    limit = settings.reference_images
    if settings.data == SHAPES:
        return (to_tensor(shapes.make(TEST_SEED, i, "test", side).image) for i in range(limit))
    if _is_list(settings.data) or _are_tokens(settings.data):
        return None
    return map(to_tensor, islice(_middle_squares(settings.data, side), limit))


def _middle_squares(data: str, side: int) -> Iterator[np.ndarray]:
    """Images uint8 [side, side, 3]; bad samples are skipped."""
    for sample in raw_samples(data):
        try:
            pixels = read_image(image_of(sample))
        except BadSample:
            continue
        yield middle_square(pixels, side)


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

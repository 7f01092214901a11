"""The captions of a benchmark and the true pictures that drawn ones are compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from dalle1.common.config import SHAPES
from dalle1.common.images import to_tensor
from dalle1.data import shapes
from dalle1.data.samples import BadSample, caption_of, image_of
from dalle1.data.shards.index import raw_samples
from dalle1.data.transforms import middle_square, read_image
from dalle1.evaluation.config import RankSettings

TEST_SEED = 1  # of the built-in test pictures; training's is another
UNSEEN, HELDOUT, GIVEN = "unseen captions", "held-out pairs", "captions"


@dataclass(frozen=True)
class Prompt:
    """A caption and the group that it is reported in."""

    caption: str
    group: str
    scene: shapes.Scene | None = None  # of the built-in data


def read_prompts(settings: RankSettings) -> list[Prompt]:
    """The captions of a benchmark; of the built-in data none that occurs in training, and apart
    from them the held-out pairs. ValueError where there are none."""
    if settings.data == SHAPES:
        known = training_captions(settings.training_captions or 0)
        samples = unseen("test", settings.captions, known)
        prompts = [Prompt(s.caption, UNSEEN, s.scene) for s in samples]
        samples = unseen("heldout", settings.heldout_captions or 0, known)
        return prompts + [Prompt(s.caption, HELDOUT, s.scene) for s in samples]
    if settings.data.endswith(".txt"):
        try:
            lines = Path(settings.data).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data: {settings.data} cannot be read: {error}") from error
        captions = [line.strip() for line in lines if line.strip()]
    else:
        captions = list(_captions(settings))
    if not captions:
        raise ValueError(f"data: {settings.data} holds no captions")
    return [Prompt(caption, GIVEN) for caption in captions[: settings.captions]]


def _captions(settings: RankSettings) -> Iterator[str]:
    bad: Counter[str] = Counter()
    found = 0
    for sample in raw_samples(settings.data):
        try:
            caption = caption_of(sample, settings.caption_key)
        except BadSample as error:
            bad[error.cause] += 1
            continue
        yield caption
        found += 1
        if found == settings.captions:
            return
    if not found and bad:
        raise ValueError(
            f"data: no caption under the key {settings.caption_key!r} of {settings.data}: "
            + ", ".join(f"{cause} ({n} times)" for cause, n in bad.most_common(3))
        )


def true_pictures(settings: RankSettings, side: int) -> Iterator[Tensor] | None:
    """Pictures [3, side, side] in [0, 1] to compare with; None where the data has none.

    The middle square of each, scaled.
    """
    most = settings.reference_images
    if settings.data == SHAPES:
        made = (shapes.make(TEST_SEED, i, "test", side).image for i in range(most))
        return map(to_tensor, made)
    if settings.data.endswith(".txt"):
        return None
    return map(to_tensor, islice(_squares(settings.data, side), most))


def _squares(data: str, side: int) -> Iterator[np.ndarray]:
    for sample in raw_samples(data):
        try:
            pixels = read_image(image_of(sample))
        except BadSample:
            continue
        yield middle_square(pixels, side)


def training_captions(count: int) -> set[str]:
    """The captions of the first `count` built-in training samples."""
    return {shapes.make(0, i, "train", shapes.MIN_SIDE).caption for i in range(count)}


def unseen(split: str, count: int, known: set[str]) -> list[shapes.ShapesSample]:
    """The first samples of a built-in split whose captions are neither known nor repeated."""
    known = set(known)
    found: list[shapes.ShapesSample] = []
    index = 0
    while len(found) < count:
        candidate = shapes.make(TEST_SEED, index, split, shapes.MIN_SIDE)
        if candidate.caption not in known:
            known.add(candidate.caption)
            found.append(candidate)
        index += 1
    return found

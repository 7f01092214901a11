"""The built-in shapes as data that are judged: by the checker of what an image shows.

Dimensions: H W image height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
from torch import Tensor

from dalle1.common.config import SHAPES
from dalle1.common.images import to_pil, to_tensor
from dalle1.data import shapes
from dalle1.evaluation.config import DataSettings, RankSettings
from dalle1.evaluation.judged import NOT_CLAIMED, Prompt

TEST_SEED = 1  # of the built-in test images; the training images have another
UNSEEN, HELDOUT = "unseen captions", "held-out pairs"
# What a caption may claim, in the order of `check_image`.
ATTRIBUTES = ("count", "color", "shape", "size", "relation", "background")
CHECKER = "shapes 1"  # another one would be another judge


class ShapesData:
    """A `JudgedData`. Its captions occur in no training sample; those with pairs of color and shape
    that are held out are a group of their own."""

    attributes: ClassVar = ATTRIBUTES
    side = shapes.MIN_SIDE

    def __init__(self, settings: DataSettings) -> None:
        if settings.data != SHAPES:
            raise ValueError(f"judge: shapes judges data={SHAPES} alone, got {settings.data!r}")
        self.settings = settings
        self._scenes: dict[str, shapes.Scene] = {}  # by caption

    def prompts(self) -> list[Prompt]:
        """See `JudgedData`."""
        ranking = self.settings if isinstance(self.settings, RankSettings) else None
        heldout = ranking.heldout_captions if ranking else None
        trained = training_captions((ranking.training_captions if ranking else None) or 0)
        chosen = [(UNSEEN, s) for s in unseen_samples("test", self.settings.captions, trained)]
        chosen += [(HELDOUT, s) for s in unseen_samples("heldout", heldout or 0, trained)]
        self._scenes |= {sample.caption: sample.scene for _, sample in chosen}
        return [Prompt(sample.caption, group) for group, sample in chosen]

    def check(self, image: Tensor, caption: str) -> list[int]:
        """See `JudgedData`."""
        return check_image(image, caption)

    def image(self, prompt: Prompt, side: int) -> Tensor:
        """See `JudgedData`."""
        return to_tensor(shapes.render(self._scenes[prompt.caption], side))

    def true_images(
        self, limit: int, side: int, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, Tensor | None]]:
        """See `JudgedData`."""
        numbers = filter(wanted, range(limit))
        return ((i, to_tensor(shapes.make(TEST_SEED, i, "test", side).image)) for i in numbers)

    def files(self) -> list[str]:
        """None."""
        return []

    def fingerprint(self) -> str:
        """See `JudgedData`."""
        return CHECKER

    def notes(self) -> list[str]:
        """None."""
        return []


def check_image(image: Tensor, caption: str) -> list[int]:
    """What the checker says of an image [3, H, W] in [0, 1], in the order of ATTRIBUTES.

    Returns:
        1 for what the image shows, 0 for what it does not, NOT_CLAIMED for what the caption does
        not say.
    """
    checked = shapes.check(np.asarray(to_pil(image)), caption).attributes
    return [int(checked[name]) if name in checked else NOT_CLAIMED for name in ATTRIBUTES]


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

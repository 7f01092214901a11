"""Emoji of patterns and a model that knows their images, for the findings about emoji."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle1 import Model, Tokenizer, registry
from dalle1.common.images import to_tensor
from dalle1.data.emoji import EmojiDataset
from tests import fakes
from tests.evaluation.emoji import (
    COUNT,
    KINDS,
    SEED,
    SIDE,
    KnowingPrior,
    KnownConfig,
    QuarterCodec,
    write_data,
)

SPLITS = ("test", "heldout_styles")
LENGTH = 64  # text positions
BRIGHTNESS = fakes.KINDS[2]
Written = tuple[Path, Path, EmojiDataset]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_data(tmp_path_factory.mktemp("emoji"))


@contextmanager
def registered() -> Iterator[None]:
    """The fakes are known in this block alone."""
    before = {role: dict(known) for role, known in registry.KINDS.items()}
    for kind in (*KINDS[:2], BRIGHTNESS):
        registry.register(kind)
    try:
        yield
    finally:
        for role, known in registry.KINDS.items():
            known.clear()
            known.update(before[role])


@pytest.fixture
def kinds() -> Iterator[None]:
    with registered():
        yield


def write_model(folder: Path, dataset: EmojiDataset, right: float) -> Path:
    """A model that knows the image of each caption, and begins with it with this probability."""
    captions: dict[str, Tensor] = {}
    for split in SPLITS:
        for i in range(COUNT):
            sample = dataset.make(SEED, i, split, SIDE)
            captions.setdefault(sample.caption, to_tensor(sample.image))
    tokenizer = Tokenizer.train(captions, 320, LENGTH, dropout=0.0)
    images, texts = torch.stack(list(captions.values())), tokenizer.encode(list(captions))
    config = KnownConfig(
        count=len(images), text_vocab=tokenizer.vocab_size, text_length=LENGTH, right=right
    )
    codec, prior = QuarterCodec(config), KnowingPrior(config)
    codec.load_state_dict({"images": images})
    prior.load_state_dict({"texts": texts})
    with registered():
        Model(tokenizer, prior, codec, fakes.BrightnessRanker()).save(folder)
    return folder

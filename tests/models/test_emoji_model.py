"""The emoji model that comes with the library, as it is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import dalle1
from dalle1 import Model, models
from dalle1.data.emoji import STYLES
from dalle1.data.emoji.pictures import BACKGROUNDS
from dalle1.data.emoji.sources import NAMES_LICENSE_TEXT

LARGEST = 16_000_000  # bytes of a folder that every installation holds


@pytest.fixture(scope="module")
def emoji() -> Model:
    return dalle1.load("emoji")


@pytest.fixture(scope="module")
def folder() -> Path:
    return models.folder() / models.DEFAULT


def test_it_is_small_and_in_16_bits(folder: Path) -> None:
    """32-bit weights, or a file that is not the model's, in a package that everyone downloads."""
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(files.values()) <= LARGEST
    for name in files:
        if name.endswith(".safetensors"):
            with safe_open(folder / name, "pt") as weights:
                kinds = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
            assert kinds == {"F16"}


def test_its_card_says_what_the_licenses_ask(folder: Path) -> None:
    """A model that is handed on without the artists whose pictures it learned."""
    card = " ".join((folder / models.CARD).read_text(encoding="utf-8").replace("> ", "").split())
    for style in STYLES.values():
        for part in (style.attribution, style.license, style.license_text):
            assert part in card
    assert NAMES_LICENSE_TEXT in card and "@" not in card
    assert models.about(models.DEFAULT).startswith("Draws emoji in three styles ")


def test_backgrounds_are_as_asked_for(emoji: Model) -> None:
    """Weights of another model, or a tokenizer that is not theirs: then captions change nothing."""
    names = ("pink", "blue", "green", "black")
    captions = [f"a noto emoji of a red apple on a {name} background" for name in names]
    result = dalle1.sample(captions, emoji, candidates=8, keep=1, progress=False)
    for name, images in zip(names, result.images, strict=True):
        assert images[0].size == (48, 48)
        corner = np.asarray(images[0], np.float32)[:3, :3].mean((0, 1))
        distances = {b: np.abs(corner - color).max() for b, color in BACKGROUNDS.items()}
        assert min(distances, key=distances.__getitem__) == name


def test_its_ranker_reads_captions(emoji: Model) -> None:
    """A ranker whose tokenizer or weights are another model's: it ranks at random."""
    captions = ["a red apple, noto style", "the flag of japan, noto style", "a frog, noto style"]
    result = dalle1.sample(captions, emoji, candidates=32, keep=1, progress=False)
    drawn = [images[0] for images in result.images]
    scores = np.stack([dalle1.rank(caption, drawn, emoji).numpy() for caption in captions])
    assert (scores.argmax(1) == np.arange(len(captions))).all()


def test_a_candidate_is_the_same_alone_and_among_others(emoji: Model) -> None:
    """A model that computes in the 16 bits of its files: then rounding decides what is drawn."""
    caption = "a noto emoji of a frog"
    among = dalle1.sample(caption, emoji, candidates=16, keep=16, progress=False)
    by_number = dict(zip(among.candidate_numbers[0].tolist(), among.tokens[0], strict=True))
    for number in (0, 7):
        alone = dalle1.sample(
            caption, emoji, candidates=1, keep=1, first_candidate=number, progress=False
        )
        assert (alone.tokens[0, 0] == by_number[number]).all()

"""Runs whose captions are read by another tokenizer than the paper's."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dalle1
from dalle1 import registry
from dalle1.text import normalizer
from dalle1.text.kinds import TOKENIZERS
from dalle1.training.config import RunConfig
from dalle1.training.initialization import with_initial_parts
from dalle1.training.stages.text_tokenizer import fingerprint_of, open_tokenizer, read_alike
from dalle1.training.trainer import Trainer
from tests.text.files import published

from .conftest import run_until, tiny
from .test_trainer import losses

KINDS = ("bart", "char_bpe", "yttm")


class LetterTokenizer:
    """No more than the protocol asks for: letters by their code, and padding by position. Its file
    does not say of which kind it is."""

    vocab_size = 128

    def __init__(self, text_length: int = 48, shift: int = 0) -> None:
        self.text_length, self.shift = text_length, shift

    def encode(self, captions: str | Sequence[str], rng: random.Random | None = None) -> Tensor:
        rows = []
        for caption in [captions] if isinstance(captions, str) else captions:
            ids = [(ord(letter) + self.shift) % 128 for letter in caption[: self.text_length]]
            rows.append(ids + [128 + p for p in range(len(ids), self.text_length)])
        return torch.tensor(rows)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        return "".join(chr(int(i)) for i in ids if int(i) < 128)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(f"{self.text_length} {self.shift}")

    @classmethod
    def load(cls, path: str | Path) -> LetterTokenizer:
        return cls(*map(int, Path(path).read_text().split()))


@pytest.fixture
def _letters(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kind of `LetterTokenizer`, for one test."""
    monkeypatch.setitem(registry.TOKENIZERS, "letters", LetterTokenizer)
    yield


def stage_two(
    shards: str, run: Path, parts: Path, tokenizer: Path, **settings: object
) -> RunConfig:
    vocab = settings.pop("text_vocab", None) or open_tokenizer(tokenizer).vocab_size
    base = tiny("dalle", shards, run, parts)
    assert base.transformer is not None
    shape = base.transformer.model_copy(update={"text_vocab": vocab})
    more = {"transformer": shape, "tokenizer": str(tokenizer), "steps": 4, **settings}
    return RunConfig(**(base.model_dump() | more))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_keeps_its_tokenizer(kind: str, shards: str, parts: Path, tmp_path: Path) -> None:
    """A tokenizer that is read as the paper's, is not kept with the run, or is forgotten by its
    model; dropped merges that a resumed run draws anew; a new run from the model's folder."""
    tokenizer = published(kind, tmp_path, 48, normalize=False).with_dropout(0.2)
    tokenizer.save(tmp_path / "mine.json")
    config = stage_two(shards, tmp_path / "once", parts, tmp_path / "mine.json")
    Trainer(config).run()
    parted = config.model_copy(update={"run": str(tmp_path / "run")})
    run_until(parted, 2)
    (tmp_path / "mine.json").unlink()  # the run has its own
    Trainer(parted, resume=True).run()
    assert losses(tmp_path / "run")[-2:] == losses(tmp_path / "once")[-2:]

    folder = tmp_path / "run" / "model"
    model = dalle1.load(folder)
    assert type(model.tokenizer) is TOKENIZERS[kind]
    assert json.loads((folder / "config.json").read_text())["tokenizer"] == {"kind": kind}
    result = dalle1.sample("a red circle", model=model, candidates=2, keep=1, progress=False)
    assert result.images[0][0].size == (16, 16)

    begun = tiny("dalle", shards, tmp_path / "new", parts, steps=2, init=str(folder))
    begun = begun.model_copy(update={"transformer": None, "tokenizer": None})
    assert with_initial_parts(begun).tokenizer == str(folder)
    Trainer(with_initial_parts(begun)).run()
    assert fingerprint_of(open_tokenizer(tmp_path / "new")) == tokenizer.fingerprint()
    other = begun.model_copy(update={"tokenizer": str(parts / "clip")})
    with pytest.raises(ValueError, match="reads captions otherwise than the tokenizer of init"):
        with_initial_parts(other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_is_trained_on_its_tokens(
    kind: str, shards: str, parts: Path, tmp_path: Path
) -> None:
    """A CLIP whose folder opens with another tokenizer than it was trained with."""
    tokenizer = published(kind, tmp_path, normalize=False)
    tokenizer.save(tmp_path / "mine.json")
    base = tiny("clip", shards, tmp_path / "run", parts, steps=2)
    assert base.clip is not None
    shape = base.clip.model_copy(update={"text_vocab": tokenizer.vocab_size + 2})
    Trainer(base.model_copy(update={"clip": shape, "tokenizer": str(tmp_path / "mine.json")})).run()
    clip = registry.load("ranker", tmp_path / "run" / "model")
    assert type(clip.tokenizer) is TOKENIZERS[kind] and read_alike(clip.tokenizer, tokenizer)
    assert clip.ids("a red circle").max() == tokenizer.vocab_size + 1
    assert read_alike(open_tokenizer(tmp_path / "run" / "model"), tokenizer)


def test_another_vocabulary_is_named(shards: str, parts: Path, tmp_path: Path) -> None:
    """Ids beyond the embedding's rows."""
    published("yttm", tmp_path).save(tmp_path / "mine.json")
    config = stage_two(shards, tmp_path / "run", parts, tmp_path / "mine.json", text_vocab=35)
    with pytest.raises(ValueError, match=r"has 34 byte-pair tokens, and the model's text_vocab"):
        Trainer(config)


def test_missing_packages_are_named_at_the_start(
    shards: str, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stops at its first caption with an accent."""
    for name in ("emoji", "ftfy", "unidecode"):
        monkeypatch.setitem(sys.modules, name, None)
    published("bart", tmp_path, 48).save(tmp_path / "mine.json")
    config = stage_two(shards, tmp_path / "run", parts, tmp_path / "mine.json")
    with pytest.raises(
        ValueError, match=r"tokenizer: expected .* is not installed.*dalle1\[mini\]"
    ):
        Trainer(config)
    assert normalizer.Normalizer()("A Cat") == " a cat"


@pytest.mark.usefixtures("_letters")
def test_a_tokenizer_of_somebody_elses(shards: str, parts: Path, tmp_path: Path) -> None:
    """What only this library's tokenizers have: a kind in the file, a fingerprint, another number
    of positions, ids for CLIP."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    LetterTokenizer().save(folder / "tokenizer.json")
    (folder / "config.json").write_text(json.dumps({"format": 2, "tokenizer": {"kind": "letters"}}))
    config = stage_two(shards, tmp_path / "run", parts, folder)
    run_until(config, 2)
    Trainer(config, resume=True).run()
    model = dalle1.load(tmp_path / "run" / "model")
    assert isinstance(model.tokenizer, LetterTokenizer)
    assert isinstance(open_tokenizer(tmp_path / "run" / "model"), LetterTokenizer)

    one, other = LetterTokenizer(), LetterTokenizer(shift=1)
    assert read_alike(one, LetterTokenizer()) and not read_alike(one, other)
    assert not read_alike(one, open_tokenizer(parts / "clip"))
    other.save(folder / "tokenizer.json")
    with pytest.raises(ValueError, match="expected what the run began with"):
        Trainer(config, resume=True)

    LetterTokenizer(12).save(folder / "tokenizer.json")
    short = config.model_copy(update={"run": str(tmp_path / "short")})
    with pytest.raises(ValueError, match=r"expected 48 text positions.*got 12"):
        Trainer(short)
    base = tiny("clip", shards, tmp_path / "clip", parts)
    assert base.clip is not None
    shape = base.clip.model_copy(update={"text_vocab": 130, "text_length": 13})
    with pytest.raises(ValueError, match=r"ids for CLIP.*got LetterTokenizer"):
        Trainer(base.model_copy(update={"clip": shape, "tokenizer": str(folder)}))

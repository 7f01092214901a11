"""Tokenizers as files, in model folders, and as what a CLIP reads by."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dalle1
from dalle1 import CLIP, CLIPConfig, Model, Tokenizer, registry
from dalle1.clip.tokenizer import load_clip_tokenizer
from dalle1.text.base import PublishedTokenizer, kind_in
from dalle1.text.kinds import TOKENIZERS
from dalle1.text.yttm import YTTMTokenizer
from tests.fakes import KINDS, PaletteCodec, PaletteConfig, UnigramConfig, UnigramPrior

from .files import published, small_model

CAPTION = "a red cat"


@pytest.fixture(params=["bart", "char_bpe", "yttm"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(kind: str, tmp_path: Path) -> PublishedTokenizer:
    return published(kind, tmp_path)


@pytest.fixture
def _fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fakes' kinds, for one test."""
    for role, kinds in registry.KINDS.items():
        monkeypatch.setitem(registry.KINDS, role, dict(kinds))
    for known in KINDS:
        registry.register(known)
    yield


def test_round_trip(kind: str, tokenizer: PublishedTokenizer, tmp_path: Path) -> None:
    """A setting, a rule or a mark that is not in the file; a kind that has to be told."""
    changed = tokenizer.with_dropout(0.25).resized(40)
    changed.save(tmp_path / "deep" / "saved.json")
    again = registry.load_tokenizer(tmp_path / "deep" / "saved.json")
    assert type(again) is type(tokenizer) and registry.tokenizer_kind(again) == kind
    assert (again.dropout, again.text_length) == (0.25, 40)
    assert again.vocab_size == tokenizer.vocab_size
    for caption in (CAPTION, "The Cat, isn't it?", "a cat, жж a cat"):
        if kind == "bart" and not caption.isascii():
            continue
        assert torch.equal(again.encode(caption), changed.encode(caption))
        theirs = [t.encode(caption, random.Random(1)) for t in (again, changed)]
        assert torch.equal(*theirs)
    row = again.encode(CAPTION)[0]
    assert again.decode(row) == changed.decode(row)
    assert again.fingerprint() == changed.fingerprint()


def test_what_tokenizers_are_known_by(kind: str, tokenizer: PublishedTokenizer) -> None:
    """Another number of positions that counts as another tokenizer, or another share of dropped
    merges that counts as the same in a run that resumes."""
    longer, dropping = tokenizer.resized(40), tokenizer.with_dropout(0.5)
    assert longer.fingerprint() == tokenizer.fingerprint() != dropping.fingerprint()
    assert tokenizer.reads_like(longer) and tokenizer.reads_like(dropping)
    assert not tokenizer.reads_like(object()) and len(tokenizer.fingerprint()) == 16


def test_other_tokens_are_told_apart(tmp_path: Path) -> None:
    """Two models with the same counts taken for one; or letters in another order for two."""
    model = small_model()
    one = YTTMTokenizer.from_published(model.write(tmp_path / "bpe.model"))
    model.letters = dict(reversed(model.letters.items()))
    same = YTTMTokenizer.from_published(model.write(tmp_path / "bpe.model"))
    model.rules[0], model.rules[1] = (model.letters["d"], model.letters["o"], 31), model.rules[1]
    other = YTTMTokenizer.from_published(model.write(tmp_path / "bpe.model"))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert one.reads_like(same) and not one.reads_like(other)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"kind": "other"}, "kind: expected 'KIND'"),
    ({"kind": None}, "kind: expected 'KIND'"),
    ({"text_length": 10**12}, "text_length: expected less than"),
    ({"text_length": 0}, "text_length: expected greater than"),
    ({"text_length": 8.5}, "text_length: expected a valid integer"),
    ({"text_length": "8"}, "text_length: expected a valid integer"),
    ({"text_length": True}, "text_length: expected a valid integer"),
    ({"vocab_size": 5}, r"expected ids in \[0, 4\]"),
    ({"vocab_size": 2**70}, "vocab_size: expected"),
    ({"dropout": 1.0}, "dropout: expected less than 1"),
    ({"dropout": float("nan")}, "dropout: expected"),
    ({"surprise": 1}, "surprise: expected no setting of this name"),
    ({"vocab_size": ...}, "vocab_size: Field required"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_hostile_files(
    change: dict[str, Any], message: str, kind: str, tokenizer: PublishedTokenizer, tmp_path: Path
) -> None:
    """Settings that are taken as they come, or an error without the file's name."""
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: v for name, v in content.items() if v is not ...}))
    with pytest.raises(ValueError, match=message.replace("KIND", kind)) as raised:
        type(tokenizer).load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"\xff\xff", b"[" * 10**5, b'{"kind": "%s"', b'{"kind": "%s"}'],
)
def test_files_of_something_else(content: bytes, kind: str, tmp_path: Path) -> None:
    """A crash of a parser, or an error that does not name the file."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content.replace(b"%s", kind.encode()))
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer of this library"):
        TOKENIZERS[kind].load(path)
    with pytest.raises(ValueError, match="missing: expected a tokenizer's file"):
        TOKENIZERS[kind].load(tmp_path / "missing")


def test_a_kind_that_is_not_known_is_named(tmp_path: Path) -> None:
    """A file of a newer release that is opened as the paper's tokenizer."""
    for name in ("tokenizer.json", "clip_tokenizer.json"):
        (tmp_path / name).write_text('{"kind": "newer", "bpe": {}}')
    with pytest.raises(ValueError, match=r"tokenizer\.kind: expected one of bpe, .*got 'newer'"):
        registry.load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"clip_tokenizer\.json: kind: expected one of bpe"):
        load_clip_tokenizer(tmp_path, 300)


def test_a_file_of_any_size_is_not_read(
    tokenizer: PublishedTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that a file asks for."""
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    monkeypatch.setattr("dalle1.text.base.MAX_FILE", 100)
    with pytest.raises(ValueError, match=r"expected a tokenizer's file of at most 100 bytes"):
        type(tokenizer).load(path)


@pytest.mark.usefixtures("_fakes")
def test_a_model_folder_has_any_tokenizer(
    kind: str, tokenizer: PublishedTokenizer, tmp_path: Path
) -> None:
    """A folder that opens with the paper's tokenizer alone; captions that are drawn from, kept or
    refused by other lengths."""
    torch.manual_seed(0)
    prior = UnigramPrior(UnigramConfig(text_vocab=tokenizer.vocab_size, text_length=16))
    model = Model(tokenizer, prior, PaletteCodec(PaletteConfig()))
    model.save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (
        config["tokenizer"]
        == {"kind": kind}
        == {"kind": kind_in(tmp_path / "model/tokenizer.json")}
    )
    again = dalle1.load(tmp_path / "model")
    results = [
        dalle1.sample([CAPTION, "cat"], m, candidates=3, keep=3, guidance=2.0, progress=False)
        for m in (model, again)
    ]
    assert torch.equal(results[0].tokens, results[1].tokens)
    tokens = results[0].tokens[0, 0]
    assert torch.equal(model.log_prob(CAPTION, tokens), again.log_prob(CAPTION, tokens))
    with pytest.raises(ValueError, match="models images, not captions"):
        again.complete_caption("a")
    with pytest.raises(ValueError, match="tokenizer's vocabulary is"):
        Model(Tokenizer.train(["a"], 257, 16), prior, model.codec)


def clip_for(tokenizer: PublishedTokenizer) -> CLIP:
    small = {"embedding": 8, "image_size": 8, "patch_size": 4, "vision_width": 8}
    small |= {"vision_layers": 1, "vision_heads": 1, "text_width": 8, "text_layers": 1}
    return CLIP(
        CLIPConfig(**small, text_heads=1, text_vocab=tokenizer.vocab_size + 2, text_length=12)
    )


def test_a_clip_adopts_any_tokenizer(
    kind: str, tokenizer: PublishedTokenizer, tmp_path: Path
) -> None:
    """A CLIP that reads captions by the ids of another vocabulary, or forgets by which."""
    clip = clip_for(tokenizer)
    clip.adopt_tokenizer(tokenizer)
    ids = clip.ids([CAPTION, "cat"])
    assert ids.argmax(dim=1).tolist() == (ids == tokenizer.vocab_size + 1).int().argmax(1).tolist()
    clip.save_assets(tmp_path)
    again = load_clip_tokenizer(tmp_path, tokenizer.vocab_size)
    assert isinstance(again, type(tokenizer)) and torch.equal(
        again.encode_for_clip([CAPTION, "cat"], 12), ids
    )
    # In a folder of a model without a file of its own, the prior's.
    (tmp_path / "clip_tokenizer.json").unlink()
    tokenizer.save(tmp_path / "tokenizer.json")
    assert isinstance(load_clip_tokenizer(tmp_path, tokenizer.vocab_size), type(tokenizer))
    assert load_clip_tokenizer(tmp_path, 7) is None


def test_a_tokenizer_without_ids_for_clip_is_named(tokenizer: PublishedTokenizer) -> None:
    """An error of vocabularies that are equal."""

    class Foreign:
        vocab_size, text_length = tokenizer.vocab_size, 16

    with pytest.raises(ValueError, match=r"ranker: expected a CLIP with a tokenizer.*Foreign"):
        clip_for(tokenizer).adopt_tokenizer(Foreign())  # type: ignore[arg-type]

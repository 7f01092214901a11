"""Tokenizers that are found among other files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dalle1.text.bart import BARTTokenizer
from dalle1.text.char_bpe import CharBPETokenizer
from dalle1.text.merges import read_merges
from dalle1.text.published import WORDS, find_tokenizer
from dalle1.text.yttm import YTTMTokenizer

from .files import small_model, write_bart, write_char_bpe


def test_each_familys_files(tmp_path: Path) -> None:
    """A tokenizer that is looked for under one name only, or taken for another family's."""
    assert find_tokenizer(tmp_path, 16) is None
    folders = {name: tmp_path / name for name in ("rudalle", "mindalle", "mini", "mega", "fast")}
    for folder in folders.values():
        folder.mkdir()
    (folders["mindalle"] / "tokenizer").mkdir()
    small_model().write(folders["rudalle"] / "bpe.model")
    write_char_bpe(folders["mindalle"] / "tokenizer")
    vocab, merges = write_bart(folders["mega"])
    (folders["mini"] / "vocab_mini.json").write_bytes(vocab.read_bytes())
    (folders["mini"] / "merges_mini.txt").write_bytes(merges.read_bytes())
    model = {"vocab": json.loads(vocab.read_text()), "merges": read_merges(merges)}
    (folders["fast"] / "tokenizer.json").write_text(json.dumps({"model": model}))
    kinds = {"rudalle": YTTMTokenizer, "mindalle": CharBPETokenizer}
    for name, folder in folders.items():
        tokenizer = find_tokenizer(folder, 16, 512, normalize=False)
        assert type(tokenizer) is kinds.get(name, BARTTokenizer), name
        assert (tokenizer.text_length, tokenizer.vocab_size) == (16, 512)
        (file,) = [
            f for f in folder.rglob("*") if f.is_file() and f.suffix != ".txt"
        ]  # the file itself
        again = find_tokenizer(file, 16, 512, normalize=False)
        assert again is not None and again.fingerprint() == tokenizer.fingerprint()


def test_words_that_lie_beside(tmp_path: Path) -> None:
    """Hashtags that are not split although the list is there."""
    write_bart(tmp_path)
    plain = find_tokenizer(tmp_path, 16)
    (tmp_path / WORDS).write_text("red 3\ncat 2\n")
    split = find_tokenizer(tmp_path, 16)
    assert plain is not None and split is not None
    assert split.decode(split.encode("#redcat")[0]) == "red cat"
    assert plain.decode(plain.encode("#redcat")[0]) == "redcat"


def test_files_of_something_else(tmp_path: Path) -> None:
    """Another model's vocabulary that gives ids, a pair that has lost one file."""
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(ValueError, match=r"vocab\.json: expected '\[PAD\]' or '<pad>'"):
        find_tokenizer(tmp_path, 16)
    write_bart(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"merges\.txt: expected a tokenizer's file, got none"):
        find_tokenizer(tmp_path, 16)
    with pytest.raises(ValueError, match="nowhere: expected a tokenizer's file, got none"):
        find_tokenizer(tmp_path / "nowhere", 16)

"""Tokenizers that are found among other files, and read for a prior."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dalle1.published.parts import PublishedPart
from dalle1.published.tokenizers import WORDS, find_tokenizer, read_tokenizer
from dalle1.text.bart import BARTTokenizer
from dalle1.text.char_bpe import CharBPETokenizer
from dalle1.text.merges import read_merges
from dalle1.text.yttm import YTTMTokenizer
from tests.fakes import UnigramConfig
from tests.published.fakes import PRIOR
from tests.text.files import small_model, write_bart, write_char_bpe


def prior(text_length: int = 16, text_vocab: int = 512) -> PublishedPart:
    config = UnigramConfig(text_vocab=text_vocab, text_length=text_length)
    return PublishedPart(PRIOR, config, {}, Path("prior"))


def test_each_familys_files(tmp_path: Path) -> None:
    """A tokenizer that is looked for under one name only, or taken for another family's."""
    with pytest.raises(ValueError, match=r"holds none: expected bpe\.model, vocab\.json and"):
        find_tokenizer(tmp_path)
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
        (file,) = [
            f for f in folder.rglob("*") if f.is_file() and f.suffix != ".txt"
        ]  # the file itself
        assert find_tokenizer(folder) == file
        tokenizer = read_tokenizer(file, prior())
        assert type(tokenizer) is kinds.get(name, BARTTokenizer), name
        assert (tokenizer.text_length, tokenizer.vocab_size) == (16, 512)
        again = read_tokenizer(file, prior(text_length=9))
        assert again.text_length == 9 and again.fingerprint() == tokenizer.fingerprint()
    fast = {n: read_tokenizer(find_tokenizer(folders[n]), prior()) for n in ("fast", "mega")}
    assert fast["fast"].fingerprint() == fast["mega"].fingerprint()


def test_a_config_of_somebody_else_beside_it(tmp_path: Path) -> None:
    """A published tokenizer.json that does not open because its folder's config is not ours."""
    vocab, merges = write_bart(tmp_path)
    model = {"vocab": json.loads(vocab.read_text()), "merges": read_merges(merges)}
    fast = tmp_path / "hub" / "tokenizer.json"
    fast.parent.mkdir()
    fast.write_text(json.dumps({"model": model}))
    (fast.parent / "config.json").write_text('{"model_type": "dallebart", "d_model": 1024}')
    assert find_tokenizer(fast.parent) == fast
    tokenizer = read_tokenizer(fast, prior())
    assert tokenizer.fingerprint() == read_tokenizer(vocab, prior()).fingerprint()


def test_several_tokenizers(tmp_path: Path) -> None:
    """One of two that is taken by chance, such as mini's in the folder of both of min-dalle's."""
    small_model().write(tmp_path / "bpe.model")
    write_bart(tmp_path)
    with pytest.raises(ValueError, match=r"expected one tokenizer, got vocab\.json, bpe\.model"):
        find_tokenizer(tmp_path)


def test_words_that_lie_beside(tmp_path: Path) -> None:
    """Hashtags that are not split although the list is there."""
    write_bart(tmp_path)
    plain = read_tokenizer(find_tokenizer(tmp_path), prior())
    (tmp_path / WORDS).write_text("red 3\ncat 2\n")
    split = read_tokenizer(find_tokenizer(tmp_path), prior())
    assert split.decode(split.encode("#redcat")[0]) == "red cat"
    assert plain.decode(plain.encode("#redcat")[0]) == "redcat"


def test_files_of_something_else(tmp_path: Path) -> None:
    """Another model's vocabulary that gives ids, a pair that has lost one file."""
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"vocab\.json: vocab: expected '<s>' among the tokens"):
        read_tokenizer(find_tokenizer(tmp_path), None)
    write_bart(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"merges\.txt: expected a tokenizer's file, got none"):
        read_tokenizer(tmp_path / "vocab.json", None)
    with pytest.raises(ValueError, match="holds none: expected"):
        find_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="nowhere: expected a tokenizer's file, got none"):
        read_tokenizer(tmp_path / "nowhere", None)

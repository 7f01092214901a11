"""Captions to ids and back."""

from __future__ import annotations

import json
import random
import unicodedata
import warnings
from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch

import dalle1.tokenizer
from dalle1 import Tokenizer
from tests.conftest import CAPTIONS

MANY = [
    "a Red CAT",
    "ÄÖÜ groß",
    "Привет, мир",
    "日本語の猫",
    "مرحبا بالعالم",
    "नमस्ते",
    "🐱 a cat 👩‍👩‍👧‍👦 with family 🇫🇷",
    "two  spaces,\ttabs and\nlines",
    "1 + 1 = 2; (yes!) \"quoted\" 'single' <b> & \\",
    "cafe\u0301",  # a letter and its accent apart
    "\x00 control \x7f",
    "<|endofcaption|>",
    "a <|endofcaption|> in the middle",
    "<|ENDOFCAPTION|>",
]


@pytest.fixture(scope="module")
def wide() -> Tokenizer:
    """The same tokens as the common fixture's, for long captions."""
    return Tokenizer.train(CAPTIONS, vocab_size=280, text_length=200)


def plain(caption: str) -> str:
    return unicodedata.normalize("NFC", caption).lower().strip()


@pytest.mark.parametrize("caption", MANY)
def test_round_trip(wide: Tokenizer, caption: str) -> None:
    """A script that is lost, case that is kept, an end mark that cuts or vanishes from the text."""
    ids = wide.tokens(caption)
    assert 0 not in ids and max(ids) < wide.vocab_size
    assert wide.decode(ids) == plain(caption)
    assert wide.decode(wide.encode(caption)[0]) == plain(caption)  # padding ends the text


@pytest.mark.parametrize("caption", MANY)
def test_dropout_keeps_the_text(wide: Tokenizer, caption: str) -> None:
    """Dropout that loses a byte, or treats the text otherwise than plain encoding does."""
    rng = random.Random(0)
    for _ in range(10):
        ids = wide.tokens(caption, rng)
        assert 0 not in ids and wide.decode(ids) == plain(caption)


def test_lower_case(wide: Tokenizer) -> None:
    """Capitals that get ids of their own (section 2.2: captions are lower-cased)."""
    assert wide.tokens("A RED Cat") == wide.tokens("a red cat") == wide.tokens("  a red cat ")


def test_merges_are_learned(tokenizer: Tokenizer) -> None:
    """A tokenizer of bytes alone, or one that ignores vocab_size."""
    assert tokenizer.vocab_size == 280
    assert sum(len(tokenizer.tokens(c)) for c in CAPTIONS) < sum(map(len, CAPTIONS)) / 2
    assert Tokenizer.train(CAPTIONS, vocab_size=257).vocab_size == 257
    with pytest.raises(ValueError, match=r"at least 257.*got 256"):
        Tokenizer.train(CAPTIONS, vocab_size=256)


def test_padding(tokenizer: Tokenizer) -> None:
    """Padding by 0, by one id for all positions, or counted from the caption's end."""
    ids = tokenizer.tokens("a red cat")
    n = len(ids)
    expected = ids + [280 + p for p in range(n, 10)]
    assert tokenizer.encode("a red cat").tolist() == [expected]
    both = tokenizer.encode(["a red cat", "a dog"])
    assert both.shape == (2, 10) and both.dtype == torch.int64
    assert both[0].tolist() == expected
    assert tokenizer.encode([]).shape == (0, 10)


def test_long_caption(tokenizer: Tokenizer, wide: Tokenizer) -> None:
    """A caption that fills the last position, so that it has no end, or is cut unsaid."""
    caption = "a red cat " * 5
    whole = wide.tokens(caption)
    assert len(whole) > 10
    with pytest.warns(UserWarning, match=f"{len(whole)} tokens and is cut to 9"):
        row = tokenizer.encode(caption)[0].tolist()
    assert row == [*whole[:9], 289]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.encode(caption, random.Random(0))[0, -1] == 289  # training: unsaid
        exact = next(c for c in (("a " * n).strip() for n in range(1, 20))
                     if len(wide.tokens(c)) == 9)  # fmt: skip
        assert tokenizer.encode(exact)[0, -1] == 289  # 9 tokens fit without a warning


def test_resized(tokenizer: Tokenizer) -> None:
    """Another text_length that changes the tokens or the original."""
    longer = tokenizer.resized(20)
    assert longer.encode("a red cat").shape == (1, 20)
    assert tokenizer.text_length == 10 and longer.dropout == tokenizer.dropout
    assert longer.tokens("a red cat") == tokenizer.tokens("a red cat")


def test_dropout_is_only_for_training(wide: Tokenizer) -> None:
    """Dropout without rng, or rng without dropout."""
    caption = "the blue cat on a red mat"
    assert len({tuple(wide.tokens(caption)) for _ in range(30)}) == 1
    rng = random.Random(0)
    assert len({tuple(wide.tokens(caption, rng)) for _ in range(30)}) > 3
    none = Tokenizer.train(CAPTIONS, vocab_size=280, text_length=200, dropout=0.0)
    assert none.tokens(caption, rng) == none.tokens(caption)


def test_dropout_is_deterministic(wide: Tokenizer) -> None:
    """Hidden random state: a resumed run would see other tokens."""
    first, second = random.Random(5), random.Random(5)
    for caption in CAPTIONS * 5:
        assert wide.tokens(caption, first) == wide.tokens(caption, second)
    assert first.getstate() == second.getstate()


def test_dropout_makes_captions_longer(wide: Tokenizer) -> None:
    """A dropout probability that is taken for the keeping probability, or that has no effect."""
    rng = random.Random(0)
    plain_length = sum(len(wide.tokens(c)) for c in CAPTIONS)

    def mean_length(dropout: float) -> float:
        wide_dropout = Tokenizer.train(CAPTIONS, 280, 200, dropout)
        return sum(len(wide_dropout.tokens(c, rng)) for c in CAPTIONS for _ in range(100)) / 100

    lengths = [mean_length(p) for p in (1e-9, 0.1, 0.5, 0.999)]
    assert lengths[0] == plain_length
    assert lengths == sorted(lengths) and lengths[1] > 1.02 * plain_length
    assert lengths[1] < 2 * plain_length  # 10 % drops far fewer than half of the merges
    # Nearly all merges dropped: nearly bytes, each word with the space before it.
    assert lengths[3] == pytest.approx(sum(len(c) + 1 for c in CAPTIONS), rel=0.02)


def test_dropout_of_nothing_is_the_library(wide: Tokenizer) -> None:
    """Merges applied in another order than the library's BPE, e.g. from left to right."""
    never = Tokenizer.train([*CAPTIONS, *MANY], vocab_size=400, text_length=300, dropout=1e-12)
    rng = random.Random(0)
    letters = "abcdemnrt o"
    captions = ["".join(rng.choice(letters) for _ in range(60)) + "x" for _ in range(50)]
    for caption in [*captions, *CAPTIONS, *MANY]:
        assert never.tokens(caption, rng) == never.tokens(caption)


def scanned(tokenizer: Tokenizer, word: str, dropout: float) -> dict[tuple[str, ...], float]:
    """Algorithm 1 of Provilkov et al. as it is written, with every coin: {parts: probability}."""
    merges = json.loads(tokenizer._bpe.to_str())["model"]["merges"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
    found: dict[tuple[str, ...], float] = {}

    def turn(parts: tuple[str, ...], probability: float) -> None:
        places = [i for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        for coins in product((True, False), repeat=len(places)):
            kept = [i for i, keep in zip(places, coins, strict=True) if keep]
            p = probability * (1 - dropout) ** len(kept) * dropout ** (len(places) - len(kept))
            if not kept:
                found[parts] = found.get(parts, 0) + p
                continue
            i = min(kept, key=lambda i: (ranks[parts[i], parts[i + 1]], i))
            turn((*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]), p)

    turn(tuple(word), 1.0)
    return found


@pytest.mark.parametrize("word", ["Ġthe", "Ġaaaa", "Ġred"])
@pytest.mark.parametrize("dropout", [0.1, 0.6])
def test_dropout_draws_what_the_algorithm_enumerates(word: str, dropout: float) -> None:
    """Coins of the best merge alone, merges dropped for good, or a turn that ends too early."""
    base = Tokenizer.train([*CAPTIONS, "aaaa aaa", "the red thread"] * 9, 300, 50, dropout)
    expected = scanned(base, word, dropout)
    assert len(expected) >= 4
    rng, draws, counts = random.Random(0), 20_000, Counter[tuple[str, ...]]()
    for _ in range(draws):
        counts[tuple(map(base._bpe.id_to_token, base.tokens(word[1:], rng)))] += 1
    assert set(counts) <= set(expected)
    for parts, p in expected.items():
        assert counts[parts] / draws == pytest.approx(p, abs=5 * (p * (1 - p) / draws) ** 0.5)


LONG = {  # 1 MB each, about
    "one word": "x" * 1_000_000,
    "letters of three bytes": "猫の絵" * 110_000,
    "letters of four bytes": "🐱🇫🇷" * 80_000,
    "words": "a red cat on a mat " * 52_000,
    "space": "a" + " " * 1_000_000 + "b",
    "accents apart": "e\u0301" * 330_000,
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_more_of_a_caption_is_read_than_its_positions_hold(
    kind: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work that grows with the caption, or with its square, for tokens that are cut off anyway."""
    tokenizer = Tokenizer.train([*CAPTIONS, "猫の絵", "xxxxxxxx"], 300, 40, dropout)
    work = Counter[str]()
    merge, encode = dalle1.tokenizer.merge, tokenizer._bpe.encode

    def counted(ids: list[int], *rules: Any) -> list[int]:
        work["bytes"] += len(ids)
        *rest, uniform = rules

        def coin() -> float:
            work["coins"] += 1
            return uniform()

        return merge(ids, *rest, coin)

    class Encoder:
        def __getattr__(self, name: str) -> object:
            return getattr(original, name)

        def encode(self, text: str, **options: object) -> object:
            work["letters"] += len(text)
            return encode(text, **options)

    original = tokenizer._bpe
    monkeypatch.setattr(dalle1.tokenizer, "merge", counted)
    monkeypatch.setattr(tokenizer, "_bpe", Encoder())
    with pytest.warns(UserWarning, match="more than .* tokens and is cut to 39"):
        tokenizer.tokens(LONG[kind])  # not for training: no random cut, but no more work either
    assert work["letters"] <= 19 * (39 + 16)
    work.clear()
    ids = tokenizer.tokens(LONG[kind], random.Random(0))
    assert len(ids) == 39 or kind == "space"
    assert work["letters"] <= 2 * 400 and work["bytes"] <= 400 and work["coins"] <= 2 * 400


@pytest.mark.parametrize("kind", LONG)
def test_what_is_read_of_a_long_caption_begins_as_it_does_in_full(kind: str) -> None:
    """Tokens of the caption's rest, or a cut that shows in what is kept."""
    tokenizer = Tokenizer.train([*CAPTIONS, "猫の絵", "xxxxxxxx"], 300, 40, 0.0)
    ids = tokenizer.tokens(LONG[kind], random.Random(0))
    full = tokenizer._bpe.encode(LONG[kind].strip(), add_special_tokens=False).ids
    with pytest.warns(UserWarning, match="is cut to 39"):
        assert tokenizer.tokens(LONG[kind]) == full[:39]
    assert ids == full[: len(ids)] and ids


@pytest.mark.parametrize("caption", ["", "  \n", None, 3, b"a cat"])
def test_empty_caption(tokenizer: Tokenizer, caption: object) -> None:
    """An empty caption that becomes all padding, which is guidance's unconditional input."""
    with pytest.raises(ValueError, match="caption: expected text"):
        tokenizer.tokens(caption)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="caption: expected text"):
        tokenizer.encode(["a cat", caption])  # type: ignore[list-item]


def test_encode_for_clip(tokenizer: Tokenizer) -> None:
    """An end that is cut off, or that is not the highest id, where CLIP reads its feature."""
    ids = tokenizer.tokens("a red cat")
    rows = tokenizer.encode_for_clip(["a red cat", "the blue cat"], 12)
    assert rows.dtype == torch.int64 and rows.shape == (2, 12)
    expected = [280, *ids, 281]
    assert rows[0].tolist() == expected + [0] * (12 - len(expected))
    assert int(rows[0].argmax()) == len(ids) + 1
    short = tokenizer.encode_for_clip("a red cat", 4)
    assert short.tolist() == [[280, *ids[:2], 281]]
    assert torch.equal(tokenizer.encode_for_clip("a red cat", 12), rows[:1])


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A setting or a rule that is lost on disk: other ids than in training."""
    original = Tokenizer.train(CAPTIONS, vocab_size=280, text_length=123, dropout=0.25)
    path = tmp_path / "deep" / "tokenizer.json"
    original.save(path)
    again = Tokenizer.load(path)
    assert (again.text_length, again.dropout, again.vocab_size) == (123, 0.25, 280)
    for caption in [*CAPTIONS, *MANY]:
        assert again.tokens(caption) == original.tokens(caption)
        assert again.tokens(caption, random.Random(1)) == original.tokens(caption, random.Random(1))
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]


def test_damaged_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A missing, cut or foreign file that raises anything but a ValueError with its name."""
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match=r"tokenizer\.json: missing"):
        Tokenizer.load(path)
    tokenizer.save(path)
    content = path.read_text()
    bpe = json.loads(content)["bpe"]
    moved = json.loads(content)
    moved["bpe"]["added_tokens"] = []
    moved["bpe"]["model"]["vocab"]["<|endofcaption|>"] = 1
    for broken in ("", content[: len(content) // 2], "{}", "[]", json.dumps(bpe),
                   json.dumps({**json.loads(content), "bpe": {}}), json.dumps(moved),
                   json.dumps({**json.loads(content), "dropout": 2})):  # fmt: skip
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            Tokenizer.load(path)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_errors(dropout: float) -> None:
    """A dropout of 1, which would never end or drop everything."""
    with pytest.raises(ValueError, match="dropout"):
        Tokenizer.train(CAPTIONS, dropout=dropout)

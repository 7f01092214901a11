"""A bpe.model, against a slow re-statement of its encoding."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dalle1.protocols import CaptionCut
from dalle1.text.yttm import YTTMTokenizer

from .files import LETTERS, MARK, BPEModel, random_model, small_model

SPACE = set(" \t\n\v\f\r" + MARK)


def words_of(text: str) -> list[str]:
    """What stands between white space, letter by letter."""
    words = [""]
    for letter in text:
        if letter in SPACE:
            words.append("")
        else:
            words[-1] += letter
    return [word for word in words if word]


def slow_ids(text: str, model: BPEModel) -> list[int]:
    """All words, the first rule that applies anywhere at its leftmost place, again and again."""
    found: list[int] = []
    for word in words_of(text):
        places: list[int] = [model.letters[MARK]]
        for letter in word:
            i = model.letters.get(letter, -1)
            if (i, places[-1]) != (-1, -1):
                places.append(i)
        while True:
            pairs = [
                (number, place)
                for place in range(len(places) - 1)
                for number, (x, y, _) in enumerate(model.rules)
                if places[place : place + 2] == [x, y]
                # of rules for the same pair the package knows the last alone
                and all((x, y) != (p, q) for p, q, _ in model.rules[number + 1 :])
            ]
            if not pairs:
                break
            number, place = min(pairs)
            places[place : place + 2] = [model.rules[number][2]]
        found += [model.marks[0] if i == -1 else i for i in places]
    return found


def slow_law(word: str, model: BPEModel, dropout: float) -> Counter[tuple[int, ...]]:
    """The probability of each way that a word may be cut into tokens, by all coins at once.

    Of a queue in order, entry k is taken if it is kept and the k before it are not; the others
    stay. One that is out of date changes nothing else.
    """
    law: Counter[tuple[int, ...]] = Counter()
    numbers = {(x, y): n for n, (x, y, _) in enumerate(model.rules)}

    def entries(tokens: dict[int, int], firsts: list[int]) -> list[tuple[int, int]]:
        order = sorted(tokens)
        pairs = {p: (tokens[p], tokens[q]) for p, q in pairwise(order)}
        return [(numbers[pairs[p]], p) for p in firsts if pairs.get(p) in numbers]

    def go(tokens: dict[int, int], queue: list[tuple[int, int]], weight: float) -> None:
        queue = sorted(queue)
        law[tuple(tokens[p] for p in sorted(tokens))] += weight * dropout ** len(queue)
        for k, (number, place) in enumerate(queue):
            share = weight * dropout**k * (1 - dropout)
            x, y, made = model.rules[number]
            later = [p for p in sorted(tokens) if p > place]
            rest = queue[:k] + queue[k + 1 :]
            if tokens.get(place) != x or not later or tokens[later[0]] != y:
                go(tokens, rest, share)
                continue
            merged = {p: i for p, i in tokens.items() if p != later[0]} | {place: made}
            before = [p for p in sorted(tokens) if p < place][-1:]
            go(merged, rest + entries(merged, [*before, place]), share)

    start = dict(enumerate([model.letters[MARK], *(model.letters[letter] for letter in word)]))
    go(start, entries(start, list(start)), 1.0)
    return law


def open_model(model: BPEModel, folder: Path, **settings: int | float) -> YTTMTokenizer:
    return YTTMTokenizer.from_published(model.write(folder / "bpe.model"), **settings)  # type: ignore[arg-type]


@pytest.fixture
def small(tmp_path: Path) -> YTTMTokenizer:
    return open_model(small_model(), tmp_path, text_length=8)


def test_known_ids(small: YTTMTokenizer) -> None:
    """Rules in another order, words without their mark, a start, end or padding that is off."""
    mark, a, b, c = (small_model().letters[x] for x in MARK + "abc")
    for caption, ids in (
        ("cat", [33]),
        ("a cat", [mark, a, 33]),
        ("bcat", [mark, b, 32]),
        ("c at", [mark, c, mark, 31]),
        (f"  Cat\n{MARK}CAT\t", [33, 33]),
        ("bжжb", [mark, b, 1, b]),
        ("жцж ж", [mark, 1, mark, 1]),
    ):
        padding = [34 + p for p in range(2 + len(ids), 8)]
        assert small.encode(caption).tolist() == [[2, *ids, 3, *padding]], caption
    assert small.vocab_size == 34


@pytest.mark.parametrize("seed", range(12))
def test_random_models(seed: int, tmp_path: Path) -> None:
    """An entry of the queue that is out of date, a tie that goes to the right, a rule of a pair
    that has two, unknown letters that merge or are counted one by one."""
    rng = random.Random(seed)
    letters = ["ab", "abcde", "абвгд", "日本語の猫"][seed % 4]
    for i in range(6):
        model = random_model(rng, letters, rng.choice([0, 4, 20, 60]))
        tokenizer = open_model(model, tmp_path, text_length=2048)
        for _ in range(6):
            signs = letters * 4 + " \u2581\u00a0Жx🐱\n"
            text = "".join(rng.choice(signs) for _ in range(rng.randrange(1, 40)))
            text = text.lower().strip()
            if not text:
                continue
            ids = slow_ids(text, model)
            row = tokenizer.encode(text)[0].tolist()
            assert row[: len(ids) + 2] == [2, *ids, 3], (i, text)


@pytest.mark.parametrize("word", ["cat", "aab", "abab"])
def test_dropout_has_the_packages_law(word: str, tmp_path: Path) -> None:
    """Coins for merges that apply alone, a merge that is dropped for good, or with another
    probability: each cut of a word comes as often as an enumeration of all coins says."""
    letters = {letter: 4 + i for i, letter in enumerate(MARK + "abct")}
    mark, a, b, c, t = letters.values()
    rules = [(a, b, 20), (20, 20, 21), (a, 20, 22), (mark, a, 23), (b, a, 24), (a, t, 25)]
    model = BPEModel(letters, [*rules, (c, 25, 26), (c, a, 27), (27, t, 28), (mark, 26, 29)])
    tokenizer = open_model(model, tmp_path, vocab_size=64, dropout=0.3)
    law = slow_law(word, model, 0.3)
    assert sum(law.values()) == pytest.approx(1)
    rng, n = random.Random(0), 6000
    seen = Counter(
        tuple(tokenizer._ids(word, 99, rng))  # without the marks around
        for _ in range(n)
    )
    assert seen.keys() <= law.keys() and len(law) > 3
    for cut, share in law.items():
        sigma = (share * (1 - share) / n) ** 0.5
        assert abs(seen[cut] / n - share) < 4.5 * sigma, cut


def test_dropout_only_with_a_generator(small: YTTMTokenizer) -> None:
    """Captions that are read otherwise in use, a share that is not the tokenizer's, or a state
    that is not the generator's."""
    usual = small.encode("a cat").tolist()
    rng = random.Random(3)
    first = [small.with_dropout(0.9).encode("a cat", rng).tolist() for _ in range(20)]
    rng = random.Random(3)
    again = [small.with_dropout(0.9).encode("a cat", rng).tolist() for _ in range(20)]
    assert first == again and usual not in first[:3] and len({str(ids) for ids in first}) > 1
    assert small.with_dropout(0).encode("a cat", rng).tolist() == usual
    assert small.encode("a cat").tolist() == usual and small.dropout == 0.1
    assert {small.decode(ids[0]) for ids in first} == {"a cat"}


def test_all_characters(tmp_path: Path) -> None:
    """White space of another language than C, code points beyond 16 bits, halves of pairs."""
    known = [0x41F, 0x65E5, 0x1F431, 0x10FFFF, 0xA0, 0x85]
    letters = {chr(code): 10 + i for i, code in enumerate(known)} | {MARK: 4}
    tokenizer = open_model(BPEModel(letters, []), tmp_path, text_length=4, vocab_size=16)
    some = [*range(0x3000), *range(0x3000, 0x110000, 997), *known]
    for code in some:
        letter = chr(code)
        if 0xD800 <= code < 0xE000:
            ids = []
        else:
            ids = [] if letter in SPACE else [4, letters.get(letter, 1)]
        assert tokenizer._ids(letter.encode("utf-8", "ignore").decode(), 9, None) == ids, hex(code)
    assert tokenizer.encode("\ud83dП").tolist() == tokenizer.encode("П").tolist()


def test_long_captions_lose_their_end(small: YTTMTokenizer) -> None:
    """A caption that is cut without a word, at another place, or that keeps an end that ruDALL-E's
    would not; a caption of a megabyte that is read to its end."""
    mark, b = small_model().letters[MARK], small_model().letters["b"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = small.encode("bbbbb")
    assert fits.tolist() == [[2, mark, b, b, b, b, b, 3]]
    for caption in ("bbbbbb", "b" * 10**6, "b " * 10**6, "ж" * 10**6 + "b"):
        with pytest.warns(CaptionCut) if caption[0] == "b" else warnings.catch_warnings():
            ids = small.encode(caption)[0].tolist()
        assert len(ids) == 8 and (ids[-1] != 3 or caption[0] == "ж")
    assert small.encode("bbbbbb", random.Random(0))[0, -1] == b  # no news in training


@pytest.mark.parametrize("caption", ["", "  \n", None, 3, b"cat"])
def test_captions_that_are_none(small: YTTMTokenizer, caption: object) -> None:
    """A caption of nothing, which would be drawn as if it were one."""
    with pytest.raises(ValueError, match="caption: expected text, got"):
        small.encode([caption])  # type: ignore[list-item]


def test_a_caption_of_marks_alone(small: YTTMTokenizer) -> None:
    """A crash where there is text but no word."""
    assert small.encode(MARK).tolist() == [[2, 3, *range(36, 42)]]
    assert small.encode([]).shape == (0, 8)


def test_decode(small: YTTMTokenizer) -> None:
    """Marks that stay in the text, padding or what follows the end that is read, unknown ids."""
    for caption in ("a cat", "cat cat", "two bcats"):
        for ids in (small.resized(40).encode(caption)[0], small._ids(caption, 9, None)[:2]):
            assert caption.startswith(small.decode(ids))
        assert small.decode(small.resized(40).encode(caption)[0]) == caption
    assert small.decode([2, 33, 1, 33, 0, 3, 33]) == "cat cat"
    assert small.decode(torch.tensor([33, 40, 33])) == "cat"


def test_ids_of_ruclip(small: YTTMTokenizer) -> None:
    """ruCLIP's captions keep their end where they are cut, and are padded by zeros."""
    mark, b = small_model().letters[MARK], small_model().letters["b"]
    assert small.encode_plain("CAT ", 6).tolist() == [[2, 33, 3, 0, 0, 0]]
    with pytest.warns(CaptionCut):
        assert small.encode_plain(["bbbb"], 5).tolist() == [[2, mark, b, b, 3]]
    assert small.encode_plain(["cat"] * 3).shape == (3, 77)
    # A CLIP that is trained here on the same tokens has the two highest ids as marks.
    assert small.encode_for_clip("cat", 5).tolist() == [[34, 33, 35, 0, 0]]


def test_a_larger_vocabulary(tmp_path: Path) -> None:
    """Paddings that follow the file's tokens, where the prior has more rows (16384 in ruDALL-E)."""
    tokenizer = open_model(small_model(), tmp_path, vocab_size=16384)
    row = tokenizer.encode("cat")[0]
    assert row.tolist() == [2, 33, 3, *(16384 + p for p in range(3, 128))]
    with pytest.raises(ValueError, match=r"bpe\.model: expected ids in \[0, 32\].*vocab_size"):
        open_model(small_model(), tmp_path, vocab_size=33)


def damaged(name: str) -> str:
    """Texts of files that are no bpe.model."""
    text, model = small_model().text(), small_model()
    a = model.letters["a"]
    if name.startswith("rule of"):
        rule = {"rule of later": (40, a, 31), "rule of a mark": (a, 3, 31)}[name]
        return BPEModel(model.letters, [rule]).text()
    if name == "rules that double":
        doubled = [(a, a, 31), *((i, i, i + 1) for i in range(31, 71))]
        return BPEModel(model.letters, doubled).text()
    if name == "no word mark":
        return BPEModel({"a": 4}, []).text()
    if name == "an id twice":
        return BPEModel({MARK: 4, "a": 4}, []).text()
    if name == "an id of a special":
        return BPEModel({MARK: 3, "a": 4}, []).text()
    if name == "a letter twice":
        return f"3 0\n{ord(MARK)} 4\n97 5\n97 6\n1 0 2 3\n"
    if name == "no end":
        return BPEModel(model.letters, [], (1, 0, 2, -1)).text()
    if name == "id 0 is text":
        return BPEModel({MARK: 4, "a": 0}, [], (1, 5, 2, 3)).text()
    if name == "a huge id":
        return BPEModel({MARK: 2**40}, []).text()
    if name == "no code point":
        return f"1 0\n{0x110000} 4\n1 0 2 3\n"
    return {
        "empty": "",
        "two numbers": "1 1",
        "huge counts": text.replace("27 3", "999999999999 999999999999", 1),
        "counts of 5000 digits": text.replace("27 3", "9" * 5000 + " 3", 1),
        "negative counts": text.replace("27 3", "-27 3", 1),
        "counts that make up": text.replace("27 3", "30 1", 1),
        "cut": text[: len(text) // 2],
        "more": text + "7\n",
        "words": "a b c d e f g",
        "underscores": text.replace("27 3", "2_7 3", 1),
        "another script's digits": text.replace("27 3", "२७ 3", 1),
        "points": text.replace("27 3", "27.0 3", 1),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "empty",
        "two numbers",
        "huge counts",
        "counts of 5000 digits",
        "negative counts",
        "counts that make up",
        "cut",
        "more",
        "words",
        "underscores",
        "another script's digits",
        "points",
        "rule of later",
        "rule of a mark",
        "rules that double",
        "no word mark",
        "an id twice",
        "an id of a special",
        "a letter twice",
        "no end",
        "id 0 is text",
        "a huge id",
        "no code point",
    ],
)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    """A file that is taken for a model, memory that is taken on its word, an error without its
    name."""
    path = tmp_path / "bpe.model"
    path.write_text(damaged(name))
    with pytest.raises(ValueError, match=r"bpe\.model: .*expected"):
        YTTMTokenizer.from_published(path)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, a missing file, bytes, or a file of any size, read."""
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    (tmp_path / "large").write_text(small_model().text())
    monkeypatch.setattr("dalle1.text.yttm.MAX_PUBLISHED", 20)
    for name in ("", "missing", "bytes", "large"):
        with pytest.raises(ValueError, match=f"{name}: expected a"):
            YTTMTokenizer.from_published(tmp_path / name)


def test_letters_of_a_model(small: YTTMTokenizer) -> None:
    """Rules that are remembered for a word and not for all places of it."""
    once = [small.encode(word).tolist() for word in ("cat", LETTERS[:5], "cat")]
    assert once[0] == once[2] and small.encode("cat").tolist() == once[0]

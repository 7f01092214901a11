"""DALL-E mini's normalizer, step by step."""

from __future__ import annotations

import random
import sys
from collections import Counter
from itertools import product
from math import inf, log
from pathlib import Path

import pytest

from dalle1.text.normalizer import PEOPLE, Normalizer, in_ascii, is_plain, read_words

from .files import published

WORDS = [
    *["the", "a", "cat", "dog", "red", "art", "digital", "digitalart", "sunset", "sun", "set"],
    *["s", "it", "c", "d", "o", "g", "20", "21", "x", "t", "k", "q", "u", "e"],
]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A Red CAT", " a red cat"),
        ("", " "),
        ("  a \t cat\n", " a cat"),
        # people
        ("<person> and a <PERSON>", " a person and a a person"),
        ("<person>, <person> and <person> sit", " people sit"),
        ("<person><person>", " people"),
        ("<person> with <person>", " a person with a person"),
        # references, HTML, URLs
        ("[1] a cat [23] ", " a cat"),
        ("a [1] cat", " a, 1, cat"),
        ("a <b>cat</b> <", " a cat <"),
        ("see http://a.b/c?d=1 now", " see now"),
        # numbers and words that keep their signs
        ("1,234,567 and 1,23", " 1234567 and 1, 23"),
        ("3.14 and a.b.c", " 3.14 and a.b, c"),
        ("12/31/2021 and a/b", " 12/31/2021 and a, b"),
        ("It's a dog's, they'll, we've, I'm", " it's a dog's, they'll, we've, i'm"),
        ("'quoted' o'clock", ' " quoted " o " clock'),
        # signs
        ("a-b-c - d", " a b, c, d"),
        ("50% off & $5 * 2", " 50 % off & $ 5 * 2"),
        ("a_b\\c #", " a b c"),
        ("a!?.,;:|()[]{}~+=b", " a, b"),
        ("yesss wowwww 10000 ----", " yesss wow 10000"),
        ('"a" ``b``', ' " a " b "'),
        (", , a , ,", " a"),
        ("^@ a", " ^@ a"),
        ("xtok a", " xtok a"),
    ],
)
def test_steps(caption: str, expected: str) -> None:
    """A step that is missing, or comes at another place: commas of numbers that part them, dots
    that become commas before they are kept, quotes that are merged before they are apart."""
    assert is_plain(caption) and Normalizer()(caption) == expected


def test_runs_that_would_take_long() -> None:
    """Patterns that look at every part of a run again: none takes a noticeable time."""
    for run in (" ", '"', ",", ' "', " ,", "<", "[1] ", "<person> ", "a.", "'s", "1,234"):
        text = Normalizer()(f"a {run * (2**16 // len(run))}b")
        assert text.startswith(" a") or text.startswith(" people")


def slow_split(tag: str, words: list[str]) -> float:
    """The least cost of all ways to cut a text."""
    costs = {word: log(i + 1) for i, word in enumerate(words)}
    best = inf
    for cuts in product([False, True], repeat=len(tag) - 1):
        parts, start = [], 0
        for i, cut in enumerate(cuts, 1):
            if cut:
                parts.append(tag[start:i])
                start = i
        best = min(best, sum(costs.get(p, inf) for p in [*parts, tag[start:]]))
    return best


def test_hashtags_become_words() -> None:
    """Greedy words, words by length, digits and short forms that are cut off."""
    split = Normalizer(WORDS)
    for tag in ("redcat", "thedog", "digitalart", "sunsetcat", "acdog", "dogs"):
        parts = split(f"#{tag}").split()
        costs = {word: log(i + 1) for i, word in enumerate(WORDS)}
        assert "".join(parts) == tag
        assert sum(costs[part] for part in parts) == pytest.approx(slow_split(tag, WORDS))
    assert split("the #RedCat") == " the red cat"
    assert split("#art2021 #a_dog") == " art 2021 a dog"
    # As published: what stands for a sign that is kept is cut like words.
    assert split("#it's") == " it x t o k x q u o t e x t o k x s"
    assert split("#qqq") == " q q q"  # no word: letters
    # Without words a hashtag is one.
    assert Normalizer()("#RedCat #a_dog 1#") == " redcat a dog 1"


def test_people_are_drawn_in_training() -> None:
    """A name that is always the same in training, or that changes in use."""
    assert len({Normalizer()("<person>") for _ in range(5)}) == 1
    rng, n = random.Random(0), 4000
    seen = Counter(Normalizer()("<person>", rng).strip() for _ in range(n))
    for name, count in PEOPLE.items():
        share = count / sum(PEOPLE.values())
        assert abs(seen[name] / n - share) < 4 * (share * (1 - share) / n) ** 0.5


def test_plain_captions_need_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """English that needs packages that are not installed; others that are read without them, as
    other tokens; an error that does not say what to install."""
    for name in ("emoji", "ftfy", "unidecode"):
        monkeypatch.setitem(sys.modules, name, None)
    tokenizer = published("bart", tmp_path)
    tokenizer.encode("A photo of a cat, isn't it? #art AT&T & <b>")
    for caption in ("caf\u00e9", "a &amp; b", "&EACUTE;", "\x1b[0m", "🐱"):
        with pytest.raises(
            ValueError, match=r'emoji is not installed.*pip install "dalle1\[mini\]"'
        ):
            tokenizer.encode(caption)


def test_beyond_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages in another order: entities after emoji, emoji that are lost as they are spelled."""
    calls = []

    class Fake:
        def __init__(self, name: str) -> None:
            for function in ("fix_text", "demojize", "unidecode"):
                setattr(self, function, lambda text: calls.append((name, text)) or f"{text}+{name}")

    for name in ("ftfy", "emoji", "unidecode"):
        monkeypatch.setitem(sys.modules, name, Fake(name))
    assert in_ascii("&amp;lt;é") == "<é+ftfy+emoji+unidecode"
    assert [name for name, _ in calls] == ["ftfy", "emoji", "unidecode"]


def test_packages_read_other_languages() -> None:
    """The real packages, where they are installed."""
    for name in ("ftfy", "emoji", "unidecode"):
        pytest.importorskip(name)
    for caption, expected in (
        ("Caf\u00e9 “M\u00fcnchen”", ' cafe " munchen "'),
        ("schÃ¶n", " schon"),
        ("a &amp;amp; b", " a & b"),
        ("a cat 🐱!", " a cat, cat face"),
        ("рыжий котик", " ryzhii kotik"),
    ):
        assert Normalizer()(caption) == expected
    for code in range(32, 127):  # what `PLAIN` lets through is left alone
        text = f"a{chr(code)}b"
        assert in_ascii(text) == text or not is_plain(text)


def test_a_list_of_words(tmp_path: Path) -> None:
    """Counts that are taken for words, a file that is none of its kind."""
    path = tmp_path / "words.txt"
    path.write_text("the 100\ncat 7\n\n")
    assert read_words(path) == ["the", "cat"]
    for content in (b"", b"\n \n", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"words\.txt: expected a"):
            read_words(path)
    with pytest.raises(ValueError, match="nowhere: expected a"):
        read_words(tmp_path / "nowhere")

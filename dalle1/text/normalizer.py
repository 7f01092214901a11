r"""DALL-E mini's normalizer of captions, in its order of steps.

Three packages repair broken Unicode (ftfy), name emoji (emoji) and spell everything in ASCII
(Unidecode). They come with `pip install "dalle1[mini]"`. A caption of printable ASCII without
HTML's names of signs is the same after them, so plain English needs none of them.

The result is lower case, has commas for all punctuation but quotes, % and what is inside of numbers
and words, and begins with a space.
"""

from __future__ import annotations

import html
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from dalle1.common.files import expand_home
from dalle1.text.base import read_bytes

PRINTABLE = re.compile(r"[\t\n\x20-\x7e]*")
ENTITY = re.compile("&#?[0-9A-Za-z]{1,24};")
MOST_REPEATS = 4  # so many of one sign become one; three do not, for numbers such as VIII
# What stands for a sign that is not to become a comma. It is letters, since it goes through steps
# that look for words, and has no two alike, since repeats become one.
KEPT = "xtokx{}xtokx"
TAG_READ = 2**10  # letters of a hashtag; the time to split a longer one would stop training
PERSON = "<person>"  # in captions of Conceptual Captions, in place of names
# And what it becomes, by how often Wikipedia has it.
PEOPLE = {"a person": 282265, "someone": 121194, "somebody": 12219}


class Normalizer:
    """Captions as DALL-E mini's tokenizer gets them."""

    def __init__(self, words: Sequence[str] | None = None) -> None:
        """words: English, frequent first, see `read_words`. Hashtags are split by them; without
        them a hashtag is a word without its sign."""
        self._costs = None if words is None else {w: math.log(i + 1) for i, w in enumerate(words)}
        self._longest = max(map(len, words), default=0) if words is not None else 0

    def __call__(self, caption: str, rng: random.Random | None = None) -> str:
        """A normalized caption.

        Args:
            caption: any text.
            rng: draws what a "<person>" is called; without it, "a person", which is most often.

        Raises:
            ValueError: the caption needs packages that are not installed.
        """
        text = caption if is_plain(caption) else in_ascii(caption)
        text = _name_people(text.lower(), rng)
        text = re.sub(r"\A\s*\[\d+\]", "", text)  # references of Wikipedia
        text = re.sub(r"\[\d+\]\s*\Z", "", text)
        text = re.sub(r"<[^<]+?>", " ", text)  # HTML
        text = re.sub(r"http\S+", "", text)
        for _ in range(2):  # commas between thousands; of 1,234,567 each time the one or the other
            text = re.sub(r"(\d),(\d{3})", r"\1\2", text)
        text = self._split_words(_keep(text))
        text = re.sub(r"[_#\\]", " ", text)
        text = re.sub("['\"`]", ' " ', text)
        text = re.sub(r"[][(){}.,|:;?!=+~/-]", ",", text)
        for name, sign in (("dot", "."), ("quote", "'"), ("slash", "/")):
            text = text.replace(KEPT.format(name), sign)
        text = re.sub(rf"(\D)\1{{{MOST_REPEATS - 1},}}", r"\1", text)
        text = re.sub(r'[\s"]+', _one('"', ' " '), text)
        text = re.sub(r"[\s,]+", _one(",", ", "), text)
        text = re.sub(r"\s+", " ", text).strip()
        text = text.removesuffix(",").removeprefix(",")
        return f" {text.strip()}"

    def _split_words(self, text: str) -> str:
        """Hyphens between words become spaces, signs stand alone, hashtags become words."""
        text = re.sub(r"(\w)-(\w)", r"\1 \2", text)
        text = re.sub(r"([%&/$*])", r" \1 ", text)
        return re.sub(r"#(\w+)", lambda tag: self._split_hashtag(tag[1]), text)

    def _split_hashtag(self, tag: str) -> str:
        parts = [part for part in tag[:TAG_READ].split("_") if part]
        if self._costs is None:
            return " ".join(parts)
        return " ".join(word for part in parts for word in self._cheapest_words(part))

    def _cheapest_words(self, text: str) -> list[str]:
        """A text without spaces as the words whose ranks have the least product.

        Of equal ones that with the shortest last word, and so on. What is no word costs without
        limit, and is then cut into letters.
        """
        assert self._costs is not None
        cost, last = [0.0], [0]  # of the first letters of the text: what they cost, the last word
        for end in range(1, len(text) + 1):
            found = [
                (cost[end - n] + self._costs.get(text[end - n : end].lower(), math.inf), n)
                for n in range(1, min(self._longest, end) + 1)
            ]
            least, length = min(found)
            cost.append(least)
            last.append(length)
        words: list[str] = []  # from the last one on
        end = len(text)
        while end:
            word = text[end - last[end] : end]
            if words and word[-1].isdigit() and words[-1][0].isdigit():
                words[-1] = word + words[-1]  # a number stays one
            else:
                words.append(word)
            end -= last[end]
        return words[::-1]


def is_plain(text: str) -> bool:
    """Whether `in_ascii` would change nothing: printable ASCII without such as "&amp;"."""
    if not PRINTABLE.fullmatch(text):
        return False
    return "&" not in text or (html.unescape(text) == text and not ENTITY.search(text))


def in_ascii(text: str) -> str:
    """A text with repaired Unicode, HTML's names of signs replaced and emoji named, in ASCII.

    Raises ValueError where a package is missing.
    """
    fix, name_emoji, spell = packages(f"caption: expected plain ASCII, got {text[:60]!r}")
    return spell(name_emoji(html.unescape(html.unescape(fix(text)))))


def packages(what: str) -> tuple[Callable[[str], str], ...]:
    """What repairs Unicode, names emoji and spells in ASCII; ValueError, which begins with `what`,
    where one is missing."""
    try:
        import emoji
        import ftfy
        from unidecode import unidecode
    except ImportError as error:
        raise ValueError(
            f"{what}, and {error.name} is not installed, which DALL-E mini reads other signs by; "
            'pip install "dalle1[mini]"'
        ) from error
    return ftfy.fix_text, emoji.demojize, unidecode


def _name_people(text: str, rng: random.Random | None) -> str:
    """Each "<person>", and several that only commas and "and" part, by a word."""
    first, *rest = text.split(PERSON)
    if not rest:
        return text
    pieces, run = [first], 1
    for between in [*rest[:-1], None]:
        if between is not None and re.fullmatch("(and)*", between.strip(" ,\t\n\r\f\v")):
            run += 1
            continue
        if run > 1:
            name = "people"
        elif rng is None:
            name = next(iter(PEOPLE))
        else:
            name = rng.choices(list(PEOPLE), list(PEOPLE.values()))[0]
        pieces += [f" {name} ", rest[-1] if between is None else between]
        run = 1
    return "".join(pieces)


def _keep(text: str) -> str:
    """Dots inside of words and numbers, short forms as in "it's", and dates are to stay."""
    text = re.sub(r"(\w)\.(\w)", rf"\1{KEPT.format('dot')}\2", text)
    text = re.sub(r"'(?=(?:[stdm]|ll|re|ve)\b)", KEPT.format("quote"), text)
    return re.sub(r"(\d)/(\d)", rf"\1{KEPT.format('slash')}\2", text)


def _one(sign: str, instead: str) -> Callable[[re.Match[str]], str]:
    """Replaces a run that holds the sign."""
    return lambda run: instead if sign in run[0] else run[0]


def read_words(path: str | Path) -> list[str]:
    """The words of a file that has one, and its count, a line: frequent first.

    Raises ValueError that names the file where it is missing, too large or no such list.
    """
    path = Path(expand_home(path))
    try:
        lines = read_bytes(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a list of words in UTF-8: {error}") from error
    words = [line.split()[0] for line in lines if line.strip()]
    if not words:
        raise ValueError(f"{path}: expected a word and its count in each line, got no line")
    return words

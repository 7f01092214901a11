"""Scenes in varied everyday English: "a noto emoji of a red apple on a blue background"."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

# How a style is said, in singles and pairs; {it} is the emoji with its article.
SINGLES: tuple[str, ...] = (
    "a {style} emoji of {it}{where}",
    "{style} emoji of {it}{where}",
    "{it}, {style} style{comma_where}",
    "{it} in the style of {style}{where}",
    "{it} as a {style} emoji{where}",
    "a picture of {it}, drawn by {style}{comma_where}",
)
PAIRS: tuple[str, ...] = (
    "{first} {relation} {second}, {style} style{comma_where}",
    "{style} emoji of {first} {relation} {second}{where}",
    "{first} {relation} {second} in the style of {style}{where}",
)
TWICE: tuple[str, ...] = (
    "{it}, {style} style, above the same in {other} style{comma_where}",
    "the same emoji twice: {it}, {style} above and {other} below{comma_where}",
    "{it} by {style} over the same by {other}{comma_where}",
)
RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left of": ("to the left of", "on the left of", "left of"),
    "right of": ("to the right of", "on the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "framed by": ("inside a frame of", "in a frame of", "framed by"),
}
COLORS = {"white", "grey", "black", "blue", "green", "yellow", "pink", "orange", "red", "purple"}
_KEYWORD = re.compile(r"[^\W\d_]{3,}$")  # a word, and no emoticon, number or abbreviation of two
SHARE_WITH_KEYWORD = 0.1  # captions of singles that add one of CLDR's other words
# Names without "a" or "an": more than one thing, stuff that is not counted, states, signs.
_FIRST_WITHOUT = {"two", "three", "four", "people", "men", "women", "children", "no", "input"}
_LAST_WITHOUT = {
    *("money", "water", "ice", "fire", "fog", "rice", "bread", "curry", "tea", "hair", "dna"),
    *("bacon", "broccoli", "butter", "food", "luggage", "soap", "spaghetti", "sushi", "thread"),
    *("wood", "yarn", "badminton", "bowling", "hockey", "lacrosse", "tennis", "pong", "racing"),
    *("breast-feeding", "camping", "cooking", "construction", "dizzy", "foggy", "laughing"),
    *("locked", "unlocked", "star-struck", "zzz", "claus", "fuji", "o'clock", "voltage"),
    *("copyright", "divide", "information", "minus", "multiply", "plus", "registered", "wireless"),
    *("aquarius", "cancer", "capricorn", "gemini", "leo", "libra", "ophiuchus", "sagittarius"),
    *("scorpio", "taurus", "virgo"),
}
_WITHOUT = {
    *("baggage claim", "dashing away", "mobile phone off", "om", "palms up together"),
    *("passport control", "thumbs down", "thumbs up", "tokyo tower", "vibration mode"),
}
_ONLY_ONE = {"kaaba", "milky way", "statue of liberty"}
_SINGULAR_S = re.compile(r"(ss|us|[^k]is|lens|species|cross|rhinoceros)$")
_VOWEL = re.compile(r"[aio](?!ne\b|ne-)|e(?!u|we)|u[pm]|un(?!i)|hour|ng |sos |x-")
_HEAD = re.compile(r" (?:with|of|and|in|on|at|from|holding|for|as|over|savoring|showing|lifting) ")


def with_article(name: str) -> str:
    """A name with "a", "an" or "the" where it is one thing: "an apple", "grapes", "two hearts"."""
    if name.startswith("flag of") or name in _ONLY_ONE:
        return f"the {name}"
    head = _HEAD.split(name)[0].split(",")[0].split()
    first, last = (head[0], head[-1]) if head else (name, name)
    plural = last.endswith("s") and not _SINGULAR_S.search(last)
    without = first in _FIRST_WITHOUT and last != "clover"
    if plural or without or last in _LAST_WITHOUT or last.endswith("-thirty") or name in _WITHOUT:
        return name
    return f"{'an' if _VOWEL.match(name) else 'a'} {name}"


def single(
    rng: np.random.Generator, name: str, style: str, background: str, keywords: Sequence[str]
) -> str:
    """A caption of one emoji; its background is named more often where it is not white."""
    it = with_article(name)
    caption = pick(rng, SINGLES).format(it=it, style=style, **_where(rng, background))
    # A color would be read as that of the background.
    others = [k for k in keywords if k not in name and k not in COLORS and _KEYWORD.match(k)]
    if others and rng.random() < SHARE_WITH_KEYWORD:
        caption += f", {pick(rng, others)}"
    return caption


def pair(
    rng: np.random.Generator, first: str, second: str, relation: str, style: str, background: str
) -> str:
    """A caption of two emoji, the first in a relation to the second."""
    return pick(rng, PAIRS).format(
        first=with_article(first),
        second=f"{second} emoji" if relation == "framed by" else with_article(second),
        relation=pick(rng, RELATION_PHRASES[relation]),
        style=style,
        **_where(rng, background),
    )


def twice(rng: np.random.Generator, name: str, style: str, other: str, background: str) -> str:
    """A caption of one emoji in two styles, the first above the second."""
    it = with_article(name)
    return pick(rng, TWICE).format(it=it, style=style, other=other, **_where(rng, background))


def _where(rng: np.random.Generator, background: str) -> dict[str, str]:
    """The background in words, or nothing."""
    if rng.random() >= (0.3 if background == "white" else 0.85):
        return {"where": "", "comma_where": ""}
    on = pick(rng, (f"on a {background} background", f"on {background}"))
    on = re.sub(r"\ba (?=[aeio])", "an ", on)
    return {"where": f" {on}", "comma_where": f", {on}"}


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of them, each as likely."""
    return options[int(rng.integers(len(options)))]

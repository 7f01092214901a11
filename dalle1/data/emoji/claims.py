"""Reads what a caption of the emoji data set says: the reverse of `captions`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dalle1.data.emoji.captions import PAIRS, RELATION_PHRASES, SINGLES, TWICE, with_article
from dalle1.data.emoji.dataset import Scene
from dalle1.data.emoji.pictures import BACKGROUNDS
from dalle1.data.emoji.sources import STYLES, Emoji


@dataclass(frozen=True)
class Claim:
    """What an image should show.

    Attributes:
        emoji: one or two, in the order of naming; each is the codes that its name may mean.
        styles: one for each emoji; for an emoji in two styles the upper one, then the lower one,
            and `emoji` names it twice.
        relation: of the first to the second, as in `dataset.Scene`.
        background: None where the caption does not say.
    """

    emoji: tuple[frozenset[str], ...]
    styles: tuple[str, ...]
    relation: str | None
    background: str | None

    @staticmethod
    def of(scene: Scene) -> Claim:
        """What a scene shows."""
        named = scene.pieces[:1] if scene.relation is None else scene.pieces[:2]
        return Claim(
            tuple(frozenset({p.code}) for p in named),
            tuple(p.style for p in named),
            scene.relation,
            scene.background,
        )


class CaptionReader:
    """Reads captions about a list of emoji."""

    def __init__(self, emoji: Iterable[Emoji]) -> None:
        self._codes: dict[str, set[str]] = {}  # by name, with its article and without
        self._keywords: dict[str, set[str]] = {}
        for e in emoji:
            for name in {e.name, with_article(e.name)}:
                self._codes.setdefault(name, set()).add(e.code)
                self._keywords.setdefault(name, set()).update(e.keywords)

    def read(self, caption: str) -> Claim:
        """What a caption says; case, spaces and a full stop do not matter.

        Raises:
            ValueError: the caption is not in the language of `captions`, or names an emoji that
                is none of the list.
        """
        words = " ".join(caption.lower().split()).removesuffix(".")
        for claim in self._readings(words):
            return claim
        raise ValueError(
            f"caption: expected the language of the emoji data set (such as 'a noto emoji of "
            f"a red apple on a blue background') and names of its emoji, got {caption!r}"
        )

    def _readings(self, words: str) -> Iterator[Claim]:
        for pattern in _TWICE:
            if (said := pattern.fullmatch(words)) and (codes := self._named(said["it"])):
                yield Claim(
                    (codes, codes), (said["style"], said["other"]), "twice", _background(said)
                )
        for pattern in _PAIRS:
            if said := pattern.fullmatch(words):
                for relation, first, second in _split(said["it"]):
                    if relation == "framed by":
                        second = second.removesuffix(" emoji")
                    one, other = self._named(first), self._named(second)
                    if one and other:
                        styles = (said["style"],) * 2
                        yield Claim((one, other), styles, relation, _background(said))
        for pattern in _SINGLES:
            said = pattern.fullmatch(words)
            if said and (codes := self._named(said["it"], said.groupdict().get("keyword"))):
                yield Claim((codes,), (said["style"],), None, _background(said))

    def _named(self, name: str, keyword: str | None = None) -> frozenset[str]:
        """The codes of a name; none if it is unknown, or the keyword is none of its."""
        if keyword is not None and keyword not in self._keywords.get(name, ()):
            return frozenset()
        return frozenset(self._codes.get(name, ()))


def _background(said: re.Match[str]) -> str | None:
    return said["background"] or said["plain"]


def _split(words: str) -> Iterator[tuple[str, str, str]]:
    """All ways to read words as a relation between two things, the longest phrases first."""
    for phrase in sorted(_RELATION_OF, key=len, reverse=True):
        for found in re.finditer(rf"(?= {phrase} )", words):
            end = found.start() + len(phrase) + 2
            yield _RELATION_OF[phrase], words[: found.start()], words[end:]


def _patterns(templates: Sequence[str]) -> list[re.Pattern[str]]:
    """Templates of `captions` as patterns."""
    styles, backgrounds = "|".join(STYLES), "|".join(BACKGROUNDS)
    where = rf" on (?:an? (?P<background>{backgrounds}) background|(?P<plain>{backgrounds}))"
    values = {
        "it": "(?P<it>.+?)",
        "style": f"(?P<style>{styles})",
        "other": f"(?P<other>{styles})",
        "where": f"(?:{where})?",
        "comma_where": f"(?:,{where})?",
        "keyword": r"(?P<keyword>\w+)",
    }
    plain = (t.replace("{first} {relation} {second}", "{it}") for t in templates)
    return [re.compile(t.format(**values)) for t in plain]


_PAIRS, _TWICE = _patterns(PAIRS), _patterns(TWICE)
# What may be read as part of a name is no keyword.
_SINGLES = _patterns(SINGLES) + _patterns([t + ", {keyword}" for t in SINGLES])
_RELATION_OF = {phrase: name for name, phrases in RELATION_PHRASES.items() for phrase in phrases}

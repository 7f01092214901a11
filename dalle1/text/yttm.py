"""YouTokenToMe's `bpe.model`, which ruDALL-E and ruCLIP read Russian captions by.

The package no longer builds on new Pythons. This is its file format and its encoding, ours from
the description; nothing of the package is used. The file is numbers between white space:

    characters rules        how many of both there are
    code id                 a line a character: its code point and its id
    left right made         a line a rule: two ids that become one; an earlier rule goes first
    unk pad bos eos         ids, -1 where there is none

A caption is words, with a mark (U+2581) in front of each. Neighbors whose pair has a rule become
one, the best rule first, and of equal places the leftmost.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, ValidationError
from torch import Tensor

from dalle1.common.files import expand_home
from dalle1.text.base import (
    MAX_PUBLISHED,
    PublishedTokenizer,
    TokenizerFile,
    check_ids,
    read_bytes,
    told,
)

WORD_MARK = "\u2581"
WORDS = re.compile(f"[^\t-\r {WORD_MARK}]+")  # white space is C's, and the mark itself
GONE, UNKNOWN = -2, -1  # a place whose token went into its left neighbor; what has no id
MOST_LETTERS = 2**26  # of all tokens together; the published have some 100,000
WORDS_KEPT = 2**17  # words whose ids are remembered; captions repeat theirs

Id = Annotated[int, Field(ge=0, lt=2**31)]
Special = Annotated[int, Field(ge=-1, lt=2**31)]


class Marks(NamedTuple):
    """Ids of what is no text, in the file's order; -1 where there is none."""

    unknown: Special
    padding: Special
    start: Special
    end: Special


class YTTMFile(TokenizerFile):
    """A `bpe.model` and how a model uses it."""

    kind: Literal["yttm"] = "yttm"
    characters: list[tuple[Annotated[int, Field(ge=0, le=0x10FFFF)], Id]]
    rules: list[tuple[Id, Id, Id]]
    marks: Marks


class YTTMTokenizer(PublishedTokenizer):
    """Captions as ruDALL-E reads them: lower case, start, tokens, end, a padding a position.

    A caption that is cut loses its end, as in ruDALL-E.
    """

    Content: ClassVar = YTTMFile

    def __init__(self, content: YTTMFile) -> None:
        super().__init__(content)
        marks = content.marks
        if min(marks.unknown, marks.start, marks.end) < 0:
            raise ValueError(f"specials: expected ids of unknown, start and end, got {marks}")
        self.start_id, self.end_id, self._unknown = marks.start, marks.end, marks.unknown
        self._specials = frozenset(i for i in marks if i >= 0)
        self._characters = {chr(code): i for code, i in content.characters}
        if WORD_MARK not in self._characters:
            raise ValueError("characters: expected the mark of words, U+2581, among them")
        self._rules = {(left, right): n for n, (left, right, _) in enumerate(content.rules)}
        self._triples = content.rules
        self._spelled = self._spell(content)
        self._known: dict[str, list[int]] = {}

    def _spell(self, content: YTTMFile) -> dict[int, str]:
        """The text of each token; ValueError where ids collide or rules build on nothing."""
        spelled = {i: chr(code) for code, i in content.characters}
        used = [i for _, i in content.characters] + [made for _, _, made in content.rules]
        check_ids([*used, *self._specials], self.vocab_size, "bpe.model")
        if len(self._characters) < len(content.characters):
            raise ValueError("characters: expected each once, got one twice")
        if 0 not in self._specials:
            # The package takes 0 for a place whose token is gone.
            raise ValueError("specials: expected id 0 among them, got it for text")
        letters = 0
        for number, (left, right, made) in enumerate(content.rules):
            if left not in spelled or right not in spelled:
                raise ValueError(
                    f"rule {number}: expected parts that come before it, got {left} and {right}"
                )
            letters += len(spelled[left]) + len(spelled[right])
            if letters > MOST_LETTERS:  # each rule may double what the one before has made
                raise ValueError(
                    f"rule {number}: expected tokens of {MOST_LETTERS:,} letters together, got more"
                )
            spelled[made] = spelled[left] + spelled[right]
        return spelled

    @classmethod
    def from_published(
        cls,
        path: str | Path,
        text_length: int = 128,
        vocab_size: int | None = None,
        dropout: float = 0.1,
    ) -> YTTMTokenizer:
        """Reads a `bpe.model`.

        Args:
            path: of the file.
            text_length: text positions of the prior; ruDALL-E has 128.
            vocab_size: its text tokens without paddings; None: as many as the file has.
            dropout: share of merges that are skipped in training. ruDALL-E's own is not published.

        Raises:
            ValueError: the file is missing, damaged, or has more tokens than vocab_size.
        """
        path = Path(expand_home(path))
        numbers = _numbers(path)
        characters, rules = numbers[:2]
        first, last = 2 + 2 * characters, 2 + 2 * characters + 3 * rules
        if len(numbers) != last + 4:
            raise ValueError(
                f"{path}: expected {characters} characters, {rules} rules and 4 ids, as the first "
                f"line says, got {len(numbers)} numbers; the file is truncated or no bpe.model"
            )
        marks = Marks(*numbers[last:])
        tokens = characters + rules + sum(i >= 0 for i in marks)
        try:
            return cls(
                YTTMFile(
                    text_length=text_length,
                    vocab_size=tokens if vocab_size is None else vocab_size,
                    dropout=dropout,
                    characters=sorted(zip(numbers[2:first:2], numbers[3:first:2], strict=True)),
                    rules=[
                        (numbers[i], numbers[i + 1], numbers[i + 2]) for i in range(first, last, 3)
                    ],
                    marks=marks,
                )
            )
        except ValidationError as error:
            raise ValueError(f"{path}: {told(error)}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def encode_plain(self, captions: str | Sequence[str], length: int = 77) -> Tensor:
        """Ids as ruCLIP reads them: start, tokens, end, zeros -> int64 [b, length].

        A caption beyond length - 2 tokens is cut before the end, with a `CaptionCut`.
        """
        assert self.start_id is not None
        return self._between((self.start_id, self.end_id), captions, length)

    def _read_as(self, caption: str, rng: random.Random | None) -> str:
        return caption.lower().strip()

    def _ids(self, text: str, most: int, rng: random.Random | None) -> list[int]:
        uniform = rng.random if rng is not None and self.dropout else None
        ids: list[int] = []
        for word in WORDS.findall(text):
            ids += self._word(word) if uniform is None else self._merge(word, uniform)
            if len(ids) > most:
                break
        return ids

    def _word(self, word: str) -> list[int]:
        """The ids of a word, which are remembered."""
        known = self._known.get(word)
        if known is None:
            if len(self._known) >= WORDS_KEPT:
                self._known.clear()
            known = self._known[word] = self._merge(word)
        return known

    def _merge(self, word: str, uniform: Callable[[], float] | None = None) -> list[int]:
        """The ids of a word after all merges, or, with `uniform`, all that are not dropped.

        The package keeps a queue of places where a rule applies, and leaves those that are out of
        date in it until they come up. With dropout each of its entries is skipped with the given
        probability, those that are out of date too, until one is taken; then the skipped ones may
        come up again. This is kept, since it decides how often a merge is dropped.
        """
        ids = [self._characters[WORD_MARK]]
        for letter in word:
            found = self._characters.get(letter, UNKNOWN)
            if found != UNKNOWN or ids[-1] != UNKNOWN:  # a run of unknown letters is one
                ids.append(found)
        rules, triples = self._rules, self._triples
        bits = len(ids).bit_length()
        mask = (1 << bits) - 1
        # An entry is a number, its rule and then its place: of equal rules the leftmost is least.
        queue = [
            rules[pair] << bits | place for place, pair in enumerate(pairwise(ids)) if pair in rules
        ]
        heapify(queue)
        following = [*range(1, len(ids)), GONE]
        previous = [GONE, *range(len(ids) - 1)]
        skipped: list[int] = []
        while queue:
            entry = heappop(queue)
            if uniform is not None:
                if uniform() < self.dropout:
                    skipped.append(entry)
                    continue
                for again in skipped:
                    heappush(queue, again)
                skipped.clear()
            place = entry & mask
            left, right, made = triples[entry >> bits]
            gone = following[place]
            if ids[place] != left or gone == GONE or ids[gone] != right:
                continue  # out of date
            before, after = previous[place], following[gone]
            ids[place], ids[gone] = made, GONE
            following[place] = after
            if after != GONE:
                previous[after] = place
            for i, pair in ((before, (ids[before], made)), (place, (made, ids[after]))):
                if i != GONE and following[i] != GONE and pair in rules:
                    heappush(queue, rules[pair] << bits | i)
        return [self._unknown if i == UNKNOWN else i for i in ids if i != GONE]

    def _text(self, ids: Sequence[int]) -> str:
        """As the package decodes where it ignores the marks: unknown tokens are nothing."""
        pieces = (self._spelled.get(i, "") for i in ids if i not in self._specials)
        spaced = (f" {p[1:]}" if p.startswith(WORD_MARK) else p for p in pieces)
        return "".join(spaced).removeprefix(" ")


def _numbers(path: Path) -> list[int]:
    """The numbers of a file, of which there are at least two that are no counts beyond it."""
    try:
        text = read_bytes(path, MAX_PUBLISHED).decode("ascii")
        words = text.split() if re.fullmatch(r"[-0-9\s]*", text) else []
        numbers = [int(word) for word in words]
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: expected the numbers of a bpe.model: {error}") from error
    if len(numbers) < 6 or min(numbers[:2]) < 0:
        raise ValueError(f"{path}: expected the numbers of a bpe.model, got something else")
    return numbers

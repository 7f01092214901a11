"""What a reader of other people's files gives: parts of ours whose weights are read one at a time.

A reader (one module a family) knows the files as they are published: their names, layouts and
quirks. It says of which kind of ours each part is, with which settings, and how each of its weights
is found. Nothing is read before it is asked for, so that a folder can be written with one tensor in
memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from torch import Tensor

from dvae.storage import Kind

# A weight of ours, made of the file's when it is called; in the file's type.
LazyWeight = Callable[[], Tensor]


@dataclass(frozen=True)
class PublishedPart:
    """A codec, prior or ranker of somebody else's files.

    Attributes:
        kind: of ours that it becomes.
        config: its settings.
        weights: by our names.
        path: the file that they are read from, for messages.
        tokenizer: of a ranker that reads captions by itself, else None; the built part's attribute
            `tokenizer`.
    """

    kind: Kind
    config: BaseModel
    weights: Mapping[str, LazyWeight]
    path: Path
    tokenizer: Any = None


@dataclass(frozen=True)
class PublishedModel:
    """What was found at a source: the parts that its files hold, and what is known of them."""

    tokenizer: Any = None  # a protocols.TextTokenizer
    prior: PublishedPart | None = None
    codec: PublishedPart | None = None
    ranker: PublishedPart | None = None
    notes: tuple[str, ...] = field(default=())  # for the card: versions told by the weights, ...


class SeveralModelsError(ValueError):
    """A folder holds several files each of which may be the one that is meant."""

    def __init__(self, files: Sequence[str]) -> None:
        super().__init__(f"expected one model, got {', '.join(files)}; name the file")
        self.files = files


@dataclass(frozen=True)
class Files:
    """Names of a family's files in a folder, by which they are chosen before they are fetched.

    A name is a pattern, in which `*` stands for letters but not for a folder. Of a group, the first
    pattern counts that any name matches.

    Attributes:
        needed: groups without which a folder is none of the family's: the weights first.
        beside: groups that a folder may lack.
    """

    needed: tuple[tuple[str, ...], ...]
    beside: tuple[tuple[str, ...], ...] = ()

    def choose(self, names: Sequence[str], file: str | None = None) -> list[str] | None:
        """The files that the family's reader opens; None where needed ones are missing.

        Where several names match, those count that have the same letters in the place of `*` as the
        first file: `decoder_mini.pt` goes with `encoder_mini.pt`.

        Args:
            names: of all files in the folder and below.
            file: the one that a user has named; None: the folder's.

        Raises:
            SeveralModelsError: several files may be meant.
        """
        groups = [_matches(patterns, names, file) for patterns in self.needed]
        named = next((group[file] for group in groups if file in group), None) if file else None
        if not all(groups) or (file is not None and named is None):
            return None
        alike = named
        chosen: list[str] = []
        for group in groups:
            found = _alike(group, alike)
            if len(found) > 1:
                raise SeveralModelsError(found)
            alike = group[found[0]] if alike is None else alike
            chosen += found
        for patterns in self.beside:
            chosen += _alike(_matches(patterns, names), alike)
        return list(dict.fromkeys(chosen))


def fits(pattern: str, name: str) -> str | None:
    """The letters in the place of `*`, "" where there is none; None where a name does not fit."""
    match = re.fullmatch(re.escape(pattern).replace(r"\*", "([^/]*)"), name)
    return None if match is None else "".join(match.groups())


def _matches(
    patterns: Sequence[str], names: Sequence[str], file: str | None = None
) -> dict[str, str]:
    """The names that fit, with their letters in the place of `*`; `file` alone where it does."""
    for asked in ([file] if file is not None else [], names):
        for pattern in patterns:
            found = {name: fits(pattern, name) for name in asked}
            if any(letters is not None for letters in found.values()):
                return {name: letters for name, letters in found.items() if letters is not None}
    return {}


def _alike(group: Mapping[str, str], letters: str | None) -> list[str]:
    """The names of a group that have these letters in the place of `*`; all where none has."""
    return [name for name in group if group[name] == letters] or list(group)


@dataclass(frozen=True)
class Family:
    """Models that one reader opens: a line of the table of docs/published.md.

    Attributes:
        name: the KIND of `dalle1 import`.
        title: as its authors call it.
        origin: whose it is, and where its files are published.
        license: of the weights, as their authors state it; "not stated" where they do not.
        recognizes: whether a file or folder looks like the family's, by names and by names of
            tensors; opens nothing large and raises nothing.
        read: the parts of a file or folder; raises ValueError that names what is missing or wrong.
        files: which files `read` opens.
    """

    name: str
    title: str
    origin: str
    license: str
    recognizes: Callable[[Path], bool]
    read: Callable[[Path], PublishedModel]
    files: Files

"""What a reader of other people's files gives: parts of ours whose weights are read one at a time.

A reader (one module a family) knows the files as they are published: their names, layouts and
quirks. It says of which kind of ours each part is, with which settings, and how each of its weights
is found. Nothing is read before it is asked for, so that a folder can be written with one tensor in
memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """

    name: str
    title: str
    origin: str
    license: str
    recognizes: Callable[[Path], bool]
    read: Callable[[Path], PublishedModel]

"""The kinds of tokenizer, codec, prior and ranker by the "kind" in a model folder's config.json.

This is the only place that a new kind is added to: an entry here, or `register` from a package of
one's own. Such a package may name a module that registers its kinds as an entry point of the group
`dalle1.kinds`; it is then imported when a folder asks for a kind that is not known.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import dalle1.clip.model
import dalle1.transformer.model
from dalle1.tokenizer import Tokenizer
from dvae.codec import CODECS
from dvae.storage import Kind, load_part, read_config

ENTRY_POINTS = "dalle1.kinds"
PRIORS: dict[str, Kind] = {kind.name: kind for kind in (dalle1.transformer.model.KIND,)}
RANKERS: dict[str, Kind] = {kind.name: kind for kind in (dalle1.clip.model.KIND,)}
KINDS = {"codec": CODECS, "prior": PRIORS, "ranker": RANKERS}
# Classes with `save(path)` and `load(path)`: a tokenizer is one file.
TOKENIZERS: dict[str, Any] = {"bpe": Tokenizer}


def register(kind: Kind) -> None:
    """Makes a kind of codec, prior or ranker known to `dalle1.load` and `Model.save`.

    Raises ValueError for a role that there is not, or a name that is taken by another class.
    """
    if kind.role not in KINDS:
        raise ValueError(f"role: expected one of {', '.join(KINDS)}, got {kind.role!r}")
    held = KINDS[kind.role].get(kind.name)
    if held is not None and held.module is not kind.module:
        raise ValueError(f"{kind.role}.kind: {kind.name!r} is {held.module.__name__} already")
    KINDS[kind.role][kind.name] = kind


def register_tokenizer(name: str, tokenizer: Any) -> None:
    """The same for a class of tokenizers, which has `save(path)` and `load(path)`."""
    if TOKENIZERS.get(name, tokenizer) is not tokenizer:
        raise ValueError(f"tokenizer.kind: {name!r} is {TOKENIZERS[name].__name__} already")
    TOKENIZERS[name] = tokenizer


def kind_of(role: str, part: object) -> Kind:
    """The kind that a part is of; ValueError where its class is not registered."""
    for kind in KINDS[role].values():
        if type(part) is kind.module:
            return kind
    raise ValueError(
        f"{role}: {type(part).__name__} is no registered kind, so a folder could not be opened "
        "again; see dalle1.registry.register"
    )


def tokenizer_kind(tokenizer: object) -> str:
    """The kind of a tokenizer; ValueError where its class is not registered."""
    for name, known in TOKENIZERS.items():
        if type(tokenizer) is known:
            return name
    raise ValueError(
        f"tokenizer: {type(tokenizer).__name__} is no registered kind, so a folder could not be "
        "opened again; see dalle1.registry.register_tokenizer"
    )


def find_kind(role: str, name: str, where: str | Path) -> Kind:
    """The kind of a role and a name; where: it is named, for the message of the ValueError."""
    if name not in KINDS[role]:
        _import_entry_points()
    if name not in KINDS[role]:
        known = ", ".join(KINDS[role])
        raise ValueError(f"{where}: {role}.kind: expected one of {known}, got {name!r}")
    return KINDS[role][name]


def load(role: str, folder: str | Path) -> Any:
    """A codec, prior or ranker of a model folder, in eval mode; ValueError as `load_part`."""
    section = read_config(folder).get(role) or {}
    if section.get("kind") not in KINDS[role]:
        _import_entry_points()
    return load_part(role, KINDS[role], folder)


def load_tokenizer(path: str | Path, kind: str = "bpe") -> Any:
    """A tokenizer's file; ValueError where the kind is not known or the file is not of it."""
    if kind not in TOKENIZERS:
        _import_entry_points()
    if kind not in TOKENIZERS:
        known = ", ".join(TOKENIZERS)
        raise ValueError(f"{path}: tokenizer.kind: expected one of {known}, got {kind!r}")
    return TOKENIZERS[kind].load(path)


def open_tokenizer_file(path: Path) -> Any:
    """The tokenizer of a file of any kind; ValueError where it is of none."""
    reasons = []
    for name, kind in TOKENIZERS.items():
        try:
            return kind.load(path)
        except ValueError as error:
            reasons.append(f"{name}: {error}")
    raise ValueError(f"{path}: a tokenizer of no kind that is known ({'; '.join(reasons)})")


def _import_entry_points() -> None:
    """Imports what installed packages offer; each module registers its kinds."""
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()

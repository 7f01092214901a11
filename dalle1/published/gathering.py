"""The parts of a model from one source or several: other people's files, and folders of ours."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dalle1 import registry
from dalle1.common.origins import Origin, read_origins
from dalle1.hub.access import HubAccess
from dalle1.published.fetching import fetch_part_source, fetch_source
from dalle1.published.parts import Family, PublishedModel, PublishedPart
from dalle1.published.sources import opened
from dalle1.published.table import find_family
from dalle1.published.tokenizers import find_tokenizer, read_tokenizer
from dalle1.tokenizer import TOKENIZER
from dvae.storage import CONFIG, read_config, read_shape, read_weights

ROLES = ("prior", "codec", "ranker")
# What an option stands for that gives what the files lack.
REMEDIES = {
    "codec": "--codec: a folder of ours, or the codec's files as they are published",
    "tokenizer": "--tokenizer: its file as it is published, or a folder of ours",
}


@dataclass
class Gathered:
    """What becomes one model, or one part of one.

    Attributes:
        family: name of the family that the first source is of.
        tokenizer: of the prior; None where there is none.
        parts: by role.
        origins: of the parts that others have trained, by role.
    """

    family: str
    tokenizer: Any = None
    parts: dict[str, PublishedPart] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)

    def take(self, role: str, part: PublishedPart, origin: Origin | None) -> None:
        """Puts a part in the place of what is there."""
        self.parts[role] = part
        self.origins.pop(role, None)
        if origin is not None:
            self.origins[role] = origin


def gather(
    stack: ExitStack,
    source: str | Path,
    kind: str | None,
    others: Mapping[str, str | Path],
    work: Path | None,
    access: HubAccess,
) -> Gathered:
    """The parts that a source holds, and those that are given in their place.

    Args:
        stack: keeps what is unpacked for as long as weights are read.
        source, kind, work: see `sources.opened` and `table.find_family`.
        access: to the Hub.
        others: sources of a codec, a tokenizer or a ranker, by role.

    Raises:
        ValueError: a source is none, or does not hold what it is given for.
    """
    fetch = None if access.offline else partial(fetch_source, kind, access)
    path = stack.enter_context(opened(source, work, fetch))
    family = find_family(path, kind)
    found = _read(family, path)
    result = Gathered(family.name, found.tokenizer)
    for role in ROLES:
        part = getattr(found, role)
        if part is not None:
            result.take(role, part, _origin(family, found))
    for role, other in others.items():
        fetch = None if access.offline else partial(fetch_part_source, role, access)
        path = stack.enter_context(opened(other, work, fetch, f"--{role}"))
        if role == "tokenizer":
            result.tokenizer = _tokenizer(path, result.parts.get("prior"))
        else:
            result.take(role, *_one_part(role, path))
    return result


def check_complete(source: str | Path, parts: Mapping[str, Any]) -> None:
    """Raises ValueError where a prior lacks its codec or its tokenizer."""
    for name, remedy in REMEDIES.items():
        if parts.get(name) is None:
            raise ValueError(
                f"{name}: the files of {source} hold a prior and no {name}; give {remedy}"
            )


def _read(family: Family, path: Path) -> PublishedModel:
    found = family.read(path)
    if not any(getattr(found, role) for role in (*ROLES, "tokenizer")):
        raise ValueError(f"{path}: holds no part of a model of the family {family.name!r}")
    return found


def _origin(family: Family, found: PublishedModel) -> Origin:
    return Origin(family.title, family.origin, family.license, found.notes)


def _one_part(role: str, path: Path) -> tuple[PublishedPart, Origin | None]:
    """The codec or the ranker of a folder of ours, or of somebody else's files."""
    if (path / CONFIG).is_file() and "kind" in (_section(path, role) or {}):
        return _own_part(role, path), read_origins(path).get(role)
    family = find_family(path)
    found = _read(family, path)
    part = getattr(found, role)
    if part is None:
        raise ValueError(f"--{role}: {path} is of the family {family.name!r} and holds no {role}")
    return part, _origin(family, found)


def _section(folder: Path, role: str) -> dict[str, Any] | None:
    try:
        section: dict[str, Any] | None = read_config(folder).get(role)
    except ValueError:  # somebody else's config.json
        return None
    return section


def _own_part(role: str, folder: Path) -> PublishedPart:
    """A part of a model folder, as if it were published."""
    section = dict(_section(folder, role) or {})
    kind = registry.find_kind(role, section.pop("kind"), folder)
    config = read_shape(kind, section, folder)
    held = {} if kind.weights is None else read_weights(kind, config, folder)
    weights = {name: (lambda weight=weight: weight) for name, weight in held.items()}
    tokenizer = None
    if kind.assets:
        with torch.device("meta"):
            frame = kind.module(config)
        frame.load_assets(folder)
        tokenizer = getattr(frame, "tokenizer", None)
    return PublishedPart(kind, config, weights, folder / (kind.weights or CONFIG), tokenizer)


def _tokenizer(path: Path, prior: PublishedPart | None) -> Any:
    """The tokenizer of a file, of a folder of ours, or of somebody else's files."""
    if path.is_dir() and _section(path, "tokenizer"):
        return registry.load_tokenizer(path / TOKENIZER)
    return read_tokenizer(find_tokenizer(path) if path.is_dir() else path, prior)

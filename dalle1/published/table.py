"""The families of other people's models, by the KIND of `dalle1 import`.

A family is a line of `READERS` and a module of this package. Modules are imported when somebody
asks for the table, not before.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from dalle1.published.parts import Family
from dvae.storage import read_config

READERS = ("dvae", "vqgan", "rudalle", "mindalle", "dalle_mini", "min_dalle", "clip", "ruclip")


def families() -> dict[str, Family]:
    """All families by their names."""
    found: dict[str, Family] = {}
    for reader in READERS:
        module = import_module(f"dalle1.published.{reader}")
        several = getattr(module, "FAMILIES", None) or (module.FAMILY,)
        found.update({family.name: family for family in several})
    return found


def find_family(path: Path, kind: str | None = None) -> Family:
    """The family of a file or folder: the one called `kind`, or the one that recognizes it.

    Raises ValueError where there is no such family, or none or several recognize it.
    """
    known = families()
    if kind is not None:
        if kind not in known:
            raise ValueError(f"KIND: expected one of {', '.join(known)}, got {kind!r}")
        return known[kind]
    matches = [family for family in known.values() if family.recognizes(path)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = " or ".join(family.name for family in matches)
        raise ValueError(f"KIND: {path} may be of several families; say which: {names}")
    if is_ours(path):
        raise refused_as_ours(path)
    lines = ", ".join(f"{family.name} ({family.title})" for family in known.values())
    raise ValueError(
        f"KIND: {path} looks like none of the families: {lines}; check that all files of a model "
        "are there, or say which family it is"
    )


def refused_as_ours(source: object) -> ValueError:
    """The error of an import of what needs none."""
    return ValueError(
        f"SOURCE: expected somebody else's files, got {source}, a folder of ours; dalle1.load "
        "opens it as it is"
    )


def is_ours(path: Path) -> bool:
    """Whether a folder is one that is opened without an import."""
    try:
        sections = read_config(path)
    except ValueError:
        return False
    return any("kind" in sections.get(role, {}) for role in ("prior", "codec", "ranker"))

"""The files of settings that come with the library, found by names such as shapes/dvae.

In a checkout they lie in configs/ at the top; in an installation they lie beside this file. Each
opens with a comment: what the file is for, a command, what it costs, what to expect.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

SUFFIX = ".yaml"
MAX_NEAR = 5  # names that an error suggests
EXTENDS = re.compile(r"^extends:\s*(\S+)\s*$", re.M)  # as our own files write it
SECTIONS = re.compile(r"\b(?=(?:Cost|Expected)\b[^:.]*:)")


@dataclass(frozen=True)
class Header:
    """What the comment at the top of a file says, each in one line."""

    purpose: str
    commands: tuple[str, ...]
    cost: str
    expected: str


def folder() -> Path:
    """Where the files lie: beside this one, or else in a checkout's configs/."""
    here = Path(__file__).parent
    return here if any(here.glob("*/*" + SUFFIX)) else here.parents[1] / "configs"


def names() -> list[str]:
    """The names of all files, such as shapes/dvae, in alphabetical order."""
    found = folder().rglob("*" + SUFFIX)
    return sorted(path.relative_to(folder()).with_suffix("").as_posix() for path in found)


def find(config: str | Path, beside: Path | None = None) -> Path:
    """The file that a path or a name stands for. A path that exists wins over a name.

    Args:
        config: a path, or a name that `names` lists, with or without .yaml.
        beside: the folder that a relative path starts from, in place of the working directory.

    Raises:
        ValueError: there is neither; names that are near are named.
    """
    path = (beside or Path()) / config
    is_folder = os.path.isdir(path)
    if os.path.exists(path) and not is_folder:  # pipes and devices too
        return path
    name = str(config).removesuffix(SUFFIX)
    if name in names():
        return _path(name)
    near = _near(name)
    remedy = f"did you mean {' or '.join(near)}?" if near else "`dalle1 configs` lists the names"
    what = "which is a folder" if is_folder else "and there is no such file"
    raise ValueError(
        f"config: expected a file, or a name that `dalle1 configs` lists, got {str(config)!r}, "
        f"{what}; {remedy}"
    )


def read(name: str) -> str:
    """The text of a file by its name, to be saved anywhere: `extends` is a name in it."""
    path = _path(name)

    def as_name(found: re.Match[str]) -> str:
        parent = find(found[1], path.parent).resolve().relative_to(folder().resolve())
        return f"extends: {parent.with_suffix('').as_posix()}"

    return EXTENDS.sub(as_name, path.read_text(encoding="utf-8"))


def header(name: str) -> Header:
    """The comment at the top of a file, taken apart.

    An indented line is a command; one that is indented further, or that follows a backslash, is
    the rest of the command above it. What is said of cost and expectation starts with these words.
    """
    prose: list[str] = []
    commands: list[str] = []
    for line in _path(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line[1:].strip()
        if not line.startswith("#   "):
            prose.append(text)
        elif line.startswith("#     ") and commands:
            commands[-1] = f"{commands[-1].removesuffix(chr(92)).rstrip()} {text}"
        else:
            commands.append(text)
    purpose, *rest = (part.strip() for part in SECTIONS.split(" ".join(prose)))
    told = {part.split()[0].rstrip(":,"): part for part in rest}
    return Header(purpose, tuple(commands), told.get("Cost", ""), told.get("Expected", ""))


def _path(name: str) -> Path:
    return folder() / (name + SUFFIX)


def _near(name: str) -> list[str]:
    """Names that are written nearly so, or whose last part is."""
    known = names()
    last = name.rpartition("/")[2]
    found = difflib.get_close_matches(name, known, MAX_NEAR)
    found += [k for k in known if k.rpartition("/")[2] == last]
    return list(dict.fromkeys(found))[:MAX_NEAR]

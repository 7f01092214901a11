"""The trained models that come with the library: model folders beside this file, by their names.

`dalle1.load("emoji")` and `--model emoji` open one. Where no model is named, `dalle1.sample` and
`dalle1.rank` take DEFAULT.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

DEFAULT = "emoji"
CONFIG, CARD = "config.json", "README.md"  # of a model folder


def folder() -> Path:
    """Where the models lie."""
    return Path(__file__).parent


def names() -> list[str]:
    """The names of the models that this installation has, in alphabetical order."""
    return sorted(path.parent.name for path in folder().glob(f"*/{CONFIG}"))


def find(model: str | Path) -> Path:
    """The folder that a path or a name stands for. A path to a model wins over a name.

    What is neither is handed back as the path that it is.
    """
    path = Path(model)
    is_name = str(model) in names() and not (path / CONFIG).exists()
    return folder() / model if is_name else path


def default() -> Path:
    """The folder of DEFAULT. A line on stderr says what it is, as nobody has asked for it.

    Raises ValueError where this installation does not have it.
    """
    if DEFAULT not in names():
        raise ValueError(
            "model: expected a Model, its folder, or DALLE1_MODEL set to a folder, got none, and "
            f"this installation has no model {DEFAULT!r}"
        )
    print(f"model: {DEFAULT}, which comes with dalle1. {about(DEFAULT)}", file=sys.stderr)
    return folder() / DEFAULT


def about(name: str) -> str:
    """What a model is, in one sentence: the first of its card that is no heading."""
    text = (folder() / name / CARD).read_text(encoding="utf-8")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # metadata in front
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    first = next((p for p in paragraphs if p and not p.startswith(("#", "!", "|", "`"))), "")
    return re.split(r"(?<=[.!?]) ", first)[0]

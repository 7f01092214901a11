"""Packages that only some functions need, which `pip install 'dalle1[EXTRA]'` brings along."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_extra(package: str, extra: str, role: str) -> Any:
    """Imports a package of an extra, where it is used and not before.

    Args:
        package: its name as a module.
        extra: of pyproject.toml.
        role: what needs it, for the message.

    Raises:
        ValueError: in one line, that it is not installed and how to install it; or why it, or what
            it needs, cannot be imported.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        name = error.name or package
        needs = "" if name.split(".")[0] == package else f", which {package} needs,"
        missing = package if not needs else name
        raise ValueError(
            f"{role}: {missing}{needs} is not installed; pip install 'dalle1[{extra}]'"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:  # of another release, or another torch
        why = " ".join(str(error).split())
        raise ValueError(f"{role}: {package} cannot be imported: {why}") from error


def one_line(error: BaseException, most: int = 300) -> str:
    """What another package's error says, in one line of so many letters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + " ..."

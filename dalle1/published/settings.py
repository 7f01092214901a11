"""Files of settings that lie beside published weights: JSON and YAML.

They are a few kilobytes of plain values. What is far longer is not read, and what unfolds to more
than it is long is refused, so that no file takes more memory than it has bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dalle1.common.files import read_text

LARGEST = 2**20  # bytes


class _Loader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them can stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("expected plain values, got an alias (*NAME); write it out")
        return super().compose_node(parent, index)


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file; ValueError that names the file where there is none."""
    content = _read(path, json.loads, "JSON")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file; ValueError that names the file where it is none."""
    return _read(path, lambda text: yaml.load(text, _Loader), "YAML")


def _read(path: Path, parse: Callable[[str], Any], what: str) -> Any:
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise ValueError(f"expected settings of at most {LARGEST:,} bytes, got {size:,}")
        return parse(read_text(path))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"{path}: truncated or no {what}: {line}") from error


def mistake(error: ValidationError) -> str:
    """The first of pydantic's mistakes, in a line, with the setting's name."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    text = first["msg"].removeprefix("Value error, ")
    return f"{name}: {text}" if name else text

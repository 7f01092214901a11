"""Files of settings beside weights, and those that would take all memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dalle1.published.settings import LARGEST, read_json, read_yaml


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_plain_values(read: Callable[[Path], Any], tmp_path: Path) -> None:
    """A mark in front of a file, as some editors put it there, that is an error."""
    path = tmp_path / "config"
    path.write_text('\ufeff{"a": [1, {"b": "ü"}]}', encoding="utf-8")
    assert read(path) == {"a": [1, {"b": "ü"}]}


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_json, "{", "truncated or no JSON"),
        (read_json, "[" * 100_000, "truncated or no JSON"),
        (read_json, "[1]", "expected an object, got list"),
        (read_json, '{"a": "' + "x" * LARGEST + '"}', "at most 1,048,576 bytes, got"),
        (read_yaml, "a: " + "x" * LARGEST, "at most 1,048,576 bytes, got"),
        (read_yaml, "a: &a {b: 1}\nc: {<<: *a}", "expected plain values, got an alias"),
        (read_yaml, "a: &a [*a]", "expected plain values, got an alias"),
    ],
)
def test_what_is_not_read(
    read: Callable[[Path], Any], text: str, message: str, tmp_path: Path
) -> None:
    """A file of any length that is read, or one of a few lines that unfold to more than memory."""
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"config: .*{message}"):
        read(path)


def test_missing(tmp_path: Path) -> None:
    """A traceback for a file that is not there."""
    for read in (read_json, read_yaml):
        with pytest.raises(ValueError, match="nothing: No such file"):
            read(tmp_path / "nothing")

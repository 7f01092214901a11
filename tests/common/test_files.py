"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from dalle1.common.files import replacing, write_text


def test_a_failure_leaves_the_former_file(tmp_path: Path) -> None:
    """Half a file in the place of a whole one."""
    path = tmp_path / "a.json"
    write_text(path, "first: é")
    assert path.read_text(encoding="utf-8") == "first: é"
    with pytest.raises(OSError), replacing(path) as beside:
        beside.write_text("sec")
        raise OSError("no space left on device")
    assert path.read_text(encoding="utf-8") == "first: é" and list(tmp_path.iterdir()) == [path]
    write_text(path, "second")
    assert path.read_text() == "second" and list(tmp_path.iterdir()) == [path]

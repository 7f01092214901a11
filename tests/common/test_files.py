"""Files that are complete or not there; files in tars."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from dalle1.common.files import add_file, replacing, write_text


def test_a_failure_leaves_the_former_file(tmp_path: Path) -> None:
    """Half a file in the place of a complete one."""
    path = tmp_path / "a.json"
    write_text(path, "first: é")
    assert path.read_text(encoding="utf-8") == "first: é"
    with pytest.raises(OSError), replacing(path) as temporary:
        temporary.write_text("sec")
        raise OSError("no space left on device")
    assert path.read_text(encoding="utf-8") == "first: é" and list(tmp_path.iterdir()) == [path]
    write_text(path, "second")
    assert path.read_text() == "second" and list(tmp_path.iterdir()) == [path]


def test_tars_of_the_same_content_are_the_same_bytes() -> None:
    """The time or the owner of a file in a tar, which differ on each machine."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        add_file(tar, "a.txt", b"one")
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        (member,) = tar.getmembers()
        assert (member.name, member.size, member.mtime, member.uid) == ("a.txt", 3, 0, 0)
        assert tar.extractfile(member).read() == b"one"  # type: ignore[union-attr]

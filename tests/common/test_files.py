"""Files that are complete or not there; files in tars."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from dalle1.common.files import (
    add_file,
    check_writable,
    expand_home,
    make_folder,
    read_text,
    replacing,
    write_text,
)


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


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that a crash leaves empty, since its name came to the disk first, or that is not there
    at all, since the folder was never flushed."""
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def flushed(number: int) -> None:
        done.append(("flushed", os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def renamed(source: Path, target: Path) -> None:
        done.append(("renamed", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    for name in ("a.json", "b.safetensors"):
        path = tmp_path / name
        done.clear()
        with replacing(path) as temporary:
            temporary.write_bytes(b"content")
        flushes = [("flushed", f"{path}.tmp"), ("renamed", str(path)), ("flushed", str(tmp_path))]
        assert done == flushes
    done.clear()
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert sorted(done) == [("flushed", str(tmp_path)), ("flushed", str(tmp_path / "a"))]


def test_a_file_system_that_cannot_flush_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is there and counts as not written, on a share that knows no fsync of folders."""
    real = os.fsync

    def fsync(number: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(22, "Invalid argument")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "a.json", "content")
    assert read_text(tmp_path / "a.json") == "content"


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


def test_text_is_read_as_utf8_without_the_mark_of_an_editor(tmp_path: Path) -> None:
    """U+FEFF in front of the first caption; the locale's encoding instead of UTF-8."""
    for head in ("", "\ufeff"):
        (tmp_path / "a.txt").write_text(head + "a red ü\n", encoding="utf-8")
        assert read_text(tmp_path / "a.txt") == "a red ü\n"
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "a.txt")


def test_a_tilde_in_front_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder called `~`, or a `~` in the middle of a name expanded."""
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expand_home("~/out/{0..3}.tar") == "/home/somebody/out/{0..3}.tar"
    assert expand_home("~") == "/home/somebody"
    for path in ("out/~/a", "out", "pipe:cat ~/a.tar", "", "a~"):
        assert expand_home(path) == path


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    """A traceback after hours of work; folders that the attempt leaves behind."""
    file = tmp_path / "file"
    file.write_text("kept")
    for place in (file, file / "below", Path("/proc/x"), Path("/sys/x/y"), tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match=r"^out: expected a folder that can be written, got"):
            check_writable(place, "out")
    check_writable(tmp_path / "a/b", "out")
    check_writable(tmp_path, "out")
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "kept"

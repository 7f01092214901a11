"""Checkpoints: what counts, what is kept, what is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle1.training import checkpoints


def tensors(step: int) -> dict[str, Tensor]:
    return {
        "weights/a": torch.full((3,), float(step)),
        "moments/a/exp_avg": torch.full((2, 2), float(-step)),
        "scalar": torch.tensor(float(step)),
    }


def save(folder: Path, step: int, keep: int = 2, keep_every: int | None = None) -> Path | None:
    return checkpoints.save(folder, tensors(step), {"step": step}, keep, keep_every)


def test_round_trip(tmp_path: Path) -> None:
    """Values or names lost between save and load."""
    path = save(tmp_path, 7)
    assert path is not None
    again = checkpoints.load(path)
    assert again.state["step"] == 7 and again.state["ranks"] == 1
    assert set(again.tensors) == set(tensors(7))
    assert torch.equal(again.tensors.under("moments/")["a/exp_avg"], torch.full((2, 2), -7.0))
    assert set(again.tensors.under("weights/")) == {"a"}


def test_keeps_the_newest(tmp_path: Path) -> None:
    """A disk that fills up, or the newest removed instead of the oldest."""
    for step in (5, 20, 100):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000020", "step-0000100"]


def test_keeps_every_so_manieth(tmp_path: Path) -> None:
    """Milestones that are removed with the rest; order by name once a run is ten million long."""
    for step in (10, 15, 20, 25, 10_000_000):
        save(tmp_path, step, keep=1, keep_every=20)
    assert {p.name for p in tmp_path.iterdir()} == {"step-0000020", "step-10000000"}
    newest = checkpoints.newest(tmp_path)
    assert newest is not None and newest.name == "step-10000000"


def test_half_written_folders_do_not_count(tmp_path: Path) -> None:
    """Resuming from a checkpoint that a crash cut short."""
    save(tmp_path, 5)
    (tmp_path / "step-0000010.tmp").mkdir()
    (tmp_path / "step-0000010.tmp" / "state.json").write_text("{}")
    (tmp_path / "step-0000011").mkdir()
    newest = checkpoints.newest(tmp_path)
    assert newest is not None and newest.name == "step-0000005"


def damage(path: Path) -> None:
    file = next(path.glob("rank-*"))
    file.write_bytes(file.read_bytes()[:40])


def test_damaged_file_is_named(tmp_path: Path) -> None:
    """A truncated file that loads as something else; a lost one that nobody misses; a refusal that
    does not say what to do."""
    path = save(tmp_path, 5)
    assert path is not None
    damage(path)
    with pytest.raises(ValueError, match="step-0000005"):
        checkpoints.load(path)
    next(path.glob("rank-*")).unlink()
    with pytest.raises(ValueError, match=r"^run: .*rank-00000-of-00001\.safetensors; put a copy"):
        checkpoints.newest(tmp_path)


def test_resumes_from_the_newest_undamaged_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that starts again from nothing, or not at all, since its last checkpoint is damaged."""
    save(tmp_path, 5)
    path = save(tmp_path, 6)
    assert path is not None
    damage(path)
    newest = checkpoints.newest(tmp_path)
    assert newest is not None and newest.name == "step-0000005"
    assert "step-0000006" in capsys.readouterr().err


def test_full_disk_keeps_the_former(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failed save that removes what was there, stays behind half-written or ends the run."""
    save(tmp_path, 5, keep=1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    assert save(tmp_path, 6, keep=1) is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000005"]
    assert "No space left on device" in capsys.readouterr().err


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def copied(folder: Path, name: str) -> None:
    shutil.copytree(folder / "step-0000005", folder / name)


FOREIGN: dict[str, Callable[[Path, str], object]] = {
    "step-0000005.bak": copied,
    "step-0000005 (copy)": copied,
    "step-0000009.old": copied,
    "step-9": copied,
    "step-0000009": copied,  # under the name of one that is still to come
    "step-0000004": copied,
    "step-9999999": copied,
    "step-00000009": copied,
    "step-0000009-good": copied,
    "step-٠٠٠٠٠٠٩": copied,
    "step-": copied,
    "step-best": copied,
    "my step-0000009": copied,
    "step-0000002": lambda folder, name: (folder / name).write_text("notes"),
    "step-0000003": lambda folder, name: (folder / name).mkdir(),
    "step-0000007": lambda folder, name: (folder / name).symlink_to(folder / "step-0000005"),
    "step-0000008": lambda folder, name: (folder / name).symlink_to(folder / "nowhere"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_ours_is_skipped_and_stays(name: str, tmp_path: Path) -> None:
    """A copy, a link or a note beside the checkpoints that ends the next save, blocks --resume, is
    resumed from, or is removed as if it were an old one."""
    save(tmp_path, 5)
    FOREIGN[name](tmp_path, name)
    newest = checkpoints.newest(tmp_path)
    assert newest is not None and newest.name == "step-0000005"
    for step in (10, 20, 30):
        assert save(tmp_path, step) is not None
    assert names(tmp_path) == {name, "step-0000020", "step-0000030"}
    newest = checkpoints.newest(tmp_path)
    assert newest is not None and newest.name == "step-0000030"


@pytest.mark.parametrize("name", ["step-0000005.bak", "step-5", "step-0000005 (copy)"])
def test_copies_alone_are_told(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that begins anew without a word, since its only checkpoints were renamed by hand."""
    save(tmp_path, 5)
    (tmp_path / "step-0000005").rename(tmp_path / name)
    assert checkpoints.newest(tmp_path) is None
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    "occupy",
    [
        lambda path: path.write_text("notes"),
        lambda path: (path / "notes").mkdir(parents=True),
        lambda path: path.symlink_to(path.with_name("step-0000005")),
    ],
    ids=["file", "folder", "link"],
)
def test_place_of_a_checkpoint_is_taken(
    occupy: Callable[[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody's file or link under the name of the next checkpoint, which is then not saved, or
    removes it."""
    save(tmp_path, 5)
    occupy(tmp_path / "step-0000006")
    assert save(tmp_path, 6) == tmp_path / "step-0000006"
    assert checkpoints.load(tmp_path / "step-0000006").state["step"] == 6
    assert names(tmp_path) == {"step-0000005", "step-0000006", "step-0000006.old"}
    assert "step-0000006.old" in capsys.readouterr().err


@pytest.mark.parametrize(
    "occupy",
    [
        lambda path: path.write_text("notes"),
        lambda path: path.symlink_to(path.with_name("step-0000005")),
        lambda path: path.symlink_to("nowhere"),
    ],
    ids=["file", "link", "broken link"],
)
def test_place_of_the_temporary_folder_is_taken(
    occupy: Callable[[Path], Any], tmp_path: Path
) -> None:
    """A checkpoint that is not saved, or becomes a link into another one."""
    save(tmp_path, 5)
    occupy(tmp_path / "step-0000006.tmp")
    assert save(tmp_path, 6) == tmp_path / "step-0000006"
    assert not (tmp_path / "step-0000006").is_symlink()
    assert checkpoints.load(tmp_path / "step-0000005").state["step"] == 5
    assert names(tmp_path) == {"step-0000005", "step-0000006", "step-0000006.tmp.old"}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_damaged_checkpoints_of_a_left_course_do_not_count(keep: int, tmp_path: Path) -> None:
    """The checkpoint just written, removed as old since damaged ones have higher numbers."""
    for step in (500, 1000, 1500):
        save(tmp_path, step, keep=3)
    for step in (1000, 1500):
        damage(tmp_path / f"step-{step:07d}")
    assert save(tmp_path, 600, keep) == tmp_path / "step-0000600"
    newest = checkpoints.newest(tmp_path)
    assert newest is not None and newest.name == "step-0000600"
    assert (tmp_path / "step-0000500").exists() == (keep > 1)
    for step in (700, 1000, 1200, 1500, 1600):
        assert save(tmp_path, step, keep) is not None
        newest = checkpoints.newest(tmp_path)
        assert newest is not None and newest.name == f"step-{step:07d}"
    assert names(tmp_path) == {f"step-{n:07d}" for n in (1200, 1500, 1600)[-keep:]}


def test_newer_checkpoints_do_not_count(tmp_path: Path) -> None:
    """A run that went on from before some good checkpoints, and keeps these in place of its own."""
    for step in (500, 1000, 1500):
        save(tmp_path, step, keep=3)
    for step in (600, 700):
        save(tmp_path, step, keep=2)
    assert {"step-0000600", "step-0000700"} <= names(tmp_path)
    assert "step-0000500" not in names(tmp_path)


@pytest.mark.parametrize("broken", ["rank", "state"])
def test_the_last_good_checkpoint_stays(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A good checkpoint removed for damaged ones, written on a disk that loses what it is given."""
    save(tmp_path, 5)
    real = os.replace

    def losing(source: Path, target: Path) -> None:
        real(source, target)
        for path in target.glob("rank-*" if broken == "rank" else checkpoints.STATE):
            path.write_bytes(path.read_bytes()[:7])

    monkeypatch.setattr(os, "replace", losing)
    for step in (6, 7, 8):
        save(tmp_path, step, keep=1)
    newest = checkpoints.newest(tmp_path)
    assert newest is not None and newest.name == "step-0000005"


@pytest.mark.parametrize(
    "state",
    ["", "[]", "null", "{}", '{"step": 6}', '{"step": 6, "ranks": 0}', '{"step": "x"}', "\xff"],
)
def test_damaged_state_is_skipped(state: str, tmp_path: Path) -> None:
    """A state.json without what a run needs, which is met after the resume has begun."""
    save(tmp_path, 5)
    save(tmp_path, 6)
    (tmp_path / "step-0000006" / checkpoints.STATE).write_bytes(state.encode("latin-1"))
    newest = checkpoints.newest(tmp_path)
    assert newest is not None and newest.name == "step-0000005"


@pytest.mark.parametrize("stuck", ["step-0000005", "step-0000006"])
def test_old_checkpoint_that_cannot_be_removed(
    stuck: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished save that counts as not saved, for the sake of an old folder."""
    save(tmp_path, 5)
    save(tmp_path, 6)
    real = shutil.rmtree

    def remove(path: Path, **options: Any) -> None:
        if Path(path).name.startswith(stuck) and not str(path).endswith(".tmp"):
            raise PermissionError(1, "Operation not permitted", str(path))
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", remove)
    for step in (7, 8, 9):
        assert save(tmp_path, step) == tmp_path / f"step-{step:07d}"
    found = capsys.readouterr().err
    assert stuck in found and "cannot be removed" in found and "not saved" not in found
    assert names(tmp_path) == {stuck, "step-0000008", "step-0000009"}
    # The same number once more, as after a course that was left.
    assert save(tmp_path, int(stuck[5:]), keep=5) is not None
    assert checkpoints.load(tmp_path / stuck).state["ranks"] == 1


def test_checkpoint_is_on_the_disk_before_old_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that only the memory of the system holds: after a crash the new folder is not there,
    or empty, and the old one is gone."""
    folder = tmp_path / "run" / "checkpoints"
    flushed: list[str] = []
    real = os.fsync

    def fsync(number: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{number}"))
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    save(folder, 5, keep=1)
    temporary = folder / "step-0000005.tmp"
    expected = [tmp_path, folder.parent, folder]  # as they are made
    expected += [temporary / "rank-00000-of-00001.safetensors", temporary]
    expected += [temporary / checkpoints.STATE, temporary, folder]
    assert sorted(flushed[:3]) == sorted(str(path) for path in expected[:3])
    assert flushed[3:] == [str(path) for path in expected[3:]]
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: flushed.append(f"rm {path}"))
    save(folder, 6, keep=1)
    assert flushed[-2:] == [str(folder), f"rm {folder / 'step-0000005'}"]

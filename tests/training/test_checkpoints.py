"""Checkpoints: what counts, what is kept, what is refused."""

from __future__ import annotations

from pathlib import Path

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
    """A truncated file that loads as something else; a lost one that nobody misses."""
    path = save(tmp_path, 5)
    assert path is not None
    damage(path)
    with pytest.raises(ValueError, match="step-0000005"):
        checkpoints.load(path)
    next(path.glob("rank-*")).unlink()
    with pytest.raises(ValueError, match=r"rank-00000-of-00001\.safetensors"):
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

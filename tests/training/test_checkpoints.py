"""Checkpoints: what counts, what is kept, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dalle1.training import checkpoints
from dalle1.training.checkpoints import Checkpoint


def made(step: int) -> Checkpoint:
    tensors = {"a/exp_avg": torch.full((3,), float(step)), "scalar": torch.tensor(float(step))}
    return Checkpoint(tensors, tensors, tensors, {"step": step})


def test_round_trip(tmp_path: Path) -> None:
    """Values or names lost between save and load."""
    path = checkpoints.save(tmp_path, made(7), keep=2)
    again = checkpoints.load(path)
    assert again.state == {"step": 7}
    assert torch.equal(again.optimiser["a/exp_avg"], torch.full((3,), 7.0))


def test_keeps_the_newest(tmp_path: Path) -> None:
    """A disk that fills up, or the newest removed instead of the oldest."""
    for step in (5, 20, 100):
        checkpoints.save(tmp_path, made(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000020", "step-0000100"]


def test_half_written_folders_do_not_count(tmp_path: Path) -> None:
    """Resuming from a checkpoint that a crash cut short."""
    checkpoints.save(tmp_path, made(5), keep=3)
    (tmp_path / "step-0000010.tmp").mkdir()
    (tmp_path / "step-0000010.tmp" / "state.json").write_text("{}")
    (tmp_path / "step-0000011").mkdir()
    newest = checkpoints.newest(tmp_path)
    assert newest is not None and newest.name == "step-0000005"


def test_damaged_file_is_named(tmp_path: Path) -> None:
    """A truncated file that loads as something else."""
    path = checkpoints.save(tmp_path, made(5), keep=1)
    file = path / "optimiser.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="step-0000005"):
        checkpoints.load(path)

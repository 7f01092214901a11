"""What the engine asks of torch.distributed, without a second process."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle1.training import distributed, engine
from dalle1.training.launcher import Launch

ROOT = Path(__file__).parents[2]


def test_barrier_waits_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that give up after half an hour, though another one draws for hours more."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **kwargs: asked.update(group=kwargs))
    monkeypatch.setattr(
        torch.distributed,
        "monitored_barrier",
        lambda group, timeout=None: asked.update(barrier=timeout),
    )
    wait = distributed.make_barrier()
    assert "barrier" not in asked
    wait()
    assert asked["group"]["backend"] == "gloo"
    assert asked["barrier"] == asked["group"]["timeout"] >= timedelta(days=7)


SEES_NVIDIA = """
import os
exists = os.path.exists
os.path.exists = lambda path: NVIDIA if str(path).startswith("/dev/nvidia") else exists(path)
"""
IMPORT = """
import torch
from dalle1.training import engine
from deepspeed.accelerator import get_accelerator
expected = "cuda" if torch.cuda.is_available() else "cpu"
assert get_accelerator().device_name() == expected, get_accelerator().device_name()
engine.start_processes()
assert get_accelerator().device_name() == expected, get_accelerator().device_name()
"""


@pytest.mark.slow
@pytest.mark.parametrize("nvidia", [True, False])
def test_deepspeed_uses_the_device_that_torch_uses(nvidia: bool) -> None:
    """GPUs told by /dev/nvidia0: not there under WSL2 and for a container's second GPU, and there
    where CUDA_VISIBLE_DEVICES hides them all."""
    code = SEES_NVIDIA.replace("NVIDIA", str(nvidia), 1) + IMPORT
    environment = {name: x for name, x in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_choice_made_before_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed imported by the user first, which then chose by itself or by a variable of then."""
    before = engine.get_accelerator()
    try:
        for former in ("cuda", "mps"):
            module = importlib.import_module(f"deepspeed.accelerator.{former}_accelerator")
            engine.set_accelerator(getattr(module, f"{former.upper()}_Accelerator")())
            assert engine.get_accelerator().device_name() == former
            monkeypatch.setattr(engine, "default_device", lambda: torch.device("cpu"))
            engine._choose_accelerator()
            assert engine.get_accelerator().device_name() == "cpu"
        monkeypatch.setattr(engine, "default_device", lambda: torch.device("cuda"))
        engine._choose_accelerator()
        assert engine.get_accelerator().device_name() == "cuda"
    finally:
        engine.set_accelerator(before)


@pytest.mark.parametrize("found", ["cpu", "cuda"])
@pytest.mark.parametrize("asked", ["cuda", "cpu", "xpu", "mps", "gpu", ""])
def test_another_accelerator_than_torchs_is_refused(
    found: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DS_ACCELERATOR that sends DeepSpeed's tensors to another device than ours, or is ignored."""
    monkeypatch.setattr(engine, "default_device", lambda: torch.device(found))
    monkeypatch.setattr(engine, "set_accelerator", lambda accelerator: None)
    monkeypatch.setenv("DS_ACCELERATOR", asked)
    if asked == found:
        engine._choose_accelerator()
        return
    with pytest.raises(ValueError, match=f"DS_ACCELERATOR: expected '{found}'.*got '{asked}'"):
        engine.start_processes()


@pytest.mark.slow
def test_command_refuses_another_accelerator(tmp_path: Path) -> None:
    """A traceback of DeepSpeed's import."""
    for asked in ("xpu", "gpu"):
        done = subprocess.run(
            [sys.executable, "launch/train.py", "configs/shapes/dvae.yaml", f"run={tmp_path}"],
            cwd=ROOT,
            env=os.environ | {"DS_ACCELERATOR": asked},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "error: DS_ACCELERATOR: expected 'c" in done.stderr and asked in done.stderr


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's error for another rank's GPU, which this process is not given."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    distributed.use_gpu(Launch(rank=2, world_size=4, local_rank=0))
    with pytest.raises(ValueError, match="LOCAL_RANK: expected a number below the 1 GPUs"):
        distributed.use_gpu(Launch(rank=2, world_size=4, local_rank=1))

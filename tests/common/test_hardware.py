"""Peaks by a device's name, names of types, peak memory."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from dalle1.common import hardware
from dalle1.common.hardware import DTYPES, PEAKS, known_peak, peak_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_peak_of_a_gpu(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An MFU by another board's peak, or in TFLOP/s where FLOP/s are meant."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert known_peak(GPU) == peak
    assert known_peak(CPU) is None
    assert all(1e14 < value < 1e16 for value in PEAKS.values())


def test_types_by_name() -> None:
    """A name in settings that stands for another type."""
    assert {str(dtype) for dtype in DTYPES.values()} == {f"torch.{name}" for name in DTYPES}


def test_peak_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kilobytes taken for bytes on Linux, bytes for kilobytes on macOS."""
    used = peak_memory(CPU)
    assert used >= 50e6  # torch is loaded
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(hardware.sys, "platform", "darwin")
    assert peak_memory(CPU) >= largest and peak_memory(CPU) < used


def test_peak_memory_of_children() -> None:
    """A demo whose stages, processes of their own, are left out of its memory."""
    code = (
        "import subprocess, sys, torch\n"
        "from dalle1.common.hardware import peak_memory\n"
        "device = torch.device('cpu')\n"
        "before = peak_memory(device)\n"
        "subprocess.run([sys.executable, '-c', 'x = bytes(range(256)) * 2**22'], check=True)\n"
        "print(before, peak_memory(device), peak_memory(device, children=True))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, alone, all_ = map(int, done.stdout.split())
    assert alone < before + 2**28 and all_ >= 2**30

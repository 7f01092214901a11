"""What the device is called, how fast it can be, and how much memory was used of it."""

from __future__ import annotations

import sys
from typing import Literal, get_args

import psutil
import torch

# FLOP/s of dense 16-bit matrix products, from the makers' data sheets, by a part of the device's
# name. Those that come in several forms are given as the SXM boards.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "V100": 125e12,
}

DTypeName = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(DTypeName)}


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def largest_float(device: torch.device) -> torch.dtype:
    """float64 where the device has it, else float32: Apple's GPUs (mps) have none."""
    if device.type == "mps":
        return torch.float32
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return torch.float32
    return torch.float64


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def known_peak(device: torch.device) -> float | None:
    """FLOP/s of a GPU's dense 16-bit products; None where they are not known."""
    if device.type != "cuda":
        return None
    name = device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def peak_memory(device: torch.device, children: bool = False) -> int:
    """Bytes that were used at most since the start of the process.

    Of a GPU: what torch allocated there, since `torch.cuda.reset_peak_memory_stats` if that was
    called. Of the CPU: the resident memory of this process.

    Args:
        device: the device whose memory is meant.
        children: of the CPU, the largest of this process and of the children that have ended.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":  # which keeps no record of children
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # of Unix alone

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if children:
        usage = max(usage, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    return usage if sys.platform == "darwin" else 1024 * usage

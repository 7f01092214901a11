"""Seconds, bytes and rates of a device, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dalle1.transformer.prepacked_linear import prepacked_linear


@dataclass
class Measured:
    """Seconds of each repeat, and the peak memory in bytes where it is the variant's own."""

    seconds: list[float]
    memory: int | None

    def text(self) -> str:
        """The median with the extremes, and the memory, for a table."""
        low, middle, high = self.spread()
        memory = "" if self.memory is None else f"  {self.memory / 2**20:8,.0f} MB"
        return f"{middle:9.2f} ms  ({low:.2f} to {high:.2f}){memory}"

    def spread(self) -> tuple[float, float, float]:
        """Milliseconds: min, median, max."""
        ms = [1e3 * s for s in self.seconds]
        return min(ms), statistics.median(ms), max(ms)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, until all that it has queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.inference_mode()
def bandwidth(device: torch.device) -> float:
    """Bytes a second that the device reads and writes when it copies, the best of a few.

    The tensor is larger than the caches.
    """
    n = 2**28 if device.type == "cuda" else 2**26
    source = torch.ones(n, device=device)
    target = torch.empty_like(source)
    return 8 * n / min(timed(lambda: target.copy_(source), device) for _ in range(6))


@torch.inference_mode()
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of a few."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = prepacked_linear(a, a.new_zeros(n), n)
    return 2 * n**3 / min(timed(lambda: product(b), device) for _ in range(6))

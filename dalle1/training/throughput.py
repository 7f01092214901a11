"""How fast a run trains: images, tokens, MFU, time spent waiting for data, memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from dalle1.common.hardware import peak_memory
from dalle1.training.config import RunConfig
from dalle1.training.distributed import device
from dalle1.training.parallel import ParallelDims
from dalle1.training.planning.flops import step_cost


class Throughput:
    """Means over the updates since the last report, by this rank's own clock.

    A report holds `images_per_second` and `tokens_per_second` over all ranks, `seconds_per_update`,
    `data_wait` (the share of the time spent waiting for data), `memory_gb` (this rank's peak, 1e9
    bytes), and `mfu` where the device's peak is known: the model's FLOPs, without recomputation,
    as a share of the peak.
    """

    def __init__(self, config: RunConfig, world_size: int, peak: float | None = None) -> None:
        """peak: FLOP/s of a rank's device in the run's precision; None if it is not known."""
        self._batch, self._peak = config.batch_size, peak
        self._tokens = 0
        if config.prior is not None:
            self._tokens = config.batch_size * config.prior.sequence_length
        self._flops = 0.0  # of an update, on one rank, without recomputation
        if peak is not None:
            dims = ParallelDims(config.batch_size, config.parallel, world_size)
            cost = step_cost(config, dims.micro_batch, world_size)
            self._flops = dims.grad_accum_steps * cost.flops
        self._restart()

    def _restart(self) -> None:
        self._since, self._updates, self._waited, self._paused = time.monotonic(), 0, 0.0, 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the call that waits for the next batch."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around validation, contact sheets and checkpoints, whose time does not count."""
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start

    def count_update(self) -> None:
        """Counts one update as done."""
        self._updates += 1

    def report(self) -> dict[str, float]:
        """The means since the last report, by name as in metrics.jsonl."""
        spent = max(time.monotonic() - self._since - self._paused, 1e-9)
        rate = self._updates / spent
        values = {
            "images_per_second": rate * self._batch,
            "seconds_per_update": spent / max(self._updates, 1),
            "data_wait": self._waited / spent,
            "memory_gb": peak_memory(device()) / 1e9,
        }
        if self._tokens:
            values["tokens_per_second"] = rate * self._tokens
        if self._peak is not None:
            values["mfu"] = rate * self._flops / self._peak
        self._restart()
        return values

"""How fast a run goes, and what it waits for: samples, tokens, MFU, data, memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from dalle1.common.hardware import peak_memory
from dalle1.training.config import RunConfig
from dalle1.training.distributed import device
from dalle1.training.parallel import ParallelDims
from dalle1.training.planning.flops import step_cost


class Speed:
    """Means over the updates since the last report, of this rank's own clock."""

    def __init__(self, config: RunConfig, ranks: int, peak: float | None = None) -> None:
        """peak: FLOP/s of a rank's device in the run's precision; None: MFU is not reported."""
        self._batch, self._peak = config.batch_size, peak
        self._tokens = 0
        if config.transformer is not None:
            self._tokens = config.batch_size * config.transformer.stream.length
        self._flops = 0.0  # of an update, on one rank; those of the model, not done again
        if peak is not None:
            dims = ParallelDims(config.batch_size, config.parallel, ranks)
            self._flops = dims.grad_accum_steps * step_cost(config, dims.micro_batch, ranks).flops
        self._begin()

    def _begin(self) -> None:
        self._since, self._updates, self._waited, self._aside = time.monotonic(), 0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is no training: sheets, validation, checkpoints; not in the speed."""
        start = time.monotonic()
        yield
        self._aside += time.monotonic() - start

    def update(self) -> None:
        """One update is done."""
        self._updates += 1

    def report(self) -> dict[str, float]:
        """The means, which begin anew."""
        spent = max(time.monotonic() - self._since - self._aside, 1e-9)
        rate = self._updates / spent
        values = {
            "images_per_second": rate * self._batch,
            "seconds_per_update": spent / max(self._updates, 1),
            "data_wait": self._waited / spent,  # share of the time
            "memory_gb": peak_memory(device()) / 1e9,  # at its peak, of this rank
        }
        if self._tokens:
            values["tokens_per_second"] = rate * self._tokens
        if self._peak is not None:
            values["mfu"] = rate * self._flops / self._peak
        self._begin()
        return values

"""The mean of gradients over replicas of the state, compressed or not (paper section 2.5).

DeepSpeed averages within a shard group. What the groups, or the ranks of stage 0 under PowerSGD,
tell one another is sent here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from dalle1.training import distributed
from dalle1.training.config import RunConfig
from dalle1.training.parallel import ParallelDims, ShardGroups
from dalle1.training.powersgd import PowerSGD, matrices, mean_over


class GradientExchange:
    """Averages gradients over the replicas that DeepSpeed is not told of."""

    def __init__(
        self,
        config: RunConfig,
        dims: ParallelDims,
        parameters: Mapping[str, nn.Parameter],
        shard_groups: ShardGroups | None,
    ) -> None:
        """parameters: by name, sharded by now under ZeRO 3; shard_groups: None for one group."""
        self._dims, self._shard_groups = dims, shard_groups
        self._compress_from = config.compression.first_step if config.compression else 0
        self._power_sgd: PowerSGD | None = None
        # With one replica there is nothing to exchange: a run for a cluster, tried on fewer ranks.
        if config.compression is not None and dims.dp_replicate > 1:
            self._power_sgd = self._make_power_sgd(config, parameters)

    @property
    def needed(self) -> bool:
        """Whether there are replicas that only `average` makes agree."""
        return self._power_sgd is not None or self._shard_groups is not None

    @property
    def replaces_deepspeed(self) -> bool:
        """Whether DeepSpeed must not average the gradients of stage 0 itself."""
        return self._power_sgd is not None and self._shard_groups is None

    def _make_power_sgd(
        self, config: RunConfig, parameters: Mapping[str, nn.Parameter]
    ) -> PowerSGD:
        assert config.compression is not None
        rank, device = config.compression.approximation_rank, distributed.device()
        full = matrices({name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()})
        if config.parallel.zero_stage == 0:
            return PowerSGD(full, rank, config.seed, None, device)
        assert self._shard_groups is not None
        shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in parameters.items():
            shard: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            size, columns = shard.numel(), full[name][-1]
            complete_rows = len(full[name]) == 2 and size % columns == 0
            shapes[name] = (size // columns, columns) if complete_rows else (size,)
        # The paper's rank is that of all shards of a matrix (see `powersgd.saving`).
        rank = max(1, rank // self._dims.dp_shard)
        return PowerSGD(shapes, rank, config.seed, self._shard_groups.replicas, device)

    def average(self, gradients: Mapping[str, Tensor], step: int, skipped: bool) -> None:
        """Replaces this rank's gradients, or shards of them, by their mean over the replicas.

        Args:
            gradients: by names that are the same on all replicas; changed in place.
            step: number of the update; before `compression.first_step` nothing is compressed.
            skipped: whether the update will be skipped: the error buffers then do not change.
        """
        if self._power_sgd is not None:
            if skipped:  # else the error buffers would lose what is skipped
                next(iter(gradients.values())).fill_(math.nan)
            self._power_sgd.average(gradients, step >= self._compress_from)
        elif self._shard_groups is not None:
            mean_over(list(gradients.values()), self._shard_groups.replicas)

    def state(self) -> dict[str, Tensor]:
        """PowerSGD's error buffers, named `<place among the shards>/<name>`; all ranks call it.

        The ranks of the first replica return them, all others return nothing.
        """
        if self._power_sgd is None:
            return {}
        place = distributed.rank() % self._dims.dp_shard
        state = self._power_sgd.state()
        first = distributed.rank() < self._dims.dp_shard
        return {f"{place}/{name}": value for name, value in state.items()} if first else {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Restores this rank's part of what `state` returned on all ranks.

        Returns:
            None, or what becomes of the error buffers that cannot be restored, for a warning: what
            they held of past gradients is lost.
        """
        if self._power_sgd is None:
            if not tensors:
                return None
            why = "without compression" if self._dims.dp_replicate > 1 else "with one replica"
            return f"holds error buffers, which are dropped: this run goes on {why}"
        prefix = f"{distributed.rank() % self._dims.dp_shard}/"
        mine = {n.removeprefix(prefix): tensors[n] for n in tensors if n.startswith(prefix)}
        try:
            self._power_sgd.load_state(mine)
        except ValueError:
            return (
                "holds no error buffers for this rank and these shards of the weights; they begin "
                "with zeros"
            )
        return None

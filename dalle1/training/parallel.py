"""How a batch and a run's state are spread over ranks: passes, shard groups, replicas (2.5)."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from dalle1.training import distributed
from dalle1.training.config import ParallelSettings


def dp_shard_of(settings: ParallelSettings, ranks: int) -> int:
    """How many ranks share one copy of the state; fewer ranks than a group are one group."""
    return min(settings.dp_shard or ranks, ranks) if settings.zero_stage else 1


class ParallelDims:
    """How a batch and the state are spread; refuses what does not divide.

    Raises ValueError that names the setting.
    """

    def __init__(self, batch_size: int, settings: ParallelSettings, ranks: int) -> None:
        if batch_size % ranks:
            below = batch_size - batch_size % ranks
            near = " or ".join(str(size) for size in (below, below + ranks) if size)
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of the {ranks} ranks: set it to "
                f"{near}, or change their number"
            )
        share = batch_size // ranks
        most = min(settings.micro_batch or share, share)
        # Samples of a rank's pass, and passes of an update: the fewest that are all alike.
        self.micro_batch = next(size for size in range(most, 0, -1) if share % size == 0)
        self.grad_accum_steps = share // self.micro_batch
        self.dp_shard = dp_shard_of(settings, ranks)
        if ranks % self.dp_shard:
            raise ValueError(
                f"parallel.dp_shard {self.dp_shard} must divide the {ranks} ranks: groups of "
                f"{self.dp_shard} leave {ranks % self.dp_shard} over"
            )
        self.dp_replicate = ranks // self.dp_shard  # copies of the state


class ShardGroups:
    """Ranks in groups of `size` that share one copy of the state; DeepSpeed's `mpu` protocol.

    `replicas` are the ranks of the same place in every group, which hold the same shard.
    """

    def __init__(self, size: int) -> None:
        ranks, rank = distributed.ranks(), distributed.rank()
        self.members = list(range(rank // size * size, rank // size * size + size))
        # Each group is made by all ranks, in the same order.
        for first in range(0, ranks, size):
            group = dist.new_group(list(range(first, first + size)))
            if rank in range(first, first + size):
                self._shard = group
        for place in range(size):
            group = dist.new_group(list(range(place, ranks, size)))
            if rank % size == place:
                self.replicas = group

    def get_data_parallel_group(self) -> Any:
        return self._shard

    def get_data_parallel_world_size(self) -> int:
        return len(self.members)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.members

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

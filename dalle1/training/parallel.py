"""How ranks divide a batch and the state: micro-batches, shard groups, replicas (section 2.5)."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from dalle1.training import distributed
from dalle1.training.config import ParallelSettings


def dp_shard_of(settings: ParallelSettings, world_size: int) -> int:
    """How many ranks share one copy of the state; 1 under ZeRO stage 0, at most all."""
    return min(settings.dp_shard or world_size, world_size) if settings.zero_stage else 1


class ParallelDims:
    """How the ranks divide the global batch and the state.

    world_size = dp_replicate * dp_shard, and
    batch_size = world_size * grad_accum_steps * micro_batch.

    Attributes:
        micro_batch: samples of one forward and backward pass of a rank.
        grad_accum_steps: passes of a rank in an update.
        dp_shard: ranks that share one copy of the state.
        dp_replicate: copies of the state.

    Raises:
        ValueError: something does not divide; the message names the setting.
    """

    def __init__(self, batch_size: int, settings: ParallelSettings, world_size: int) -> None:
        if batch_size % world_size:
            below = batch_size - batch_size % world_size
            near = " or ".join(str(size) for size in (below, below + world_size) if size)
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of the {world_size} ranks: set it to "
                f"{near}, or change their number"
            )
        share = batch_size // world_size
        largest = min(settings.micro_batch or share, share)
        # The fewest passes that are all of one size.
        self.micro_batch = next(size for size in range(largest, 0, -1) if share % size == 0)
        self.grad_accum_steps = share // self.micro_batch
        self.dp_shard = dp_shard_of(settings, world_size)
        if world_size % self.dp_shard:
            raise ValueError(
                f"parallel.dp_shard {self.dp_shard} must divide the {world_size} ranks: groups of "
                f"{self.dp_shard} leave {world_size % self.dp_shard} over"
            )
        self.dp_replicate = world_size // self.dp_shard


class ShardGroups:
    """Groups of `size` neighboring ranks that share one copy of the state.

    It has the methods that DeepSpeed asks of a model parallel unit (`mpu`). `replicas` is the group
    of the ranks at this rank's place in every shard group, which hold the same shard.
    """

    def __init__(self, size: int) -> None:
        world_size, rank = distributed.world_size(), distributed.rank()
        self.members = list(range(rank // size * size, rank // size * size + size))
        # Each group is made by all ranks, in the same order.
        for first in range(0, world_size, size):
            group = dist.new_group(list(range(first, first + size)))
            if rank in range(first, first + size):
                self._shard = group
        for place in range(size):
            group = dist.new_group(list(range(place, world_size, size)))
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

"""The average of the weights over updates, used in place of the last ones (A.2, B.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

Named = Iterable[tuple[str, Tensor]]


def assign_owners(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """The rank that keeps each tensor, chosen so that all ranks keep about as many numbers.

    It depends on the arguments alone, so that all ranks find the same.

    Args:
        sizes: numbers in each tensor.
    """
    load = [0] * world_size
    owner = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = min(range(world_size), key=load.__getitem__)
        load[owner[name]] += sizes[name]
    return {name: owner[name] for name in sizes}


class EMA:
    """average <- decay * average + (1 - decay) * weights, once every `every` updates.

    It is kept on the CPU in float32, as the paper does for the transformer (appendix B.2). Each
    rank keeps the average of the weights named in `mine`, which are its share.
    """

    def __init__(
        self,
        weights: Named,
        mine: Iterable[str],
        decay: float,
        every: int = 1,
        maxima: Mapping[str, float] | None = None,
    ) -> None:
        """Begins with these weights.

        Args:
            weights: all names with unsharded weights, see `Engine.weights`.
            mine: names of this rank's share.
            decay: share of the former average that an averaging keeps.
            every: updates between two averagings.
            maxima: bounds of the weights that have one, see `ParameterGroup`.
        """
        self.decay, self.every = decay, every
        self.maxima = maxima or {}
        self.missed = False  # an averaging, since its update was skipped
        self.mine = frozenset(mine)
        self.average = dict(self._snapshot(weights))

    def _snapshot(self, weights: Named) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:  # to the end on every rank: gathering one needs them all
            if name in self.mine:
                # A copy even on the CPU, where .to() would alias the weights.
                yield name, weight.detach().to("cpu", torch.float32, copy=True)

    def reset(self, weights: Named) -> None:
        """Restarts the average from these weights."""
        self.missed = False
        self.average = dict(self._snapshot(weights))

    def due(self, step: int) -> bool:
        """Whether the average is updated after update number `step` (0, 1, ...)."""
        return (step + 1) % self.every == 0

    @torch.no_grad()
    def update(self, weights: Named) -> None:
        """Averages the weights in."""
        for name, weight in weights:
            if name in self.mine:
                average = self.average[name]
                average.lerp_(weight.detach().to("cpu", torch.float32), 1 - self.decay)
                if name in self.maxima:  # an average that an earlier release wrote may be above
                    average.clamp_(max=self.maxima[name])

    def after_update(self, step: int, done: bool, weights: Named) -> None:
        """Averages the weights in where it is time; call it after each update.

        The turn of an update that was skipped is taken at the next one that is done.

        Args:
            step: number of the update (0, 1, ...).
            done: whether it was done, not skipped.
            weights: as for `update`; read only where they are averaged in.
        """
        self.missed = self.missed or self.due(step)
        if done and self.missed:
            self.update(weights)
            self.missed = False

"""The iterate average that is used in place of the last weights (appendices A.2 and B.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

Named = Iterable[tuple[str, Tensor]]


def shares(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The rank that keeps each tensor, so that all keep about as many numbers.

    sizes: numbers in each tensor. A function of the arguments alone: all ranks find the same.
    """
    load = [0] * ranks
    owner = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = min(range(ranks), key=load.__getitem__)
        load[owner[name]] += sizes[name]
    return {name: owner[name] for name in sizes}


class EMA:
    """average <- decay * average + (1 - decay) * weights, once every `every` updates.

    Kept on the CPU in float32, as the paper does for the transformer; with several ranks each
    keeps the average of its share of the weights, those named in `mine`.
    """

    def __init__(self, weights: Named, mine: Iterable[str], decay: float, every: int = 1) -> None:
        """weights: all names with whole weights, see `Engine.weights`."""
        self.decay, self.every = decay, every
        self.mine = frozenset(mine)
        self.average = dict(self._snapshot(weights))

    def _snapshot(self, weights: Named) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:  # to the end on every rank: a sharded one needs them all
            if name in self.mine:
                # A copy even on the CPU, where .to() would alias the weights.
                yield name, weight.detach().to("cpu", torch.float32, copy=True)

    def reset(self, weights: Named) -> None:
        """Starts the average anew from these weights."""
        self.average = dict(self._snapshot(weights))

    def due(self, step: int) -> bool:
        """Whether the average takes the weights in after update number `step` (0, 1, ...)."""
        return (step + 1) % self.every == 0

    @torch.no_grad()
    def update(self, weights: Named) -> None:
        """Takes the weights in; call after each update for which `due`."""
        for name, weight in weights:
            if name in self.mine:
                self.average[name].lerp_(weight.detach().to("cpu", torch.float32), 1 - self.decay)

"""Draws candidates of several requests in one batch, each by its own seed and caption.

What a request gets does not depend on those that it shares a batch with: candidate i is a function
of (seed, caption, i), up to the rounding of matrix products of another size.

Dimensions: c groups of b candidates of one caption each, m image positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from einops import rearrange
from torch import Tensor

from dalle1.common.weights import device_of
from dalle1.generation.batches import LARGEST_BATCH, PartDrawer, fitting_batch, out_of_memory
from dalle1.generation.options import SamplingOptions, candidate_uniforms
from dalle1.protocols import TokenModel


@dataclass(frozen=True)
class Share:
    """Some candidates of one caption: what a request has of a batch."""

    caption: str
    seed: int
    candidates: range  # their numbers; not empty

    def __len__(self) -> int:
        return len(self.candidates)


class BatchTooLarge(Exception):
    """Memory ran out for a batch; the drawer's limit is smaller now."""


class ShareDrawer:
    """Draws shares that have options and first image tokens in common.

    It keeps the memory of its last batch for the next one of the same shape.
    """

    def __init__(
        self, model: TokenModel, options: SamplingOptions, batch_size: int | None = None
    ) -> None:
        """batch_size: candidates at once at most; None: as many as memory is expected to hold."""
        self.model = model
        wanted = batch_size or LARGEST_BATCH
        # As if each candidate had a caption of its own, which takes the most.
        self.limit = min(wanted, fitting_batch(model, 1, wanted, options))
        self._drawer = PartDrawer(model.prior, options)

    def draw(
        self,
        shares: Sequence[Share],
        prefix: Tensor | None = None,
        on_row: Callable[[int, list[Tensor]], None] | None = None,
    ) -> list[Tensor]:
        """The candidates of each share: int64 [candidates, m], on the CPU.

        Args:
            shares: of at most `limit` candidates together.
            prefix: int64 [p] image tokens that every candidate begins with.
            on_row: called when a row of the grid is drawn, with the number of positions that are
                done in all candidates, and the tokens of each share, of which so many are drawn.
                What it raises ends the drawing.

        Raises:
            BatchTooLarge: memory ran out; `limit` is half of these candidates now.
        """
        count = sum(map(len, shares))
        if not 0 < count <= self.limit:
            raise ValueError(f"shares: expected 1 to {self.limit} candidates, got {count}")
        groups = _Groups(shares, self.model, self.limit)

        def report(done: int, tokens: Tensor) -> None:
            if on_row:
                on_row(done, groups.split(tokens))

        try:
            tokens = self._drawer.draw(groups.text, groups.uniforms, prefix, report)
        except (RuntimeError, MemoryError) as error:
            if count == 1 or not out_of_memory(error):
                raise
            self.limit = count // 2
            raise BatchTooLarge from error
        return groups.split(tokens)


class _Groups:
    """Shares as c groups of b candidates of one caption: what a `Generator` draws at once.

    A share takes one group or several; its last one may be filled up with candidates that are
    drawn and dropped.
    """

    def __init__(self, shares: Sequence[Share], model: TokenModel, limit: int) -> None:
        prior = model.prior
        length = prior.grid[0] * prior.grid[1]
        self.sizes = [len(share) for share in shares]
        self.each = group_size(self.sizes, limit, length, prior.text_length)
        self.counts = [ceil(size / self.each) for size in self.sizes]  # groups of each share
        spare = _spare_groups(sum(self.counts), limit // self.each, device_of(prior).type)
        texts, uniforms = [], []
        for share, count in zip(shares, self.counts, strict=True):
            text = model.tokenizer.encode(share.caption)
            texts += [text] * count
            first, drawn = share.candidates.start, count * self.each
            numbers = candidate_uniforms(share.seed, share.caption, first, drawn, length)
            uniforms.append(rearrange(numbers, "(c b) m -> c b m", b=self.each))
        texts += texts[-1:] * spare
        uniforms += [uniforms[-1][-1:]] * spare
        self.text = torch.cat(texts)  # int64 [c, t]
        self.uniforms = torch.cat(uniforms)  # float64 [c, b, m]

    def split(self, tokens: Tensor) -> list[Tensor]:
        """Tokens [c, b, m] as those of each share, [candidates, m]."""
        parts = tokens[: sum(self.counts)].split(self.counts)
        return [part.flatten(0, 1)[:size] for part, size in zip(parts, self.sizes, strict=True)]


def group_size(sizes: Sequence[int], limit: int, length: int, text_length: int) -> int:
    """Candidates of a group: as many as make the fewest positions to be computed.

    Larger groups have more candidates that are dropped, smaller ones read a caption more often.

    Args:
        sizes: candidates of each share.
        limit: candidates at once, those that are dropped included.
        length: image positions.
        text_length: text positions.
    """

    def cost(each: int) -> tuple[int, int]:
        groups = sum(ceil(size / each) for size in sizes)
        return groups * (each * length + text_length), groups

    fitting = [b for b in range(1, max(sizes) + 1) if sum(ceil(s / b) for s in sizes) * b <= limit]
    return min(fitting, key=cost)


def _spare_groups(count: int, most: int, device: str) -> int:
    """Groups to add: on CUDA up to a power of two, so that few shapes are captured as graphs."""
    if device != "cuda":
        return 0
    return min(most, 1 << (count - 1).bit_length()) - count

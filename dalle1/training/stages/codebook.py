"""The codebook of a VQGAN in training: how often codes are used, and what moves them but gradients.

Dimensions: k codes, d numbers of a vector, n vectors of a rank, m dead codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dalle1.training import distributed
from dalle1.training.vqgan_config import CodebookSettings
from dvae.vqgan.codebook import (
    count_tokens,
    moved_codes,
    perplexity,
    revival_keys,
    sum_vectors,
)
from dvae.vqgan.config import VQGANConfig
from dvae.vqgan.quantizers import NearestQuantizer


class Codebook(nn.Module):
    """Counts what the passes of an update have used, and moves codes once it is done.

    Its buffers are state, the same on all ranks. What is counted is of all ranks' images, so that
    the codebook does not depend on how they divide a batch.
    """

    idle: Tensor  # int64 [k]: updates since each code was used
    mass: Tensor  # float32 [k]: the running mean of its uses in an update

    def __init__(
        self, shape: VQGANConfig, settings: CodebookSettings, positions: int, frozen: bool = False
    ) -> None:
        """positions: tokens of an update, of which codes begin with equal shares as their mean use;
        frozen: whether codes stay where they are."""
        super().__init__()
        k = shape.codebook_size
        self.settings = settings
        self.frozen = frozen
        self.register_buffer("idle", torch.zeros(k, dtype=torch.int64))
        if settings.ema_decay is not None:
            self.register_buffer("mass", torch.full((k,), positions / k))
        self._start_mass = positions / k
        self._k = k
        self._counts: Tensor | None = None  # of an update; None: it has looked nothing up
        self._sums: Tensor | None = None
        self._candidates: list[tuple[Tensor, Tensor]] = []  # keys [n], vectors [n, d]
        self._since_log = torch.zeros(k)

    def _due(self, step: int) -> bool:
        """Whether dead codes are revived after update `step`."""
        every = self.settings.revive_every
        return every is not None and not self.frozen and (step + 1) % every == 0

    @torch.no_grad()
    def observe(
        self,
        quantize: NearestQuantizer,
        latents: Tensor,
        tokens: Tensor,
        step: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        """Takes in one pass of update `step`.

        Args:
            quantize: the quantizer, with its weights of this pass.
            latents: what it has read, [b, d, h, w].
            tokens: what it has found, int64 [b, h, w].
            step: number of the update.
            generators: one of each image, so that draws do not depend on how a batch is divided.
        """
        z = F.normalize(latents.float(), dim=1) if quantize.normalized else latents.float()
        rows, flat = rearrange(z, "b d h w -> (b h w) d"), tokens.flatten()
        k, counts = self._k, count_tokens(flat, self._k)
        self._counts = counts if self._counts is None else self._counts + counts
        if self.settings.ema_decay is not None and not self.frozen:
            sums = sum_vectors(flat, rows, k)
            self._sums = sums if self._sums is None else self._sums + sums
        if self._due(step):
            errors = (z - quantize.vectors(tokens).float()).square().sum(dim=1).flatten(1)
            keys = [revival_keys(e, own) for e, own in zip(errors, generators, strict=True)]
            self._candidates.append((torch.cat(keys), rows))

    @torch.no_grad()
    def after_update(self, step: int, done: bool, read: Callable[[], Tensor]) -> Tensor | None:
        """The codes [k, d] after update `step`, where they have moved; all ranks call it.

        Args:
            step: number of the update.
            done: whether it was done; one that was skipped leaves no trace.
            read: gives the present codes, [k, d].
        """
        counts, sums, candidates = self._counts, self._sums, self._candidates
        self._counts, self._sums, self._candidates = None, None, []
        if counts is None or not done:
            return None
        counts = distributed.sum_of(counts)
        self._since_log = self._since_log.to(counts.device) + counts
        self.idle.copy_(torch.where(counts > 0, 0, self.idle + 1))
        codes: Tensor | None = None
        if sums is not None:
            assert self.settings.ema_decay is not None
            moved = (counts, distributed.sum_of(sums), self.settings.ema_decay)
            codes, mass = moved_codes(read(), self.mass, *moved)
            self.mass.copy_(mass)
        if self._due(step):
            dead = (self.idle >= (self.settings.revive_every or 0)).nonzero()[:, 0]
            if len(dead):
                codes = read() if codes is None else codes
                vectors = _drawn(candidates, len(dead))
                codes = codes.index_copy(0, dead[: len(vectors)], vectors)
                self._begin(dead[: len(vectors)])
        return codes

    def _begin(self, revived: Tensor) -> None:
        """Counts codes as if they had been used as often as others."""
        self.idle[revived] = 0
        if self.settings.ema_decay is not None:
            self.mass[revived] = self._start_mass

    def pop_metrics(self) -> dict[str, float]:
        """Of the updates since the last call: codes that were used, and the codes' perplexity."""
        counts = self._since_log
        self._since_log = torch.zeros_like(counts)
        if not bool(counts.any()):
            return {}
        return {
            "codes_used": float((counts > 0).sum()),
            "codes_perplexity": float(perplexity(counts)),
        }


def _drawn(candidates: Sequence[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """The vectors with the `count` smallest keys of all ranks, fewer where no more have an error.

    Every rank gives as many candidates. The result is the same however they are divided.
    """
    keys = torch.cat([keys for keys, _ in candidates])
    rows = torch.cat([rows for _, rows in candidates])
    mine = keys.argsort()[:count]  # more of one rank are never taken
    everyone = distributed.all_gather(keys[mine][:, None])[:, 0]
    taken = everyone.argsort()[:count]
    taken = taken[everyone[taken].isfinite()]
    vectors = rows.new_zeros(len(taken), rows.shape[1])
    own = taken // len(mine) == distributed.rank()
    vectors[own] = rows[mine[taken[own] % len(mine)]]
    return distributed.sum_of(vectors)

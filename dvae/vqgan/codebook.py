"""What becomes of a codebook beside its gradients: running means of vectors, and dead codes.

Dimensions: k codes, d numbers of a vector, n vectors. Pure functions: the same numbers on all ranks
give the same codebook.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_tokens(tokens: Tensor, codes: int) -> Tensor:
    """How often each code is used, float32 [k], by tokens, int64 of any shape."""
    ones = torch.ones(tokens.numel(), device=tokens.device)
    # Not bincount, for which a GPU would tell its largest token and the host wait.
    return torch.zeros(codes, device=tokens.device).index_add_(0, tokens.flatten(), ones)


def sum_vectors(tokens: Tensor, vectors: Tensor, codes: int) -> Tensor:
    """The sum of each code's vectors, float32 [k, d]; vectors [n, d], their tokens int64 [n]."""
    sums = torch.zeros(codes, vectors.shape[1], device=vectors.device)
    return sums.index_add_(0, tokens, vectors.float())


def moved_codes(
    codes: Tensor, mass: Tensor, counts: Tensor, sums: Tensor, decay: float
) -> tuple[Tensor, Tensor]:
    """A codebook that follows the means of its vectors, in place of the codebook's loss.

    It is that of van den Oord et al. (2017, appendix A.1): N <- decay N + (1 - decay) n, m <-
    decay m + (1 - decay) (sum of the n vectors), e = m / N. Since m = N e, only N is kept.

    Args:
        codes: e, float32 [k, d].
        mass: N, float32 [k].
        counts: n of the update's vectors, float32 [k].
        sums: of these vectors, float32 [k, d].
        decay: share of the former mass that stays.

    Returns:
        The new codes and the new mass. A code without vectors stays where it is.
    """
    new_mass = decay * mass + (1 - decay) * counts
    share = (1 - decay) * counts / new_mass.clamp(min=torch.finfo(mass.dtype).tiny)
    means = sums / counts.clamp(min=1)[:, None]
    moved = torch.lerp(codes, means, share.clamp(max=1)[:, None])
    return torch.where(counts[:, None] > 0, moved, codes), new_mass


def revival_keys(errors: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of which the smallest are the vectors that dead codes are moved to, float32 [n].

    The m smallest are a draw without replacement in proportion to the errors. So codes go where
    they are missed, as in k-means++, and not where most vectors are.

    Args:
        errors: squared distance of each vector to its code, float32 [n].
        generator: of the draw.
    """
    waits = torch.empty_like(errors).exponential_(generator=generator)
    return waits / errors  # infinite where a code is met already


def perplexity(counts: Tensor) -> Tensor:
    """How many codes, equally often used, would have the entropy of these counts [k]."""
    shares = counts / counts.sum().clamp(min=1)
    effective: Tensor = torch.special.entr(shares).sum().exp()
    return effective

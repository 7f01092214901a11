"""What ranking gains (paper section 2.6, figure 6): the best of N candidates, exactly.

Dimensions: m candidates, of which n are chosen among.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def best_of_n(scores: Tensor, values: Tensor, n: int) -> float:
    """Mean value of the best-scored of n candidates, over all n-subsets of the m given.

    Exact: in descending order of scores the k-th (k = 0 ...) is the best of C(m - 1 - k, n - 1) of
    the C(m, n) subsets. Candidates of equal scores share: where several are the best of a subset,
    each of them is taken equally often. By symmetry they then have the same weight, the mean of
    the weights of their places, and so each counts with the mean of their values.

    Args:
        scores: [m].
        values: [m], what is averaged: whether each is right, or the scores themselves.

    Raises:
        ValueError: n is not in 1 ... m, the two differ in length, or a score is NaN.
    """
    m = len(scores)
    _check_count(n, m)
    if len(values) != m:
        raise ValueError(f"values: expected one of each of {m} scores, got {len(values)}")
    if bool(scores.isnan().any()):
        raise ValueError(f"scores: expected numbers, got {int(scores.isnan().sum())} NaN of {m}")
    _, equals, counts = scores.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, equals, values.double())
    shared = (sums / counts)[equals]  # [m]
    return float(shared[scores.argsort(descending=True)] @ _weights(m, n))


@lru_cache(maxsize=64)  # of a benchmark, there are as many as points of a curve
def _weights(m: int, n: int) -> Tensor:
    """The share of subsets of which the k-th of m is the best of n, float64 [m]."""
    total = math.comb(m, n)
    shares = [math.comb(m - 1 - k, n - 1) / total for k in range(m)]
    return torch.tensor(shares, dtype=torch.float64)


def oracle_of_n(correct: Tensor, n: int) -> float:
    """Chance that at least one of n candidates is right, over all n-subsets of the m given.

    This is what a perfect ranker would reach.

    Args:
        correct: [m], whether each is right.

    Raises:
        ValueError: n is not in 1 ... m.
    """
    m, wrong = len(correct), int((~correct.bool()).sum())
    _check_count(n, m)
    return 1 - math.comb(wrong, n) / math.comb(m, n)


def candidate_counts(candidates: int) -> list[int]:
    """The N of a curve's points: 1, 2, 4 ... and `candidates`."""
    return sorted({*(2**i for i in range(candidates.bit_length())), candidates})


def _check_count(n: int, m: int) -> None:
    if not 1 <= n <= m:
        raise ValueError(f"n: expected 1 to {m} candidates, got {n}")

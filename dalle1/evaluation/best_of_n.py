"""What ranking gains (paper section 2.6, figure 6): the best of N candidates, exactly.

Dimensions: m candidates, of which n are chosen among.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    if len(values) != len(scores):
        raise ValueError(f"values: expected one of each of {len(scores)} scores, got {len(values)}")
    return float(_shares(scores, n) @ values.double())


@dataclass(frozen=True)
class Judged:
    """Which of a caption's candidates are judged: the ranker's best, and some of the others."""

    best: list[int]
    others: list[int]

    @property
    def all(self) -> list[int]:
        """Their numbers."""
        return self.best + self.others


def choose_judged(scores: Tensor, limit: int | None) -> Judged:
    """The candidates that are judged where at most `limit` are: half are the ranker's best, half
    are the first of the others, which are as good as any, as candidates are drawn alike.

    Args:
        scores: [m].
        limit: None: all are judged, and count as the best.
    """
    order = scores.argsort(descending=True, stable=True).tolist()
    if limit is None or limit >= len(order):
        return Judged(order, [])
    best = order[: -(-limit // 2)]
    return Judged(best, sorted(order[len(best) :])[: limit - len(best)])


def estimate_best_of_n(scores: Tensor, values: Tensor, n: int, judged: Judged) -> float:
    """`best_of_n` where the values of some candidates alone are known.

    The best count as they do there. What is left of the weights goes to the others, in the ratio of
    theirs. With n = 1, where all weights are equal, the expected estimate is the mean of all; with
    n = m it is exact. Candidates of equal scores do not share, since some of them are not judged:
    the first counts as the better one, which it is by chance.

    Args:
        scores: [m].
        values: [m], of which those of `judged` are read.
        n: as in `best_of_n`.
        judged: see `choose_judged`.
    """
    if len(judged.best) == len(scores):
        return best_of_n(scores, values, n)
    shares, known = _unshared(scores, n), values.double()
    sure = float(shares[judged.best] @ known[judged.best])
    rest = 1 - float(shares[judged.best].sum())
    if not judged.others or rest <= 0:
        return sure
    weights = shares[judged.others]
    if not bool(weights.any()):
        weights = torch.ones_like(weights)
    return sure + rest * float(weights @ known[judged.others] / weights.sum())


def _shares(scores: Tensor, n: int) -> Tensor:
    """The share of n-subsets of which each candidate is the best; equals share: float64 [m]."""
    weights = _unshared(scores, n)
    _, equals, counts = scores.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, equals, weights)
    shares: Tensor = (sums / counts)[equals]
    return shares


def _unshared(scores: Tensor, n: int) -> Tensor:
    """As `_shares`, the first of equals being the better one."""
    m = len(scores)
    _check_count(n, m)
    if bool(scores.isnan().any()):
        raise ValueError(f"scores: expected numbers, got {int(scores.isnan().sum())} NaN of {m}")
    weights = torch.empty(m, dtype=torch.float64)
    weights[scores.argsort(descending=True, stable=True)] = _weights(m, n)
    return weights


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

"""What ranking gains (paper section 2.6, figure 6): the best of N candidates, exactly.

Dimensions: m candidates, of which n are chosen among.
"""

from __future__ import annotations

import math

from torch import Tensor


def best_of_n(scores: Tensor, values: Tensor, n: int) -> float:
    """Mean value of the best-scored of n candidates, over all n-subsets of the m given.

    Exact: in descending order of scores the k-th (k = 0 ...) is the best of C(m - 1 - k, n - 1) of
    the C(m, n) subsets.

    Args:
        scores: [m].
        values: [m], what is averaged: whether each is right, or the scores themselves.

    Raises:
        ValueError: n is not in 1 ... m.
    """
    m = len(scores)
    _check_count(n, m)
    ordered: list[float] = values[scores.argsort(descending=True, stable=True)].tolist()
    total = math.comb(m, n)
    return sum(math.comb(m - 1 - k, n - 1) / total * v for k, v in enumerate(ordered) if v)


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

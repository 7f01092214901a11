"""What ranking gains (paper section 2.6, figure 6): the best of N candidates, exactly.

Dimensions: m candidates, of which n are chosen among.
"""

from __future__ import annotations

import math

from torch import Tensor


def best_of_n(scores: Tensor, values: Tensor, n: int) -> float:
    """Mean value of the best-scored of n candidates, over all n-subsets of those given.

    scores: [m]; values: [m], whether each is right, or the scores themselves; 1 <= n <= m. Exact:
    in descending order the k-th (k = 0 ...) is the best of C(m - 1 - k, n - 1) of the C(m, n)
    subsets.
    """
    m = len(scores)
    _check_count(n, m)
    ordered: list[float] = values[scores.argsort(descending=True, stable=True)].tolist()
    total = math.comb(m, n)
    return sum(math.comb(m - 1 - k, n - 1) / total * v for k, v in enumerate(ordered) if v)


def oracle_of_n(correct: Tensor, n: int) -> float:
    """Chance that at least one of n candidates is right, over all n-subsets: what a perfect
    ranking would reach."""
    m, wrong = len(correct), int((~correct.bool()).sum())
    _check_count(n, m)
    return 1 - math.comb(wrong, n) / math.comb(m, n)


def counts(most: int) -> list[int]:
    """1, 2, 4 ... and `most`: the numbers of candidates that a curve is drawn for."""
    return sorted({*(2**i for i in range(most.bit_length())), most})


def _check_count(n: int, m: int) -> None:
    if not 1 <= n <= m:
        raise ValueError(f"n: expected 1 to {m} candidates, got {n}")

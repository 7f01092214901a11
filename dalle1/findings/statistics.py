"""Means over a few seeds with t-intervals, and differences between arms, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. low, high: its 95 % t-interval; None of a single seed."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.high is None else self.high - self.mean

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of 0; 0 where it does not, or there is none.

        Differences of 0 in all seeds have an interval of one point, and the sign 0.
        """
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values, one a seed, with Student's interval.

    Raises ValueError where there is none or one is not finite.
    """
    n = len(values)
    if not n or not all(map(math.isfinite, values)):
        raise ValueError(f"values: expected finite numbers, got {list(values)}; measure them again")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = t_quantile(n - 1, (1 + CONFIDENCE) / 2) * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Ours - theirs over the seeds that both have; None where they share none.

    A seed gives both arms the same initial weights and order of data, so that the differences vary
    less than the values.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    return estimate([ours[s] - theirs[s] for s in seeds]) if seeds else None


def t_quantile(freedom: int, probability: float) -> float:
    """The quantile of Student's t with so many degrees of freedom; probability in (0.5, 1)."""
    low, high = 0.0, 1.0
    while t_probability(freedom, high) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if t_probability(freedom, middle) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def t_probability(freedom: int, t: float) -> float:
    """P(T <= t), t >= 0: the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    first = 3 if freedom % 2 else 2  # of the factors (first - 1) / first cos^2, ...
    term = total = cosine if freedom % 2 else 1.0
    for k in range(first, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    if freedom % 2:
        inside = 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))
    else:
        inside = sine * total
    return (1 + inside) / 2

"""Means, intervals and differences over seeds."""

from __future__ import annotations

import math

import pytest
import torch

from dalle1.findings.statistics import difference, estimate, t_probability, t_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (9, 2.262157), (30, 2.042272)],
)
def test_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    """Intervals of a normal distribution, less than half as wide with three seeds."""
    assert t_quantile(freedom, 0.975) == pytest.approx(quantile, rel=1e-6)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8])
def test_probability_is_the_integral_of_the_density(freedom: int) -> None:
    """A series for odd degrees of freedom taken for even ones."""
    t = torch.linspace(0, 2.5, 20_001, dtype=torch.float64)
    constant = math.gamma((freedom + 1) / 2) / (
        math.sqrt(freedom * math.pi) * math.gamma(freedom / 2)
    )
    density = constant * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    integral = torch.trapezoid(density, t).item()
    assert t_probability(freedom, 2.5) == pytest.approx(0.5 + integral, abs=1e-7)


def test_interval_of_three_seeds() -> None:
    """A deviation over n, or an interval of the values in place of their mean's."""
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # deviation 1
    assert found.low is not None and found.low < 0 and found.sign == 0


def test_one_seed_has_no_interval() -> None:
    """A single run that decides a claim."""
    found = estimate([5.0])
    assert (found.low, found.high, found.half, found.sign) == (None, None, None, 0)


def test_difference_is_paired_by_seed() -> None:
    """Values of different seeds that are compared; seeds that only one arm has counted in."""
    ours, theirs = {0: 1.1, 1: 5.1, 2: 9.11, 7: 100.0}, {2: 9.0, 1: 5.0, 0: 1.0}
    found = difference(ours, theirs)
    assert found is not None and found.count == 3 and found.sign == 1
    assert found.mean == pytest.approx(0.31 / 3)
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_equal_arms_do_not_differ() -> None:
    """An interval of one point at 0 taken for a difference."""
    found = difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert found is not None and (found.mean, found.half, found.sign) == (0, 0, 0)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_what_is_no_number_is_refused(values: list[float]) -> None:
    """A table of nan after hours of runs."""
    with pytest.raises(ValueError, match="values: expected finite numbers"):
        estimate(values)

"""Ranking: the exact curves against enumeration, the scores against CLIP itself."""

from __future__ import annotations

import itertools

import pytest
import torch

from dalle1.evaluation.best_of_n import best_of_n, oracle_of_n


@pytest.mark.parametrize("seed", range(4))
def test_curves_against_enumeration(seed: int) -> None:
    """A curve that draws with replacement, ranks upside down or forgets an order."""
    g = torch.Generator().manual_seed(seed)
    scores, correct = torch.rand(7, generator=g), torch.rand(7, generator=g) < 0.4
    for n in range(1, 8):
        subsets = list(itertools.combinations(range(7), n))
        best = [bool(correct[max(s, key=lambda i: float(scores[i]))]) for s in subsets]
        some = [any(bool(correct[i]) for i in s) for s in subsets]
        assert best_of_n(scores, correct, n) == pytest.approx(sum(best) / len(subsets))
        assert oracle_of_n(correct, n) == pytest.approx(sum(some) / len(subsets))


@pytest.mark.parametrize(
    ("scores", "values"),
    [
        ([0.5, 0.5, 0.5, 0.1], [1, 0, 0, 1]),
        ([0.0, -0.0, 1.0, 1.0, 1.0], [3, 1, 0, 5, 1]),  # both zeros are one score
        ([2, 2, 1, 1, 1, 0], [1, 0, 0, 1, 0, 1]),
        ([7.0] * 5, [1, 0, 0, 0, 0]),
    ],
)
def test_equal_scores_share(scores: list[float], values: list[float]) -> None:
    """A figure that depends on the order of candidates that the ranker cannot tell apart."""
    m = len(scores)
    for n in range(1, m + 1):
        means = []
        for subset in itertools.combinations(range(m), n):
            top = max(scores[i] for i in subset)
            best = [values[i] for i in subset if scores[i] == top]
            means.append(sum(best) / len(best))
        for order in list(itertools.permutations(range(m)))[::11]:
            some = (
                torch.tensor([scores[i] for i in order]),
                torch.tensor([values[i] for i in order]),
            )
            assert best_of_n(*some, n) == pytest.approx(sum(means) / len(means))


def test_scores_that_are_no_numbers() -> None:
    """NaN that is sorted in front and so counts as the best score."""
    scores = torch.tensor([0.3, float("nan"), 0.1])
    with pytest.raises(ValueError, match="scores: expected numbers, got 1 NaN of 3"):
        best_of_n(scores, torch.ones(3), 2)
    with pytest.raises(ValueError, match="values: expected one of each of 3 scores, got 2"):
        best_of_n(torch.rand(3), torch.ones(2), 2)


def test_curve_ends() -> None:
    """A curve off by one: at n = 1 the mean, at n = m the best-scored alone."""
    scores = torch.tensor([0.1, 0.9, 0.5, 0.2])
    correct = torch.tensor([True, False, True, True])
    assert best_of_n(scores, correct, 1) == pytest.approx(0.75)
    assert best_of_n(scores, correct, 4) == 0
    assert oracle_of_n(correct, 1) == pytest.approx(0.75)
    assert oracle_of_n(correct, 2) == 1
    assert oracle_of_n(torch.tensor([False] * 3), 3) == 0
    # At the paper's 512 candidates the binomials are beyond a float; their ratios are not.
    scores = torch.arange(512.0)
    assert best_of_n(scores, scores >= 256, 256) == pytest.approx(1)
    assert best_of_n(scores, scores % 2 == 0, 512) == 0
    assert best_of_n(scores, scores == 511, 32) == pytest.approx(32 / 512)
    assert oracle_of_n(scores == 3, 32) == pytest.approx(32 / 512)


@pytest.mark.parametrize("n", [0, -1, 5])
def test_curve_errors(n: int) -> None:
    """More candidates asked for than there are, answered with a division by zero or a 0."""
    correct = torch.tensor([True, False, True, True])
    with pytest.raises(ValueError, match=f"1 to 4 candidates, got {n}"):
        best_of_n(torch.rand(4), correct, n)
    with pytest.raises(ValueError, match=f"1 to 4 candidates, got {n}"):
        oracle_of_n(correct, n)

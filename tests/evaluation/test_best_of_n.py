"""Ranking: the exact curves against enumeration, the scores against CLIP itself."""

from __future__ import annotations

import itertools

import pytest
import torch

from dalle1.evaluation.best_of_n import (
    best_of_n,
    choose_judged,
    estimate_best_of_n,
    oracle_of_n,
)


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


@pytest.mark.parametrize("limit", [2, 3, 5, 7, 9])
def test_an_estimate_from_a_few_judged_candidates(limit: int) -> None:
    """Weights of others' places, a rest that is counted twice or left out, or values read that
    nobody judged."""
    g = torch.Generator().manual_seed(limit)
    scores, correct = torch.rand(7, generator=g).round(decimals=1), torch.rand(7, generator=g) < 0.5
    judged = choose_judged(scores, limit)
    order = scores.argsort(descending=True, stable=True).tolist()
    if limit >= 7:
        assert judged.best == order and not judged.others
    else:
        assert judged.best == order[: (limit + 1) // 2] and len(judged.all) == limit
        left = [i for i in range(7) if i not in judged.best]
        assert judged.others == left[: limit // 2]
    values = correct.double()
    unknown = [i for i in range(7) if i not in judged.all]
    hidden = values.index_fill(0, torch.tensor(unknown, dtype=torch.long), torch.nan)
    for n in range(1, 8):
        found = estimate_best_of_n(scores, hidden, n, judged)
        assert 0 <= found <= 1 + 1e-12
        # Without equals: the first of them is the better one.
        apart = scores - 1e-4 * torch.arange(7)
        compared = scores if limit >= 7 else apart
        shares = torch.tensor([best_of_n(compared, torch.eye(7)[i], n) for i in range(7)]).double()
        sure = float(shares[judged.best] @ values[judged.best])
        rest = 1 - float(shares[judged.best].sum())
        if rest > 1e-9:
            part = shares[judged.others]
            part = part if float(part.sum()) > 0 else torch.ones(len(part)).double()
            sure += rest * float((part * values[judged.others]).sum() / part.sum())
        assert found == pytest.approx(sure, abs=1e-6)
        if limit >= 7:
            assert found == pytest.approx(best_of_n(scores, correct, n))
        elif n == 7:
            assert found == float(correct[order[0]])


def test_the_estimate_of_a_single_draw_has_no_bias() -> None:
    """A share of single draws that leans towards the ranker's best: over all orders in which the
    candidates may have been drawn, the mean of the estimates is the share of all."""
    scores, values = torch.tensor([3.0, 1, 2, 5, 4]), torch.tensor([1.0, 0, 0, 1, 0])
    found = []
    for order in itertools.permutations(range(5)):
        s, v = scores[list(order)], values[list(order)]
        found.append(estimate_best_of_n(s, v, 1, choose_judged(s, 3)))
    assert sum(found) / len(found) == pytest.approx(float(values.mean()))

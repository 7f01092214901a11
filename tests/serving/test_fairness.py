"""How a batch is shared: nobody starves, no place stays empty."""

from __future__ import annotations

import random

import pytest

from dalle1.serving.fairness import fair_shares


@pytest.mark.parametrize(
    ("wanted", "places", "expected"),
    [
        ([500], 64, [63]),  # eight parts of about equal size
        ([10], 64, [10]),
        ([500, 4], 64, [60, 4]),
        ([500, 500], 64, [32, 32]),
        ([1, 2, 3, 100], 8, [1, 2, 3, 2]),
        ([5] * 4, 3, [1, 1, 1, 0]),
    ],
)
def test_examples(wanted: list[int], places: int, expected: list[int]) -> None:
    """A huge request that takes all places, or places that nobody gets."""
    assert fair_shares(wanted, places) == expected


def test_shares_are_fair() -> None:
    """Whoever wants more than they get has at least as many as everybody else, up to one place."""
    numbers = random.Random(0)
    for _ in range(300):
        wanted = [numbers.randint(1, 40) for _ in range(numbers.randint(2, 9))]
        places = numbers.randint(1, 60)
        given = fair_shares(wanted, places)
        assert sum(given) == min(places, sum(wanted))
        assert all(0 <= g <= w for g, w in zip(given, wanted, strict=True))
        hungry = [g for g, w in zip(given, wanted, strict=True) if g < w]
        if hungry:
            assert min(hungry) >= max(given) - 1
        if places >= len(wanted):
            assert min(given) >= 1

"""A codebook that follows running means, and codes that are revived."""

from __future__ import annotations

import pytest
import torch

from dvae.vqgan.codebook import (
    count_tokens,
    moved_codes,
    perplexity,
    revival_keys,
    sum_vectors,
)


def test_counts_and_sums_by_hand() -> None:
    """A code's vectors counted for another."""
    tokens, vectors = torch.tensor([3, 0, 3]), torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    assert count_tokens(tokens.view(1, 1, 3), 4).tolist() == [1, 0, 0, 2]
    assert sum_vectors(tokens, vectors, 4).tolist() == [[3, 4], [0, 0], [0, 0], [6, 8]]


def test_running_means_are_those_of_the_paper() -> None:
    """A codebook that differs from N, m and e = m / N of van den Oord et al. (2017, appendix A.1),
    all three of them kept, over many updates."""
    torch.manual_seed(0)
    k, d, decay = 5, 3, 0.9
    codes, mass = torch.randn(k, d), torch.full((k,), 1.6)
    n, m = mass.double(), (mass[:, None] * codes).double()
    for _ in range(40):
        vectors, tokens = torch.randn(8, d), torch.randint(0, k - 1, (8,))  # the last is never used
        last = codes[-1].clone()
        codes, mass = moved_codes(
            codes, mass, count_tokens(tokens, k), sum_vectors(tokens, vectors, k), decay
        )
        for j in range(k):
            mine = vectors[tokens == j].double()
            n[j] = decay * n[j] + (1 - decay) * len(mine)
            m[j] = decay * m[j] + (1 - decay) * mine.sum(0)
        torch.testing.assert_close(codes.double(), m / n[:, None], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mass.double(), n, rtol=1e-5, atol=1e-6)
        assert torch.equal(codes[-1], last)  # to the bit: a code without vectors stays


def test_a_code_that_is_never_used_stays_a_number() -> None:
    """0 / 0 once its mass has become too small for float32."""
    codes, mass = torch.ones(1, 2), torch.ones(1)
    for _ in range(300):
        codes, mass = moved_codes(codes, mass, torch.zeros(1), torch.zeros(1, 2), 0.5)
    assert float(mass) == 0 and torch.equal(codes, torch.ones(1, 2))
    codes, _ = moved_codes(codes, mass, torch.ones(1), torch.full((1, 2), 3.0), 0.5)
    assert torch.equal(codes, torch.full((1, 2), 3.0))


def test_revived_codes_are_drawn_by_error() -> None:
    """Codes that are all put where most vectors are, on the background; vectors that a code meets
    already; a draw that the seed does not fix."""
    errors = torch.tensor([1.0, 0.0, 3.0, 4.0])
    first = torch.zeros(4)
    for seed in range(4000):
        keys = revival_keys(errors, torch.Generator().manual_seed(seed))
        first[keys.argmin()] += 1
        assert keys[1] == torch.inf
    assert first[1] == 0
    torch.testing.assert_close(first / 4000, errors / 8, rtol=0.15, atol=0)
    again = revival_keys(errors, torch.Generator().manual_seed(7))
    assert torch.equal(again, revival_keys(errors, torch.Generator().manual_seed(7)))


@pytest.mark.parametrize(("counts", "expected"), [([4, 4, 4, 4], 4), ([9, 0, 0, 0], 1)])
def test_perplexity(counts: list[int], expected: float) -> None:
    """Bits in place of nats, or NaN for a code that is not used."""
    assert float(perplexity(torch.tensor(counts).float())) == pytest.approx(expected)

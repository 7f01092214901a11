"""The chunked cross-entropy against torch's own in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle1.transformer import loss as module
from dalle1.transformer.loss import IGNORED, linear_cross_entropy

N, WIDTH, VOCAB = 23, 6, 11


@pytest.fixture
def head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCAB)


def inputs() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    targets = torch.randint(VOCAB, (N,), generator=g)
    targets[[0, 4, 22]] = IGNORED
    return 3 * torch.randn(N, WIDTH, generator=g), targets


@pytest.mark.parametrize("chunk", [1, 5, 23, 512])
def test_equal_to_cross_entropy(
    head: nn.Linear, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ignored positions in the divisor, a last chunk lost, a gradient not scaled from above."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    states, targets = inputs()
    states.requires_grad_()
    loss = linear_cross_entropy(states, head, targets)
    (0.3 * loss).backward()
    exact = nn.Linear(WIDTH, VOCAB).double()
    exact.load_state_dict(head.state_dict())
    reference = states.detach().double().requires_grad_()
    expected = F.cross_entropy(exact(reference), targets, ignore_index=IGNORED)
    (0.3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    pairs = [(states, reference), (head.weight, exact.weight), (head.bias, exact.bias)]
    for own, other in pairs:
        assert own.grad is not None and other.grad is not None
        torch.testing.assert_close(own.grad.double(), other.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(
    head: nn.Linear, mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation that pays for gradients, or fails without them."""
    states, targets = inputs()
    with mode():
        expected = F.cross_entropy(head(states), targets, ignore_index=IGNORED)
        monkeypatch.setattr(torch, "mm", None)  # only gradients need a product of their own
        loss = linear_cross_entropy(states, head, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits or their gradients in 16 bits: shares of 1 / n vanish, sums over chunks are rounded
    chunk by chunk, a loss scale overflows."""
    monkeypatch.setattr(module, "CHUNK", 64)
    g = torch.Generator().manual_seed(2)
    head = nn.Linear(WIDTH, VOCAB).to(dtype)
    states = torch.randn(4096, WIDTH, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (4096,), generator=g)
    exact = nn.Linear(WIDTH, VOCAB).double()
    exact.load_state_dict(head.state_dict())
    reference = states.detach().double().requires_grad_()
    scale = 2.0**16
    expected = F.cross_entropy(exact(reference), targets)
    (scale * expected).backward()
    loss = linear_cross_entropy(states, head, targets)
    (scale * loss).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for own, other in ((states, reference), (head.weight, exact.weight), (head.bias, exact.bias)):
        assert own.grad is not None and other.grad is not None and own.grad.dtype == dtype
        error = (own.grad.double() - other.grad).norm() / other.grad.norm()
        assert float(error) < (4e-3 if dtype == torch.bfloat16 else 5e-4)


def test_autocast_leaves_the_logits_alone(head: nn.Linear) -> None:
    """Logits that autocast computes in 16 bits (section 2.4: they stay in 32)."""
    states, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(states, head, targets)
    torch.testing.assert_close(loss, F.cross_entropy(head(states), targets), rtol=1e-6, atol=0)


def test_logits_are_not_kept(head: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of all positions that wait in memory for the backward pass."""
    monkeypatch.setattr(module, "CHUNK", 4)
    kept: list[Tensor] = []
    states, targets = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear_cross_entropy(states.requires_grad_(), head, targets)
    assert sorted(x.numel() for x in kept) == sorted([N * WIDTH, VOCAB * WIDTH, VOCAB])

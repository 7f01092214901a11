"""Attention in bfloat16 on CPUs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle1.common.attention import attend_widened


def noted(seen: list[torch.dtype]) -> object:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v)
        seen.append(y.dtype)
        return y

    return attend


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_attends_in_32_bits(autocast: bool) -> None:
    """Thousands of small products in 16 bits; a result in another type than the queries; a
    gradient that is lost on the way, or rounded more than its inputs."""
    generator = torch.Generator().manual_seed(0)
    narrow = [
        torch.randn(2, 3, 17, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3)
    ]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    seen: list[torch.dtype] = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attend_widened(noted(seen), *narrow)  # type: ignore[arg-type]
    expected = F.scaled_dot_product_attention(*wide)
    assert found.dtype == torch.bfloat16
    assert seen == [torch.float32]
    torch.testing.assert_close(found.double(), expected, atol=0.01, rtol=2**-8)
    found.sum().backward()
    expected.sum().backward()
    for x, y in zip(narrow, wide, strict=True):
        assert x.grad is not None and y.grad is not None
        torch.testing.assert_close(x.grad.double(), y.grad, atol=0.01, rtol=2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_types_stay(dtype: torch.dtype) -> None:
    """Float64 of a test that is cut to 32 bits, or float16 whose gradient scales see nothing."""
    q, k, v = (torch.randn(1, 2, 5, 4).to(dtype) for _ in range(3))
    seen: list[torch.dtype] = []
    attend_widened(noted(seen), q, k, v)  # type: ignore[arg-type]
    assert seen == [dtype]

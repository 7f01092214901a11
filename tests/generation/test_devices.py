"""Devices without 64-bit numbers, such as Apple's GPUs (mps)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle1 import Model
from dalle1.common.hardware import largest_float
from dalle1.generation.generator import Generator, complete_text
from dalle1.generation.options import (
    SamplingOptions,
    candidate_uniforms,
    sample_token,
    uniforms_for,
)
from tests.conftest import TransformerMaker

TEXT = torch.tensor([[3, 1, 13, 14, 15, 16]])
GREEDY = SamplingOptions(temperature=0)


class WithoutDoubles(TorchDispatchMode):
    """A device without float64: what makes such a tensor fails, as on mps. Tensors that the host
    has made before, such as NumPy's random numbers, may be read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.dtype == torch.float64 and not func.is_view:
                raise TypeError(f"{func}: the device has no float64")
        return result


def test_the_largest_float_of_a_device() -> None:
    """A device that is asked for what it does not have."""
    assert largest_float(torch.device("cpu")) == torch.float64
    assert largest_float(torch.device("mps")) == torch.float32
    with WithoutDoubles():
        assert largest_float(torch.device("cpu")) == torch.float32
    assert largest_float(torch.device("cpu")) == torch.float64


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drawing_without_doubles(
    make_transformer: TransformerMaker, static: bool, guidance: float, temperature: float
) -> None:
    """Positions, caches or random numbers in 64 bits, which `--device mps` refuses."""
    transformer = make_transformer()
    options = SamplingOptions(temperature=temperature, guidance=guidance)
    uniforms, prefix = candidate_uniforms(0, "x", 0, 3, 16)[None], torch.tensor([1, 2, 3])
    expected = Generator(transformer, 1, 3, options, static).draw(TEXT, uniforms, prefix)
    with WithoutDoubles():
        generator = Generator(transformer, 1, 3, options, static)
        assert generator.uniforms.dtype == torch.float32
        assert torch.equal(generator.draw(TEXT, uniforms, prefix), expected)
        assert complete_text(transformer, [3], uniforms[0, 0, :6], GREEDY)[0] == 3


def test_a_whole_model_without_doubles(model: Model) -> None:
    """A codec, a ranker or a score in 64 bits."""
    images, tokens = torch.rand(2, 3, 8, 8), torch.zeros(2, 4, 4, dtype=torch.int64)
    calls: list[Callable[[], Tensor]] = [
        lambda: model.codec.encode(images),
        lambda: model.codec.decode(tokens),
        lambda: model.rank("a cat", images),
        lambda: model.log_prob("a cat", tokens),
    ]
    for call in calls:
        expected = call()
        with WithoutDoubles():
            assert torch.equal(call(), expected)


def test_numbers_that_round_to_one_draw_a_token() -> None:
    """A uniform number that 32 bits round to 1, for which there is no token."""
    last = torch.tensor([0.0, 0.5, 1 - 2**-30, 1 - 2**-53], dtype=torch.float64)
    assert torch.equal(uniforms_for(torch.device("cpu"), last), last)
    with WithoutDoubles():
        found = uniforms_for(torch.device("cpu"), last)
        assert found.dtype == torch.float32 and found.tolist() == [0, 0.5, 1, 1]
        for seed in range(50):  # totals on both sides of 1
            logits = torch.randn(1, 99, generator=torch.Generator().manual_seed(seed))
            logits = torch.cat([logits, torch.tensor([[-torch.inf]])], dim=1).expand(4, -1)
            assert max(sample_token(logits, found, SamplingOptions()).tolist()) == 98

"""Quantizers: which code is nearest, what is trained and which way gradients go."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dvae.vqgan import quantizers
from dvae.vqgan.config import VQGANConfig
from dvae.vqgan.quantizers import GumbelQuantizer, NearestQuantizer, codebook_loss

SIZES: dict[str, Any] = {"embedding_dim": 6, "codebook_size": 11}


@pytest.fixture
def nearest() -> NearestQuantizer:
    torch.manual_seed(0)
    quantizer = NearestQuantizer(VQGANConfig(**SIZES))
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer


@pytest.fixture
def gumbel() -> GumbelQuantizer:
    torch.manual_seed(0)
    return GumbelQuantizer(VQGANConfig(**SIZES, quantizer="gumbel"))


def test_codes_begin_small() -> None:
    """Codes that begin far outside of the encoder's vectors, of which most are then dead."""
    weight = NearestQuantizer(VQGANConfig(**SIZES)).embedding.weight
    assert weight.abs().max() <= 1 / 11 and weight.abs().max() > 0.5 / 11


@pytest.mark.parametrize("at_once", [1, 11, 22, 50, 2**24])
def test_parts_of_the_table_of_distances(
    nearest: NearestQuantizer, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Tokens that are out of order, or missing, where not all distances fit at once."""
    monkeypatch.setattr(quantizers, "LARGEST_TABLE", at_once)
    z = torch.randn(2, 6, 3, 5)
    distances = (z.movedim(1, -1)[..., None, :] - nearest.embedding.weight).square().sum(-1)
    assert torch.equal(nearest.tokens(z), distances.argmin(-1))


def test_memory_of_the_distances(
    nearest: NearestQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of all positions and codes: 4 GiB for 64 images of 1,024 positions and 16,384
    codes."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(quantizers, "LARGEST_TABLE", 400)
    with Watch():
        nearest.tokens(torch.randn(4, 6, 5, 5))  # 1,100 distances
    assert 300 < largest <= 600  # the vectors are 600 numbers


@pytest.mark.parametrize("kind", ["nearest", "gumbel"])
def test_autocast_does_not_change_tokens(kind: str, request: pytest.FixtureRequest) -> None:
    """Training in bfloat16 that looks codes up by distances of 8 bits, and so finds other tokens
    than `encode` does."""
    quantizer: NearestQuantizer | GumbelQuantizer = request.getfixturevalue(kind)
    z = torch.randn(4, 6, 32, 32)
    if isinstance(quantizer, NearestQuantizer):  # codes that are near one another
        torch.nn.init.normal_(quantizer.embedding.weight, 2.0, 0.2)
        z = 2 + 0.2 * z
    expected = quantizer.tokens(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.tokens(z), expected)
        if isinstance(quantizer, NearestQuantizer):
            assert torch.equal(quantizer(z).tokens, expected)


def test_the_first_of_equal_codes(nearest: NearestQuantizer) -> None:
    """A token that is the last of several equal codes, and so not the published one."""
    with torch.no_grad():
        nearest.embedding.weight[7] = nearest.embedding.weight[2]
        nearest.embedding.weight[9] = nearest.embedding.weight[2]
    z = nearest.embedding.weight[[9, 7, 2]].detach().t().reshape(1, 6, 1, 3)
    assert nearest.tokens(z).tolist() == [[[2, 2, 2]]]


def test_codes_of_length_1() -> None:
    """The length of a vector or of a code in a comparison of directions."""
    torch.manual_seed(0)
    quantizer = NearestQuantizer(VQGANConfig(**SIZES, normalized_codes=True))
    z = torch.randn(2, 6, 3, 5)
    cosines = torch.einsum(
        "bdhw,kd->bkhw", F.normalize(z, dim=1), F.normalize(quantizer.embedding.weight, dim=1)
    )
    tokens = quantizer.tokens(z)
    assert torch.equal(tokens, cosines.argmax(dim=1))
    assert torch.equal(quantizer.tokens(7 * z), tokens)
    torch.testing.assert_close(quantizer.vectors(tokens).norm(dim=1), torch.ones(2, 3, 5))
    torch.testing.assert_close(quantizer(z).vectors, quantizer.vectors(tokens))


def test_straight_through(nearest: NearestQuantizer) -> None:
    """A gradient that ends at the codes, or one that moves them by the decoder's loss."""
    z = torch.randn(2, 6, 3, 5, requires_grad=True)
    quantized = nearest(z)
    torch.testing.assert_close(quantized.vectors, nearest.vectors(quantized.tokens))
    pull = torch.randn_like(z)
    (quantized.vectors * pull).sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, pull)
    assert nearest.embedding.weight.grad is None


def test_losses_of_codes_and_of_vectors(nearest: NearestQuantizer) -> None:
    """The codebook's loss that moves the encoder, or the commitment that moves the codes."""
    z = torch.randn(1, 6, 1, 1, requires_grad=True)
    quantized = nearest(z)
    row = int(quantized.tokens)
    difference = (nearest.embedding.weight[row] - z.flatten()).detach()
    for loss in quantized.losses.values():
        torch.testing.assert_close(loss.detach(), difference.square().mean())
    quantized.losses["commitment"].backward(retain_graph=True)
    assert z.grad is not None and nearest.embedding.weight.grad is None
    torch.testing.assert_close(z.grad.flatten(), -2 * difference / 6)
    z.grad = None
    quantized.losses["codebook"].backward()
    assert z.grad is None and nearest.embedding.weight.grad is not None
    torch.testing.assert_close(nearest.embedding.weight.grad[row], 2 * difference / 6)


def test_beta_is_of_the_commitment(nearest: NearestQuantizer) -> None:
    """The published training's mistake, which weighs the codebook in place of the commitment."""
    for legacy in (False, True):
        z = torch.randn(1, 6, 1, 1, requires_grad=True)
        nearest.zero_grad()
        quantized = nearest(z)
        codebook_loss(quantized, beta=0.25, legacy=legacy).backward()
        assert z.grad is not None and nearest.embedding.weight.grad is not None
        ratio = z.grad.norm() / nearest.embedding.weight.grad.norm()
        torch.testing.assert_close(ratio, torch.tensor(4.0 if legacy else 0.25))


def test_gumbel_tokens_have_no_noise(gumbel: GumbelQuantizer) -> None:
    """Tokens that differ from call to call, as those of the published code do."""
    z = torch.randn(3, 6, 2, 2)
    logits = gumbel.proj(z)
    for _ in range(3):
        assert torch.equal(gumbel.tokens(z), logits.argmax(dim=1))


def test_gumbel_draws_follow_the_logits(gumbel: GumbelQuantizer) -> None:
    """A draw without noise, or one that the temperature biases."""
    with torch.no_grad():
        gumbel.proj.weight.zero_()
        gumbel.proj.bias.copy_(torch.linspace(-1, 1, 11))
    generator = torch.Generator().manual_seed(0)
    tokens = gumbel(torch.zeros(1, 6, 100, 200), 0.5, generator=generator).tokens
    shares = tokens.flatten().bincount(minlength=11) / tokens.numel()
    torch.testing.assert_close(shares, gumbel.proj.bias.softmax(0).detach(), rtol=0, atol=0.01)


@pytest.mark.parametrize("hard", [True, False])
def test_gumbel_vectors(gumbel: GumbelQuantizer, hard: bool) -> None:
    """A mixture where one code is asked for, or the reverse; a gradient that does not pass."""
    z = torch.randn(2, 6, 2, 2, requires_grad=True)
    quantized = gumbel(z, 1.0, hard, torch.Generator().manual_seed(0))
    codes = gumbel.vectors(quantized.tokens)
    assert torch.allclose(quantized.vectors, codes, atol=1e-5) == hard
    quantized.vectors.sum().backward()
    assert z.grad is not None and gumbel.proj.weight.grad is not None
    assert z.grad.abs().max() > 0 and gumbel.embedding.weight.grad is not None


def test_divergence_from_uniform(gumbel: GumbelQuantizer) -> None:
    """A sum over the grid, another base, or a factor that is the trainer's."""
    with torch.no_grad():
        gumbel.proj.weight.zero_()
        gumbel.proj.bias.fill_(0)
    z = torch.randn(2, 6, 2, 2)
    assert gumbel(z).losses["kl"].abs() < 1e-5
    with torch.no_grad():
        gumbel.proj.bias[3] = 50.0
    torch.testing.assert_close(gumbel(z).losses["kl"], torch.tensor(math.log(11)))

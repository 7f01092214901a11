"""The evidence lower bound against closed forms, integrals and float64 re-statements."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dvae import DVAE, DVAEConfig
from dvae.objective import (
    gumbel_softmax,
    kl_to_uniform,
    logit_laplace_log_prob,
    map_pixels,
    relaxed_elb,
    unmap_pixels,
)


@pytest.fixture
def codec() -> DVAE:
    """The paper's four groups, so that a token stands for 8 x 8 x 3 = 192 subpixels."""
    torch.manual_seed(1)
    return DVAE(
        DVAEConfig(width=8, bottleneck=6, codebook_size=7, blocks_per_group=1, residual_gain=0.5)
    )


def maps_of(mu: float, ln_b: float, x: Tensor) -> Tensor:
    return torch.cat([torch.full_like(x, mu), torch.full_like(x, ln_b)], dim=1)


def test_pixel_map() -> None:
    """An epsilon other than 0.1, or an inverse that is not clipped (appendix A.3)."""
    x = torch.tensor([0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(map_pixels(x), torch.tensor([0.1, 0.3, 0.5, 0.9]))
    torch.testing.assert_close(unmap_pixels(map_pixels(x)), x, rtol=0, atol=1e-6)
    assert unmap_pixels(torch.tensor([0.05, 0.95])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("mu", [-1.5, 0.0, 2.0])
@pytest.mark.parametrize("ln_b", [-2.0, -1.0, -0.4])
def test_logit_laplace_integrates_to_one(mu: float, ln_b: float) -> None:
    """A density without its Jacobian 1 / (x (1 - x)) or with a factor 2 too many."""
    n = 200_000
    x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).reshape(1, 1, 1, n)
    density = logit_laplace_log_prob(x, maps_of(mu, ln_b, x)).double().exp()
    assert float(density.mean()) == pytest.approx(1, abs=1e-3)


def test_logit_laplace_values() -> None:
    """Means and log-scales exchanged or interleaved; b where ln b is meant."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0.1, 0.9, (2, 3, 4, 5))
    mu, ln_b = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 3, 4, 5))
    b = np.exp(ln_b)
    expected = np.log(1 / (2 * b * x * (1 - x)) * np.exp(-np.abs(np.log(x / (1 - x)) - mu) / b))
    maps = torch.from_numpy(np.concatenate([mu, ln_b], axis=1))
    value = logit_laplace_log_prob(torch.from_numpy(x), maps)
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_kl_by_hand() -> None:
    """A KL in bits, of the wrong sign, over the wrong dimension or averaged over the batch."""
    p = np.array([0.5, 0.25, 0.125, 0.125])
    by_hand = sum(q * math.log(q * 4) for q in p)  # = ln 4 - 1.75 ln 2
    assert by_hand == pytest.approx(0.25 * math.log(2))
    logits = torch.from_numpy(np.log(p) + 3.0).float()[None, :, None, None]  # shift: no matter
    one = kl_to_uniform(logits.expand(1, 4, 2, 3))
    torch.testing.assert_close(one, torch.tensor([6 * by_hand], dtype=torch.float32))
    torch.testing.assert_close(kl_to_uniform(logits.expand(5, 4, 2, 3)), one.expand(5))
    sure = torch.zeros(1, 4, 1, 1)
    sure[0, 2] = 200.0
    assert float(kl_to_uniform(sure)) == pytest.approx(math.log(4), rel=1e-6)
    assert float(kl_to_uniform(torch.zeros(1, 4, 3, 3))) == pytest.approx(0, abs=1e-6)


def test_loss_is_restated(codec: DVAE) -> None:
    """A KL that weighs anything but beta/192 of a position's mean; other noise in the two terms."""
    images, beta, tau = torch.rand(3, 3, 16, 24), 6.6, 0.7
    elb = relaxed_elb(codec, images, tau, beta, torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = codec.encoder(0.8 * images + 0.1)  # [3, 7, 2, 3]
        relaxed = gumbel_softmax(logits, tau, torch.Generator().manual_seed(3))
        mu, ln_b = codec.decoder(relaxed).double().split(3, dim=1)
    x = 0.8 * images.double() + 0.1
    density = (-(torch.log(x / (1 - x)) - mu).abs() / ln_b.exp()).exp()
    reconstruction = -(density / (2 * ln_b.exp() * x * (1 - x))).log().mean()
    q = logits.double().softmax(dim=1)
    position_mean = (q * (q * 7).log()).sum(dim=1).mean()
    torch.testing.assert_close(elb.reconstruction.double(), reconstruction, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(elb.kl.double(), position_mean / 192, rtol=1e-4, atol=1e-7)
    expected = reconstruction + beta / 192 * position_mean
    torch.testing.assert_close(elb.loss.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(elb.tokens, logits.argmax(dim=1))


def test_balance_does_not_depend_on_the_batch(codec: DVAE) -> None:
    """A KL summed over the batch where the reconstruction is averaged."""
    images = torch.rand(1, 3, 16, 16)
    one = relaxed_elb(codec, images, 1e-3, 1.0).kl
    many = relaxed_elb(codec, images.expand(6, -1, -1, -1), 1e-3, 1.0).kl
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-8)


def test_gumbel_softmax_draws_the_categorical() -> None:
    """Noise of the wrong sign or law: at small temperature the draws are the categorical's."""
    p = torch.tensor([0.55, 0.3, 0.1, 0.05])
    logits = p.log()[None, :, None, None].expand(1, 4, 200, 200)
    drawn = gumbel_softmax(logits, 1e-3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.sum(dim=1), torch.ones(1, 200, 200))
    assert float((drawn.amax(dim=1) > 0.99).float().mean()) > 0.98  # nearly one-hot
    counts = torch.bincount(drawn.argmax(dim=1).flatten(), minlength=4)
    expected = 40_000 * p
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 21.1  # 99.99 % of chi-square with 3 degrees of freedom


def test_gumbel_softmax_divides_logits_and_noise() -> None:
    """A temperature that scales the logits alone and leaves the noise as it is."""
    logits = torch.randn(1, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    warm, cool = (
        gumbel_softmax(logits, tau, torch.Generator().manual_seed(1)).double().log()
        for tau in (1.0, 0.5)
    )
    gap = warm - warm[:, :1]
    torch.testing.assert_close(cool - cool[:, :1], 2 * gap, rtol=1e-3, atol=1e-4)


def test_gradient_flows(codec: DVAE) -> None:
    """A relaxation that is detached or hardened: the encoder learns from the KL alone."""
    generator = torch.Generator().manual_seed(0)
    relaxed_elb(codec, torch.rand(2, 3, 16, 16), 1.0, 0.0, generator).loss.backward()
    for name, parameter in codec.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
        assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("temperature", [1.0, 1 / 16])
def test_far_codes_are_no_denormal_numbers(temperature: float) -> None:
    """Shares below 1e-38, with which a step takes three times as long on CPUs; or a limit that
    changes what is drawn, or its gradient, by more than rounding."""
    torch.manual_seed(0)
    logits = (40 * torch.randn(2, 50, 3, 3)).requires_grad_()
    seed = torch.Generator()
    drawn = gumbel_softmax(logits, temperature, seed.manual_seed(1))
    smallest = torch.finfo(torch.float32).tiny
    assert not bool(((drawn > 0) & (drawn < smallest)).any())
    uniform = torch.empty(logits.shape).uniform_(2**-25, 1, generator=seed.manual_seed(1))
    noise = -uniform.double().log()  # of Exponential
    wide = logits.detach().double().requires_grad_()
    expected = F.softmax((wide - noise.log()) / temperature, dim=1)
    assert float(expected.detach().min()) < smallest  # the test can tell
    torch.testing.assert_close(drawn.double(), expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(logits.shape)
    (drawn * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert logits.grad is not None and wide.grad is not None
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    tiny = (logits.grad != 0) & (logits.grad.abs() < smallest)
    assert not bool(tiny.any())

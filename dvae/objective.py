"""The evidence lower bound of the discrete VAE (paper section 2.1, appendix A.2-A.3).

Dimensions: b batch, c channels, H W image, h w token grid, k codebook size.
Pure functions; pixels are in [0, 1] and every likelihood is in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Generators = torch.Generator | Sequence[torch.Generator]
EPSILON = 0.1  # keeps mapped pixels away from 0 and 1, where the logit is infinite (A.3)
LEAST_UNIFORM = 2.0**-25  # keeps uniform numbers, multiples of 2^-24, away from 0
NEGLIGIBLE = 60.0  # nats below the likeliest: a share of e^-60 = 9e-27


def map_pixels(x: Tensor) -> Tensor:
    """phi(x) = (1 - 2 eps) x + eps: pixels from [0, 1] into [0.1, 0.9] (appendix A.3)."""
    return (1 - 2 * EPSILON) * x + EPSILON


def unmap_pixels(x: Tensor) -> Tensor:
    """Inverse of `map_pixels`, clipped to [0, 1]."""
    return ((x - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)


def logit_laplace_log_prob(x: Tensor, maps: Tensor) -> Tensor:
    """ln f(x | mu, b) of the logit-Laplace distribution, elementwise (appendix A.3, eq. 1).

    f(x | mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)), for x in (0, 1).
    x: mapped pixels [b, c, H, W]; maps: [b, 2c, H, W], mu then ln b. Returns [b, c, H, W].
    """
    mu, ln_b = maps.float().chunk(2, dim=1)
    x = x.float()
    return -(torch.logit(x) - mu).abs() * torch.exp(-ln_b) - ln_b - torch.log(2 * x * (1 - x))


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(q || uniform) in nats, summed over the grid: [b, k, h, w] -> [b]."""
    log_q = F.log_softmax(logits.float(), dim=1)
    kl = (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum(dim=1)  # [b, h, w]
    return kl.sum(dim=(1, 2))


def gumbel_softmax(
    logits: Tensor, temperature: float, generator: Generators | None = None
) -> Tensor:
    """A relaxed one-hot draw over dim 1, soft in forward and backward (section 2.1).

    logits [b, k, h, w], temperature tau > 0; as tau falls to 0 the draw becomes categorical.
    generator: one for all, or one of each image, whose draw then depends on it alone.

    The noise is made of uniform numbers of 24 bits, so that none exceeds 16.6; of true Gumbel noise
    one number in 2^24 does.
    """
    # In one memory format, so that an image's draw does not depend on the logits' either.
    uniform = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if generator is None or isinstance(generator, torch.Generator):
        uniform.uniform_(LEAST_UNIFORM, 1, generator=generator)
    else:
        for part, own in zip(uniform, generator, strict=True):
            part.uniform_(LEAST_UNIFORM, 1, generator=own)
    # -ln(-ln u) is Gumbel. On CPUs torch's sampler of exponentials takes four times as long.
    gumbel = uniform.log_().neg_().log_().neg_()
    scores = (logits.float() + gumbel) / temperature
    if scores.device.type == "cpu":
        # Shares that no sum in 32 bits notices would be denormal numbers, with which a product on
        # CPUs takes ten times as long, backward most of all.
        scores = scores.clamp(min=scores.detach().amax(dim=1, keepdim=True) - NEGLIGIBLE)
    return F.softmax(scores, dim=1)


@dataclass
class ELB:
    """The loss and its parts; nats a subpixel, averaged over the batch."""

    loss: Tensor  # scalar: -ELB / (H W c)
    reconstruction: Tensor  # scalar: -ln p(x | z) / (H W c)
    kl: Tensor  # scalar: KL summed over the grid / (H W c), before the factor beta
    tokens: Tensor  # int64 [b, h, w]: argmax of the logits, for counting the codes in use


class RelaxedCodec(Protocol):
    """What the ELB is of: `dvae.model.DVAE`."""

    def logits(self, images: Tensor) -> Tensor:
        """Float [b, k, h, w] of images [b, c, H, W] in [0, 1]."""
        ...

    def decoder(self, z: Tensor) -> Tensor:
        """Maps [b, 2c, H, W], mu then ln b, of relaxed one-hot tokens [b, k, h, w]."""
        ...


def relaxed_elb(
    codec: RelaxedCodec,
    images: Tensor,
    temperature: float,
    kl_weight: float,
    generator: Generators | None = None,
) -> ELB:
    """Negative relaxed ELB of images [b, c, H, W] in [0, 1], divided by H*W*c (section 2.1).

    Divided so, the KL summed over a 32x32 grid weighs beta/192 per position's mean at 256x256.
    Both terms are averaged over the batch, so the balance does not depend on its size.
    """
    subpixels = images[0].numel()
    logits = codec.logits(images)
    relaxed = gumbel_softmax(logits, temperature, generator)
    maps = codec.decoder(relaxed)
    log_prob = logit_laplace_log_prob(map_pixels(images), maps)
    reconstruction = -log_prob.mean()
    with torch.set_grad_enabled(torch.is_grad_enabled() and kl_weight != 0):  # else it is told only
        kl = kl_to_uniform(logits).mean() / subpixels
    loss = reconstruction + kl_weight * kl
    return ELB(loss, reconstruction, kl, logits.detach().argmax(dim=1))

"""What findings measure of a dVAE: error, codes in use, and how far the relaxation is from codes.

Dimensions: n images, c channels, R side, k codebook size, h w token grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import dvae
from dalle1.common.images import to_tensor
from dalle1.data import shapes
from dvae.objective import gumbel_softmax, kl_to_uniform, logit_laplace_log_prob, map_pixels

BATCH = 32


def unseen_shapes(count: int, side: int) -> Tensor:
    """Images of the built-in data's test split: float [count, 3, side, side] in [0, 1]."""
    made = (shapes.make(0, i, "test", side) for i in range(count))
    return torch.stack([to_tensor(sample.image) for sample in made])


@dataclass(frozen=True)
class CodecMeasures:
    """Of a set of images."""

    psnr: float  # dB, of `decode(encode(images))`, over all pixels
    codes: int  # that `encode` uses at least once
    perplexity: float  # exp of the entropy of the codes: how many are in use evenly

    @property
    def values(self) -> dict[str, float]:
        """By the names of measures."""
        return {"psnr": self.psnr, "codes": float(self.codes), "perplexity": self.perplexity}


@torch.no_grad()
def measure_codec(codec: dvae.DVAE, images: Tensor) -> CodecMeasures:
    """How well a codec copies images [n, 3, R, R] in [0, 1], and with how many codes."""
    error, counts = 0.0, torch.zeros(codec.vocab_size, dtype=torch.int64)
    for part in images.split(BATCH):
        tokens = codec.encode(part)
        counts += tokens.flatten().bincount(minlength=codec.vocab_size)
        error += (codec.decode(tokens) - part).square().sum().item()
    shares = counts[counts > 0].double() / counts.sum()
    entropy = -(shares * shares.log()).sum().item()
    squared = max(error / images.numel(), 1e-12)
    return CodecMeasures(-10 * math.log10(squared), int((counts > 0).sum()), math.exp(entropy))


@dataclass(frozen=True)
class Bounds:
    """Negative lower bounds with beta 1, nats a subpixel, averaged over images."""

    relaxed: float  # the decoder reads relaxed draws at the temperature
    true: float  # it reads the codes that the same noise draws
    likeliest: float  # it reads the argmax, without noise, as `encode` does
    entropy: float  # of q(z|x), nats a token

    @property
    def gap(self) -> float:
        """What the true bound loses against the relaxed one."""
        return self.true - self.relaxed


@torch.no_grad()
def bounds(codec: dvae.DVAE, images: Tensor, temperature: float, seed: int = 0) -> Bounds:
    """The relaxed and the true ELB of images [n, 3, R, R] in [0, 1], of one draw each.

    Both are of the same noise: the largest share of a relaxed draw is at the code that the noise
    draws, whatever the temperature.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    totals = torch.zeros(3, dtype=torch.float64)
    divergence, tokens = 0.0, 0
    for part in images.split(BATCH):
        logits = codec.logits(part)  # [n, k, h, w]
        relaxed = gumbel_softmax(logits, temperature, generator)
        kl = kl_to_uniform(logits).sum()
        divergence += kl.item()
        tokens += logits[:, 0].numel()
        for i, z in enumerate((relaxed, _one_hot(relaxed), _one_hot(logits))):
            log_p = logit_laplace_log_prob(map_pixels(part), codec.decoder(z))
            totals[i] += (kl - log_p.sum()).item()
    entropy = math.log(codec.vocab_size) - divergence / tokens
    relaxed, true, likeliest = (totals / images.numel()).tolist()
    return Bounds(relaxed, true, likeliest, entropy)


def _one_hot(scores: Tensor) -> Tensor:
    """[n, k, h, w] -> the same shape, 1 at the largest of dim 1."""
    return F.one_hot(scores.argmax(1), scores.shape[1]).movedim(-1, 1).to(scores.dtype)

"""A start that uses the codebook at small sizes; not in the paper.

Scaled down to flat 32x32 images, the paper's schedules collapse to a handful of codes within a
hundred steps: nearly every position shows the same background (see docs/dvae.md). So the first
steps train the same blocks without tokens: the two 1x1 convolutions next to the relaxation are
replaced by one linear bottleneck, the loss is the squared error of the means. Then k-means centers
c_j of the bottleneck go into the two convolutions, exactly:

    encoder: logit_j(h) = s (2 c_j . A h - |c_j|^2), whose argmax is the nearest center;
    decoder: row j = B c_j, what the bottleneck's map gives for that center.

Architecture, keys and the loss that follows stay the paper's.

Dimensions: b batch, n rows of samples, d bottleneck, k codebook size, h w token grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.model import DVAE, Conv2d
from dvae.objective import map_pixels

CHUNK = {"cpu": 2**20}  # distances at a time, which stay in a CPU's cache
LARGE_CHUNK = 2**26  # on other devices
MAX_SAMPLES = 2**24  # of k-means, which torch.multinomial draws among


class ContinuousBottleneck(nn.Module):
    """The linear maps that stand in for the relaxation: features -> d -> decoder's first map."""

    def __init__(self, codec: DVAE, size: int = 16) -> None:
        super().__init__()
        last, first = _parts(codec)
        self.down = nn.Conv2d(last.w.shape[1], size, 1)
        self.up = nn.Conv2d(size, first.w.shape[0], 1)

    def features(self, codec: DVAE, images: Tensor) -> Tensor:
        """Bottleneck values [b, d, h, w] of images [b, c, H, W] in [0, 1]."""
        return self.down(codec.encoder.features(map_pixels(images)))  # type: ignore[no-any-return]

    def loss(self, codec: DVAE, images: Tensor, noise: float = 0.0) -> Tensor:
        """Mean squared error of the decoder's means, in mapped pixels, without tokens."""
        z = self.features(codec, images)
        if noise:
            # A decoder that has seen small errors in z bears the rounding to centers better.
            z = z + noise * z.detach().std() * torch.randn_like(z)
        maps = codec.decoder.blocks[1:](self.up(z))
        mean = maps[:, : codec.config.channels]
        return F.mse_loss(torch.sigmoid(mean), map_pixels(images))

    @torch.no_grad()
    def install(self, codec: DVAE, centers: Tensor, logit_scale: float) -> None:
        """Writes centers [k, d] into the codec's two 1x1 convolutions."""
        last, first = _parts(codec)
        a, a_bias = self.down.weight[:, :, 0, 0], self.down.bias  # [d, features], [d]
        b, b_bias = self.up.weight[:, :, 0, 0], self.up.bias  # [bottleneck, d], [bottleneck]
        assert a_bias is not None and b_bias is not None
        # Distances in units of the centers' own spacing, so that the scale means the same always.
        spacing = torch.cdist(centers, centers).fill_diagonal_(math.inf).amin(1).median()
        s = logit_scale / spacing.clamp(min=1e-6) ** 2
        last.w.copy_((2 * s * centers @ a)[:, :, None, None])
        last.b.copy_(s * (2 * centers @ a_bias - centers.square().sum(1)))
        first.w.copy_((b @ centers.t())[:, :, None, None])
        first.b.copy_(b_bias)

    @torch.no_grad()
    def install_centers(
        self,
        codec: DVAE,
        images: Tensor,
        logit_scale: float,
        generator: torch.Generator | None = None,
    ) -> None:
        """k-means over the bottleneck values of images [b, c, H, W], then `install`.

        ln b starts at its best constant for these images: untrained maps would begin with a
        gradient that undoes what the warm start reached.
        """
        z = torch.cat([self.features(codec, part) for part in images.split(64)])
        samples = z.movedim(1, -1).reshape(-1, z.shape[1])
        centers = k_means(samples, codec.config.codebook_size, 20, generator)
        self.install(codec, centers, logit_scale)
        output: Conv2d = codec.decoder.blocks.output.conv  # type: ignore[union-attr, assignment]
        c = codec.config.channels
        error = torch.zeros(c, device=images.device)
        for part in images.split(64):
            one_hot = F.one_hot(codec.encode(part), codec.config.codebook_size).movedim(-1, 1)
            mean = codec.decoder(one_hot.to(part.dtype))[:, :c]
            gap = (torch.logit(map_pixels(part)) - mean).abs()
            error += gap.mean(dim=(0, 2, 3)) * len(part) / len(images)
        output.w[c:] = 0
        output.b[c:] = error.log()


def _parts(codec: DVAE) -> tuple[Conv2d, Conv2d]:
    """The encoder's last convolution and the decoder's first."""
    output: nn.Sequential = codec.encoder.blocks.output  # type: ignore[assignment]
    return output.conv, codec.decoder.blocks.input  # type: ignore[return-value]


@torch.no_grad()
def k_means(
    samples: Tensor, k: int, iterations: int = 20, generator: torch.Generator | None = None
) -> Tensor:
    """Centers [k, d] of samples [n, d], n >= k, by Lloyd's rounds from a k-means++-like start.

    Starting centers are drawn with probability proportional to the squared distance from those
    already drawn, in a few batches: drawn uniformly, most would be background.
    generator: of the samples' device.
    """
    n = samples.shape[0]
    if n < k:
        raise ValueError(f"k_means: {n} samples are fewer than k = {k} centers")
    centers = samples[torch.randint(n, (1,), generator=generator, device=samples.device)]
    distance = (samples - centers).square().sum(1)
    while len(centers) < k:
        count = min(k - len(centers), max(1, len(centers) // 2))
        weights = distance + 1e-12
        picked = torch.multinomial(weights, count, generator=generator)
        centers = torch.cat([centers, samples[picked]])
        distance = torch.minimum(distance, _nearest(samples, samples[picked])[0].square())
    for _ in range(iterations):
        gap, nearest = _nearest(samples, centers)
        ones = samples.new_ones(n)
        members = samples.new_zeros(k).index_add_(0, nearest, ones)  # [k]
        total = torch.zeros_like(centers).index_add_(0, nearest, samples)
        mean = total / members[:, None].clamp(min=1)
        centers = torch.where(members[:, None] > 0, mean, centers)
        empty = (members == 0).nonzero()[:, 0]
        if len(empty):
            centers[empty] = samples[gap.topk(len(empty)).indices]
    return centers


def _nearest(samples: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of each sample to the nearest center, and which that is: [n] and int64 [n]."""
    rows = max(1, CHUNK.get(samples.device.type, LARGE_CHUNK) // len(centers))
    parts = [torch.cdist(part, centers).min(1) for part in samples.split(rows)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])

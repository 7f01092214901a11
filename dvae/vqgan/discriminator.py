"""The discriminator of patches that a VQGAN is trained against (PatchGAN, Isola et al., 2017).

Dimensions: b images, c channels, H W height and width, h w grid of patches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDEST = 8  # of the widths of later convolutions, in widths of the first one
SLOPE = 0.2  # of the LeakyReLUs

Gather = Callable[[Tensor], Tensor]  # rows [b, e] of this rank to those of all, differentiable


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, over the images of all ranks where `gather` is set.

    The statistics, and those that run for evaluation, are then the same on all ranks, however a
    batch is divided among them. `nn.SyncBatchNorm` would do the same on GPUs alone.
    """

    gather: Gather | None = None

    def forward(self, input: Tensor) -> Tensor:  # [b, c, h, w] -> [b, c, h, w]
        if self.gather is None or not self.training:
            return super().forward(input)
        x = input.float()
        of_images = torch.cat([x.mean(dim=(2, 3)), x.var(dim=(2, 3), correction=0)], dim=1)
        means, variances = self.gather(of_images).chunk(2, dim=1)  # each [ranks b, c]
        mean = means.mean(dim=0)
        # Of all pixels: within the images, and of the images' means.
        variance = (variances + (means - mean).square()).mean(dim=0)
        self._count(mean.detach(), variance.detach(), len(means) * x[0, 0].numel())
        scale = self.weight * (variance + self.eps).rsqrt()
        y = (x - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return y.to(input.dtype)

    @torch.no_grad()
    def _count(self, mean: Tensor, variance: Tensor, numbers: int) -> None:
        """Moves the running statistics, as torch's own does."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked += 1
        unbiased = variance * (numbers / (numbers - 1))
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)


class PatchDiscriminator(nn.Module):
    """Logits that a patch of an image is real; `layers` halvings of the side.

    Each layer is a convolution of 4x4 and a LeakyReLU; there is a batch norm between the two but in
    the first. One more has stride 1, and a last convolution makes the logits. A logit of three
    layers sees 70 x 70 pixels, one of two layers 34 x 34. Parameter names are taming-transformers'
    (`main.0`, `main.2`, `main.3` ...), and so are the initial values: N(0, 0.02) of convolutions
    and N(1, 0.02) of the norms' scales. All biases begin as torch's.
    """

    def __init__(
        self, channels: int = 3, layers: int = 3, width: int = 64, gather: Gather | None = None
    ) -> None:
        """gather: rows of all ranks of those of this one, for the norms; None for a rank alone."""
        super().__init__()
        main: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(SLOPE)]
        n_in = width
        for n in range(1, layers + 1):
            n_out, stride = width * min(2**n, WIDEST), 2 if n < layers else 1
            norm = BatchNorm2d(n_out)
            norm.gather = gather
            # The norm takes any bias away.
            main += [nn.Conv2d(n_in, n_out, 4, stride, 1, bias=False), norm, nn.LeakyReLU(SLOPE)]
            n_in = n_out
        self.main = nn.Sequential(*main, nn.Conv2d(n_in, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(
        self, x: Tensor
    ) -> Tensor:  # [b, channels, H, W] in [-1, 1] -> float32 [b, 1, h, w]
        logits: Tensor = self.main(x)
        return logits.float()


def smallest_side(layers: int) -> int:
    """Pixels of the smallest image that a discriminator of so many layers has a logit for."""
    side = 1
    for stride in (1, 1, *[2] * layers):  # from the logits back
        side = (side - 1) * stride + 4 - 2
    return side


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's: logits of real images above 1, of the decoder's below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's: cross-entropy in nats, the mean of both kinds."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())

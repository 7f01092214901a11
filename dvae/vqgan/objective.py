"""What a VQGAN is trained on: pixels, perception, codebook and discriminator (Esser et al., 2020).

Dimensions: b images, c channels, H W height and width. Pixels are in [-1, 1]. All losses are means,
so that they depend on neither the batch's nor the images' size.

Both nets are trained in one pass. They meet at the decoder's images alone: the generator's gradient
is computed there, as a number of each pixel, and the discriminator sees copies that lead nowhere.
So neither's loss can reach the other's weights, and the discriminator runs once over each image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dvae.vqgan.discriminator import hinge_loss, vanilla_loss

LARGEST_WEIGHT = 1e4  # that the adaptive weight is cut at
SOFTENING = 1e-4  # added to the norm that it is divided by

PixelError = Literal["absolute", "squared"]
DiscriminatorLoss = Literal["hinge", "vanilla"]
DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge_loss,
    "vanilla": vanilla_loss,
}
Distance = Callable[[Tensor, Tensor], Tensor]  # of images and others, [b]; see `perceptual.LPIPS`


@dataclass(frozen=True)
class Reconstruction:
    """How far images are from what they should be.

    Attributes:
        error: of pixels.
        perceptual: a distance of images; None for none.
        perceptual_weight: of that distance.
    """

    error: PixelError = "absolute"
    perceptual: Distance | None = None
    perceptual_weight: float = 1.0

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of images [b, c, H, W], and its parts, not weighted and detached."""
        difference = images.float() - targets.float()
        pixel = difference.abs().mean() if self.error == "absolute" else difference.square().mean()
        parts = {"pixel": pixel.detach()}
        loss = pixel
        if self.perceptual is not None:
            distance = self.perceptual(images, targets).mean()
            parts["perceptual"] = distance.detach()
            loss = loss + self.perceptual_weight * distance
        return loss, parts


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """How much the adversarial loss weighs, so that both pull alike on the decoder's last weights.

    Args:
        reconstruction: the gradient of its loss with respect to these weights.
        adversarial: that of the other loss.

    Returns:
        The quotient of the two norms, a scalar in [0, 1e4] without a gradient.
    """
    quotient: Tensor = reconstruction.norm() / (adversarial.norm() + SOFTENING)
    return quotient.clamp(0, LARGEST_WEIGHT).detach()


@dataclass(frozen=True)
class Adversary:
    """The discriminator, and how its opinion counts.

    Attributes:
        discriminator: logits of images [b, c, H, W].
        loss: of the discriminator.
        weight: of the generator's adversarial loss; with a last weight, times the adaptive weight.
        last_weight: of the decoder's last convolution; None: the weight is not adaptive.
        average: mean over the ranks of a tensor that has no gradient.
    """

    discriminator: Callable[[Tensor], Tensor]
    loss: DiscriminatorLoss = "hinge"
    weight: float = 1.0
    last_weight: Tensor | None = None
    average: Callable[[Tensor], Tensor] = lambda tensor: tensor


def with_gradient(value: Tensor, images: Tensor, gradient: Tensor) -> Tensor:
    """A scalar of this value whose gradient with respect to the images is the one that is given."""
    surrogate = (images * gradient.detach()).sum()
    return value.detach() + (surrogate - surrogate.detach())


def adversarial_losses(
    images: Tensor, targets: Tensor, reconstruction: Reconstruction, adversary: Adversary
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The losses of both nets.

    Args:
        images: what the decoder has made, float32 [b, c, H, W] with a graph to its weights.
        targets: real images, of the same shape.
        reconstruction: loss of the pixels.
        adversary: what is trained against.

    Returns:
        The generator's loss, the discriminator's, and scalars for the log, detached. Gradients of
        the first reach the generator alone and those of the second the discriminator alone. Without
        gradients, as in evaluation, the adversarial loss has no weight, as in taming-transformers.
    """
    discriminate, learns = adversary.discriminator, torch.is_grad_enabled()
    # No leaf: torch's counter of FLOPs cannot watch gradients that end in one.
    leaf = images.detach().requires_grad_(learns).view_as(images)
    loss, metrics = reconstruction(leaf, targets)
    fake = discriminate(leaf)
    adversarial = -fake.mean()
    weight = torch.zeros((), device=images.device)
    total = loss.detach()
    if learns:
        (by_pixels,) = torch.autograd.grad(loss, leaf)
        # The graph is kept: the discriminator's own loss goes through it again.
        (by_opinion,) = torch.autograd.grad(adversarial, leaf, retain_graph=True)
        weight = torch.full_like(weight, adversary.weight)
        if adversary.last_weight is not None:
            gradients = [
                adversary.average(_pull_back(images, adversary.last_weight, gradient))
                for gradient in (by_pixels, by_opinion)
            ]
            weight = weight * adaptive_weight(*gradients)
        value = total + weight * adversarial.detach()
        total = with_gradient(value, images, by_pixels + weight * by_opinion)
    real = discriminate(targets)
    own = DISCRIMINATOR_LOSSES[adversary.loss](real, fake)
    metrics |= {
        "adversarial": adversarial.detach(),
        "adversarial_weight": weight,
        "discriminator": own.detach(),
        "logits_real": real.detach().mean(),
        "logits_fake": fake.detach().mean(),
    }
    return total, own, metrics


def _pull_back(images: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """A gradient with respect to images as one with respect to a weight that they are made with."""
    (result,) = torch.autograd.grad(images, weight, gradient, retain_graph=True)
    return result.float()

"""The settings of a VQGAN's losses."""

from __future__ import annotations

from pydantic import Field

from dalle1.common.config import Location, Section
from dvae.vqgan.objective import DiscriminatorLoss, PixelError


class CodebookSettings(Section):
    """The codebook of a VQGAN whose quantizer is 'nearest'."""

    weight: float = Field(1.0, gt=0, description="of the codebook's and the commitment's loss")
    beta: float = Field(
        0.25, ge=0, description="weight of the commitment, which draws vectors to their codes"
    )
    legacy: bool = Field(
        False,
        description="beta weighs the other term, which draws codes to their vectors, as when the "
        "published models were trained",
    )
    ema_decay: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="codes are running means of their vectors, of which this share stays at an "
        "update, in place of the codebook's loss; null: gradients move them",
    )
    revive_every: int | None = Field(
        None,
        ge=1,
        description="updates after which codes that none of them has used are moved to vectors of "
        "the last batch, drawn in proportion to their error; null: dead codes stay so",
    )
    warm_start_steps: int = Field(
        0,
        ge=0,
        description="updates in which the decoder reads the encoder's vectors themselves, after "
        "which k-means of them sets the codes; 0: none (ours, docs/vqgan.md)",
    )
    warm_start_images: int = Field(2048, ge=1, description="images given to k-means")


class GumbelSettings(Section):
    """The relaxation of a VQGAN whose quantizer is 'gumbel', and its codes' divergence."""

    temperature_start: float = Field(0.9, gt=0, description="tau at the first update")
    temperature_end: float = Field(1e-6, gt=0, description="tau at the end of its cosine")
    temperature_steps: int = Field(1_000_001, ge=0, description="updates of that cosine")
    kl_weight: float = Field(
        1e-8, ge=0, description="weight of the divergence from codes that are used equally"
    )
    hard: bool = Field(
        True, description="the decoder sees one code a position; false: a mixture of them"
    )


class PerceptualSettings(Section):
    """LPIPS, a distance of images in the features of a VGG16; both files are the user's."""

    weight: float = Field(1.0, gt=0, description="of the distance")
    vgg: Location = Field(description="torchvision's weights of VGG16, vgg16-397923af.pth")
    lin: Location = Field(
        description="LPIPS' weights of VGG16's channels, vgg.pth of its version 0.1"
    )


class DiscriminatorSettings(Section):
    """The discriminator of patches that a VQGAN is trained against."""

    start: int = Field(
        250_001, ge=0, description="number of the first update that trains it and counts its logits"
    )
    weight: float = Field(1.0, gt=0, description="of the adversarial loss")
    adaptive: bool = Field(
        True,
        description="the weight is times the quotient of the gradients' norms at "
        "decoder.conv_out.weight",
    )
    loss: DiscriminatorLoss = Field("hinge", description="of the discriminator")
    layers: int = Field(3, ge=1, le=6, description="layers that halve the side")
    width: int = Field(64, ge=1, description="channels of its first layer")
    learning_rate_factor: float = Field(
        1.0, gt=0, description="learning rate of the discriminator / that of the VQGAN"
    )


class VQGANSettings(Section):
    """The losses of a VQGAN (docs/vqgan.md)."""

    pixel_error: PixelError = Field("absolute", description="of pixels in [-1, 1]; its weight is 1")
    codebook: CodebookSettings | None = Field(
        None, description="of quantizer 'nearest'; null: the section's defaults"
    )
    gumbel: GumbelSettings | None = Field(
        None, description="of quantizer 'gumbel'; null: the section's defaults"
    )
    perceptual: PerceptualSettings | None = Field(
        None, description="LPIPS; null: images are compared by their pixels alone"
    )
    discriminator: DiscriminatorSettings | None = Field(
        None, description="null: there is none, and so no adversarial loss"
    )

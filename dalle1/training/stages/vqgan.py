"""A VQGAN, trained against a discriminator (Esser et al., 2020; docs/vqgan.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import dvae
from dalle1.common.weights import fingerprint
from dalle1.data.shards.loader import Batch
from dalle1.data.transforms import Augmentation, augment_dvae
from dalle1.training import distributed
from dalle1.training.config import RunConfig
from dalle1.training.schedules import cosine
from dalle1.training.stages.base import (
    Metrics,
    ParameterGroup,
    Stage,
    Weights,
    autocast,
    device_of,
    pixels_of,
    zero_loss_of,
)
from dalle1.training.stages.codebook import Codebook
from dalle1.training.stages.codec_sheet import reconstruction_sheet
from dalle1.training.vqgan_config import CodebookSettings, GumbelSettings
from dvae.calls import trusted
from dvae.vqgan import perceptual
from dvae.vqgan.discriminator import PatchDiscriminator, smallest_side
from dvae.vqgan.objective import Adversary, Reconstruction, adversarial_losses
from dvae.vqgan.quantizers import GumbelQuantizer, NearestQuantizer, Quantized, codebook_loss

CODES = "model.quantize.embedding.weight"  # by the names of this stage's parameters


class VQGANStage(Stage):
    """A VQGAN: pixels, LPIPS, codebook, and from an update on a discriminator of patches.

    Generator and discriminator are updated at the same time, from the same weights. Each has a
    parameter group of its own, and neither gets a gradient of the other's loss.
    """

    model: dvae.VQGAN

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        assert config.vqgan is not None and config.vqgan_training is not None
        self.objective = config.vqgan_training
        self.model = dvae.VQGAN(config.vqgan)
        self._check(config)
        if isinstance(self.model.quantize, NearestQuantizer):
            settings = self.objective.codebook or CodebookSettings()
            # Codes that are running means have no gradient.
            self.model.quantize.embedding.requires_grad_(settings.ema_decay is None)
            positions = config.batch_size * (config.reader.image_size // self.model.out_stride) ** 2
            self.codebook = Codebook(self.model.config, settings, positions)
        self.freeze_the_rest()
        lpips = self.objective.perceptual
        # In a tuple, where neither DeepSpeed nor the checkpoint takes it for trained weights.
        self._frozen = (perceptual.load(lpips.vgg, lpips.lin) if lpips else None,)
        d = self.objective.discriminator
        if d is not None:
            gather = distributed.all_gather if distributed.world_size() > 1 else None
            channels = self.model.config.channels
            self.discriminator = PatchDiscriminator(channels, d.layers, d.width, gather)

    def _check(self, config: RunConfig) -> None:
        """Raises ValueError where the settings do not fit one another."""
        shape, side, d = self.model.config, config.reader.image_size, self.objective.discriminator
        if not shape.encoder:
            raise ValueError(
                "vqgan.encoder: expected true, got false: without it nothing is learned"
            )
        other = "gumbel" if shape.quantizer == "nearest" else "codebook"
        if getattr(self.objective, other) is not None:
            raise ValueError(
                f"vqgan_training.{other} is not read by quantizer {shape.quantizer!r}: take it out"
            )
        if side % self.model.out_stride:
            raise ValueError(
                f"reader.image_size {side} must be a multiple of {self.model.out_stride}, the "
                "pixels of a token's side"
            )
        if d is not None and side < smallest_side(d.layers):
            raise ValueError(
                f"reader.image_size {side} is too small for a discriminator of {d.layers} layers: "
                f"expected at least {smallest_side(d.layers)}; lower "
                "vqgan_training.discriminator.layers"
            )
        if self.objective.perceptual is not None and shape.channels != 3:
            raise ValueError(
                f"vqgan_training.perceptual: LPIPS reads 3 colors, got vqgan.channels "
                f"{shape.channels}; take the section out"
            )

    def freeze_the_rest(self) -> None:
        codes = self.model.quantize.embedding
        moves = codes.weight.requires_grad  # by its gradient
        super().freeze_the_rest()
        if self.settings.train_only is None:
            return
        if hasattr(self, "codebook"):
            self.codebook.frozen = not codes.weight.requires_grad
            codes.requires_grad_(moves and codes.weight.requires_grad)
        d = self.objective.discriminator
        if d is not None and d.adaptive and not self.model.decoder.conv_out.weight.requires_grad:
            raise ValueError(
                "train_only: expected decoder.conv_out among the names, at whose gradients the "
                "adaptive weight looks; add it, or set vqgan_training.discriminator.adaptive to "
                "false"
            )

    @property
    def augmentation(self) -> Augmentation:
        return augment_dvae

    def fingerprints(self) -> dict[str, str]:
        (lpips,) = self._frozen
        return {} if lpips is None else {"vqgan_training.perceptual": fingerprint(lpips)}

    def after_move_to_device(self) -> None:
        # Faster on CPUs; only now, since DeepSpeed broadcasts contiguous weights only.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def parameter_groups(self) -> list[ParameterGroup]:
        names = [name for name, _ in self.named_parameters()]
        own = [name for name in names if name.startswith("discriminator.")]
        rest = [name for name in names if name not in own]
        generator = ParameterGroup(rest, part="generator")
        return [generator, ParameterGroup(own, part="discriminator")] if own else [generator]

    def learning_rate_factors(self, step: int) -> list[float]:
        d = self.objective.discriminator
        if d is None:
            return [1.0]
        return [1.0, d.learning_rate_factor if step >= d.start else 0.0]  # no weight decay before

    def changes_loss(self, step: int) -> bool:
        d = self.objective.discriminator
        return super().changes_loss(step) or (d is not None and step == d.start)

    def _targets(self, batch: Batch) -> Tensor:
        """What the decoder is to write: [b, c, R, R] in [0, 1]."""
        images = pixels_of(batch, device_of(self.model))
        return images.contiguous(memory_format=torch.channels_last)

    def _inputs(self, images: Tensor) -> Tensor:
        """What the encoder reads: the images, or their half where the decoder writes twice."""
        return _half(images) if self.model.out_stride > self.model.stride else images

    @trusted()
    def forward(self, micro_batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        images = self._targets(micro_batch)
        generators = [torch.Generator(images.device).manual_seed(s) for s in micro_batch.seeds]
        with autocast(self.settings, images.device):
            latents = self.model.latents(self._inputs(images))
            quantized, regularization, metrics = self._quantize(latents, step, generators)
            pixels = self.model.pixels(quantized.vectors).float()
            decoded, targets = self._signed(pixels), 2 * images - 1
            loss, more = self._losses(decoded, targets, step)
        if self.training and hasattr(self, "codebook"):
            self.codebook.observe(self.model.quantize, latents, quantized.tokens, step, generators)
        return loss + regularization, metrics | more

    def _signed(self, pixels: Tensor) -> Tensor:
        """What the decoder writes, in [-1, 1] also where it writes [0, 1]."""
        return pixels if self.model.config.signed_pixels else 2 * pixels - 1

    def _quantize(
        self, latents: Tensor, step: int, generators: list[torch.Generator]
    ) -> tuple[Quantized, Tensor, Metrics]:
        """The codes, their weighted loss, and scalars for the log."""
        quantize = self.model.quantize
        if isinstance(quantize, GumbelQuantizer):
            s = self.objective.gumbel or GumbelSettings()
            tau = cosine(step, s.temperature_start, s.temperature_end, s.temperature_steps)
            quantized = quantize(latents, tau, s.hard, generators)
            kl = quantized.losses["kl"]
            return (
                quantized,
                s.kl_weight * kl,
                {
                    "kl": kl.detach(),
                    "temperature": torch.tensor(tau),
                },
            )
        c = self.objective.codebook or CodebookSettings()
        quantized = quantize(latents)
        if c.ema_decay is None:
            loss = codebook_loss(quantized, c.beta, c.legacy)
        else:
            loss = c.beta * quantized.losses["commitment"]
        return quantized, c.weight * loss, {"codebook": quantized.losses["codebook"].detach()}

    def _losses(self, decoded: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Metrics]:
        """Of reconstruction, adversary and discriminator."""
        s, d = self.objective, self.objective.discriminator
        (lpips,) = self._frozen
        if lpips is not None:
            lpips.to(decoded.device)
        weight = s.perceptual.weight if s.perceptual is not None else 0.0
        reconstruction = Reconstruction(s.pixel_error, lpips, weight)
        if d is None:
            return reconstruction(decoded, targets)
        if step < d.start:
            loss, metrics = reconstruction(decoded, targets)
            return loss + zero_loss_of(self.discriminator), metrics
        adversary = Adversary(
            self.discriminator,
            d.loss,
            d.weight,
            self.model.decoder.conv_out.weight if d.adaptive else None,
            distributed.mean_of,
        )
        loss, own, metrics = adversarial_losses(decoded, targets, reconstruction, adversary)
        return loss + own, metrics

    def after_update(self, step: int, done: bool, read: Callable[[str], Tensor]) -> Weights:
        if not hasattr(self, "codebook"):
            return {}
        codes = self.codebook.after_update(step, done, lambda: read(CODES))
        return {} if codes is None else {CODES: codes}

    def pop_metrics(self) -> dict[str, float]:
        return self.codebook.pop_metrics() if hasattr(self, "codebook") else {}

    def empty_model(self) -> dvae.VQGAN:
        with torch.device("meta"):
            return dvae.VQGAN(self.model.config)

    @torch.no_grad()
    def draw_contact_sheet(
        self, model: nn.Module, batch: Batch
    ) -> tuple[Image.Image, dict[str, float]] | None:
        assert isinstance(model, dvae.VQGAN)
        images = pixels_of(batch, device_of(model))
        return reconstruction_sheet(images, model.decode(model.encode(self._inputs(images))))

    def export(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, dvae.VQGAN)
        model.save(folder)


def _half(images: Tensor) -> Tensor:
    """Images of half the side, each pixel the mean of four."""
    return F.avg_pool2d(images, 2)

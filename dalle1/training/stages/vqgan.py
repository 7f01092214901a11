"""A VQGAN, trained against a discriminator (Esser et al., 2020; docs/vqgan.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import dvae
from dalle1.common.weights import fingerprint
from dalle1.data.shards.loader import Batch
from dalle1.training import distributed
from dalle1.training.config import RunConfig
from dalle1.training.schedules import cosine
from dalle1.training.stages.base import (
    Metrics,
    ParameterGroup,
    Weights,
    autocast,
    device_of,
    pixels_of,
    zero_loss_of,
)
from dalle1.training.stages.codebook import Codebook
from dalle1.training.stages.codec import CodecStage
from dalle1.training.vqgan_config import CodebookSettings, GumbelSettings
from dvae.calls import trusted
from dvae.vqgan import perceptual
from dvae.vqgan.discriminator import PatchDiscriminator, smallest_side
from dvae.vqgan.objective import Adversary, Reconstruction, adversarial_losses
from dvae.vqgan.quantizers import GumbelQuantizer, codebook_loss
from dvae.warm_start import k_means

CODES = "model.quantize.embedding.weight"  # by the names of this stage's parameters


class VQGANStage(CodecStage):
    """A VQGAN: pixels, LPIPS, codebook, and from an update on a discriminator of patches.

    Generator and discriminator are updated at the same time, from the same weights. Each has a
    parameter group of its own, and neither gets a gradient of the other's loss. A warm start (ours)
    trains encoder and decoder without the codebook. Then k-means of the encoder's vectors sets it.
    """

    model: dvae.VQGAN
    codebook: Codebook | None  # of the quantizer that has one to look after
    discriminator: PatchDiscriminator | None

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        assert config.vqgan is not None and config.vqgan_training is not None
        self.objective = config.vqgan_training
        self.model = dvae.VQGAN(config.vqgan)
        self.freeze_the_rest()
        _check(config, self.model)
        self.codebook, self._codes, self._gumbel = None, CodebookSettings(), GumbelSettings()
        if isinstance(self.model.quantize, GumbelQuantizer):
            self._gumbel = self.objective.gumbel or self._gumbel
        else:
            self._codes = self.objective.codebook or self._codes
            self._make_codebook(config)
        self.warm_start_steps = self._codes.warm_start_steps
        self.warm_start_learning_rate = config.optimizer.learning_rate
        self._check_warm_start("vqgan_training.codebook", self._codes.warm_start_images)
        lpips, d = self.objective.perceptual, self.objective.discriminator
        # In a tuple, where neither DeepSpeed nor the checkpoint takes it for trained weights.
        self._frozen = (perceptual.load(lpips.vgg, lpips.lin) if lpips is not None else None,)
        self.discriminator = None
        if d is not None:
            gather = distributed.all_gather if distributed.world_size() > 1 else None
            shape = (self.model.config.channels, d.layers, d.width)
            self.discriminator = PatchDiscriminator(*shape, gather)

    def _make_codebook(self, config: RunConfig) -> None:
        codes = self.model.quantize.embedding.weight
        positions = config.batch_size * (config.reader.image_size // self.model.out_stride) ** 2
        frozen = not codes.requires_grad
        self.codebook = Codebook(self.model.config, self._codes, positions, frozen)
        if self._codes.ema_decay is not None:  # codes that are running means have no gradient
            codes.requires_grad_(False)
            if not any(weight.requires_grad for weight in self.model.parameters()):
                raise ValueError(
                    "train_only: expected weights that gradients train, got the codes alone, which "
                    "follow their running means; add a module such as quant_conv, or set "
                    "vqgan_training.codebook.ema_decay=null"
                )
        if frozen and self._codes.warm_start_steps:
            raise ValueError(
                f"vqgan_training.codebook.warm_start_steps {self._codes.warm_start_steps}: its end "
                "sets the codes, which train_only leaves out; set it to 0"
            )

    def fingerprints(self) -> dict[str, str]:
        (lpips,) = self._frozen
        if lpips is None:
            return {}
        channels = {name: m for name, m in lpips.named_children() if name.startswith("lin")}
        return {
            "vqgan_training.perceptual.vgg": fingerprint(lpips.features),
            "vqgan_training.perceptual.lin": fingerprint(nn.ModuleDict(channels)),
        }

    def after_move_to_device(self) -> None:
        # Faster on CPUs; only now, since DeepSpeed broadcasts contiguous weights only.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def parameter_groups(self) -> list[ParameterGroup]:
        names = [name for name, _ in self.named_parameters()]
        generator = [name for name in names if name.startswith("model.")]
        groups = [ParameterGroup(generator, part="generator")]
        if self.discriminator is not None:
            rest = [name for name in names if not name.startswith("model.")]
            groups.append(ParameterGroup(rest, part="discriminator"))
        return groups

    def learning_rate_factors(self, step: int) -> list[float]:
        d = self.objective.discriminator
        if d is None:
            return [1.0]
        # 0 before it begins, so that its weights do not decay meanwhile.
        return [1.0, d.learning_rate_factor if step >= d.start else 0.0]

    def changes_loss(self, step: int) -> bool:
        d = self.objective.discriminator
        return super().changes_loss(step) or (d is not None and step == d.start)

    @trusted()
    def forward(self, micro_batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        device = device_of(self.model)
        images = pixels_of(micro_batch, device).contiguous(memory_format=torch.channels_last)
        self._uses_codebook = step >= self.warm_start_steps
        # One for each image, so that draws do not depend on how ranks divide a batch.
        generators = [torch.Generator(device).manual_seed(seed) for seed in micro_batch.seeds]
        with autocast(self.settings, device):
            latents = self.model.latents(self._inputs(images))
            vectors, loss, metrics = self._quantize(latents, step, generators)
            pixels = self.model.pixels(vectors).float()
            if not self.model.config.signed_pixels:
                pixels = 2 * pixels - 1
            rest, more = self._image_losses(pixels, 2 * images - 1, step)
        return loss + rest, metrics | more

    def _quantize(
        self, latents: Tensor, step: int, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor, Metrics]:
        """What the decoder reads, the codes' weighted loss, and scalars for the log."""
        quantize = self.model.quantize
        if not self._uses_codebook:
            return latents, zero_loss_of(quantize), {}
        # Below, methods in place of the modules' calls: ZeRO 3 cannot look into what they return.
        if isinstance(quantize, GumbelQuantizer):
            s = self._gumbel
            tau = cosine(step, s.temperature_start, s.temperature_end, s.temperature_steps)
            quantized = quantize.forward(latents, tau, s.hard, generators)
            kl = quantized.losses["kl"]
            metrics = {"kl": kl.detach(), "temperature": torch.tensor(tau)}
            return quantized.vectors, s.kl_weight * kl, metrics
        c = self._codes
        quantized = quantize.forward(latents)
        if c.ema_decay is None:
            loss = codebook_loss(quantized, c.beta, c.legacy)
        else:
            loss = c.beta * quantized.losses["commitment"]
        if self.training and self.codebook is not None:
            self.codebook.observe(quantize, latents, quantized.tokens, step, generators)
        metrics = {"codebook": quantized.losses["codebook"].detach()}
        return quantized.vectors, c.weight * loss, metrics

    def _image_losses(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Metrics]:
        """Of reconstruction, adversary and discriminator; both [b, c, R, R] in [-1, 1]."""
        s, d, (lpips,) = self.objective, self.objective.discriminator, self._frozen
        if lpips is not None:
            lpips.to(images.device)
        weight = s.perceptual.weight if s.perceptual is not None else 0.0
        reconstruction = Reconstruction(s.pixel_error, lpips, weight)
        if d is None or self.discriminator is None:
            return reconstruction(images, targets)
        if step < d.start:
            loss, metrics = reconstruction(images, targets)
            return loss + zero_loss_of(self.discriminator), metrics
        last = self.model.decoder.conv_out.weight if d.adaptive else None
        adversary = Adversary(self.discriminator, d.loss, d.weight, last, distributed.mean_of)
        loss, own, metrics = adversarial_losses(images, targets, reconstruction, adversary)
        return loss + own, metrics

    @torch.no_grad()
    def replacement_weights(
        self, weights: Weights, read: Callable[[int], Tensor]
    ) -> dict[str, Tensor]:
        device, prefix = device_of(self.model), "model."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        model = self.model_with(own)
        assert isinstance(model, dvae.VQGAN)
        rows = []
        for part in read(self._codes.warm_start_images).split(64):
            z = model.latents(self._inputs(part.to(device).float() / 255)).float()
            z = F.normalize(z, dim=1) if model.config.normalized_codes else z
            rows.append(rearrange(z, "b d h w -> (b h w) d"))
        generator = torch.Generator(device).manual_seed(self.settings.seed)
        return {CODES: k_means(torch.cat(rows), model.vocab_size, 20, generator)}

    def after_update(self, step: int, done: bool, read: Callable[[str], Tensor]) -> Weights:
        if self.codebook is None:
            return {}
        codes = self.codebook.after_update(step, done, lambda: read(CODES))
        return {} if codes is None else {CODES: codes}

    def pop_metrics(self) -> dict[str, float]:
        return {} if self.codebook is None else self.codebook.pop_metrics()

    def empty_model(self) -> dvae.VQGAN:
        with torch.device("meta"):
            return dvae.VQGAN(self.model.config)


def _check(config: RunConfig, model: dvae.VQGAN) -> None:
    """Raises ValueError where the settings fit neither one another nor what is frozen."""
    s, shape, side = config.vqgan_training, model.config, config.reader.image_size
    assert s is not None
    if not shape.encoder:
        raise ValueError(
            "vqgan.encoder: expected true, got false; a decoder alone cannot be trained"
        )
    other = "gumbel" if shape.quantizer == "nearest" else "codebook"
    if getattr(s, other) is not None:
        raise ValueError(
            f"vqgan_training.{other} is not read by quantizer {shape.quantizer!r}: take it out"
        )
    if side % model.out_stride:
        raise ValueError(
            f"reader.image_size {side} must be a multiple of {model.out_stride}, the pixels of a "
            "token's side"
        )
    if s.perceptual is not None and shape.channels != 3:
        raise ValueError(
            f"vqgan_training.perceptual: expected vqgan.channels 3, which LPIPS reads, got "
            f"{shape.channels}; take the section out"
        )
    d = s.discriminator
    if d is not None and side < smallest_side(d.layers):
        raise ValueError(
            f"vqgan_training.discriminator.layers {d.layers}: expected reader.image_size of at "
            f"least {smallest_side(d.layers)}, got {side}; lower the layers"
        )
    offload, clip_norm = config.parallel.offload, config.optimizer.clip_norm
    if d is not None and offload != "none" and clip_norm is not None:
        raise ValueError(
            f"parallel.offload {offload!r} does not go with optimizer.clip_norm {clip_norm} and a "
            "discriminator, since each net is clipped by its own norm; set one of the two to null "
            "or none"
        )
    trained = model.decoder.conv_out.weight.requires_grad
    if d is not None and d.adaptive and not trained:
        raise ValueError(
            "train_only: expected decoder.conv_out.weight to be trained, whose gradients the "
            "adaptive weight reads; add decoder.conv_out, or set "
            "vqgan_training.discriminator.adaptive=false"
        )

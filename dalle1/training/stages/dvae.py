"""Stage one: the dVAE (paper section 2.1, appendix A)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import dvae
from dalle1.data.shards.loader import Batch
from dalle1.training import distributed
from dalle1.training.config import DVAESettings, RunConfig
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
from dalle1.training.stages.codec import CodecStage
from dvae.calls import trusted
from dvae.objective import relaxed_elb
from dvae.warm_start import ContinuousBottleneck


class DVAEStage(CodecStage):
    """Stage one: the relaxed ELB (section 2.1), after a warm start where one is asked for.

    The warm start (ours, docs/dvae.md) trains encoder and decoder through a linear bottleneck in
    place of tokens. Then k-means on its outputs sets the codebook, and the ELB takes over.
    """

    model: dvae.DVAE

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        assert config.dvae is not None and config.dvae_training is not None
        self.objective: DVAESettings = config.dvae_training
        self.model = dvae.DVAE(config.dvae)
        self.freeze_the_rest()
        side = config.reader.image_size
        window = config.dvae.stride * (config.dvae.encoder_window or 1)
        if side % window:
            raise ValueError(
                f"reader.image_size {side} must be a multiple of {window}, the dVAE's stride times "
                "its encoder_window"
            )
        self.warm_start_steps = self.objective.warm_start_steps
        self.warm_start_learning_rate = self.objective.warm_start_learning_rate
        self._check_warm_start("dvae_training", self.objective.warm_start_images)
        if self.warm_start_steps:
            self.bottleneck = ContinuousBottleneck(self.model, self.objective.warm_start_bottleneck)
        self._used = torch.zeros(config.dvae.codebook_size, dtype=torch.bool)  # since the last log

    def after_move_to_device(self) -> None:
        # A third faster on CPUs; only now, since DeepSpeed broadcasts contiguous weights only.
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def parameter_groups(self) -> list[ParameterGroup]:
        names = [name for name, _ in self.named_parameters()]
        encoder = [name for name in names if name.startswith("model.encoder.")]
        rest = [name for name in names if name not in encoder]
        return [ParameterGroup(encoder), ParameterGroup(rest)]

    def learning_rate_factors(self, step: int) -> list[float]:
        return [1.0 if step < self.warm_start_steps else self.objective.encoder_rate, 1.0]

    def _noisy_images(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """Images [b, 3, R, R] in [0, 1] with noise, where it is set."""
        images = pixels_of(batch, device_of(self.model))
        if self.objective.grain:
            # Flat images without noise have no largest likelihood: ln b would fall without end.
            noise = torch.empty_like(images)
            for image_noise, generator in zip(noise, generators, strict=True):
                image_noise.normal_(generator=generator)
            images = (images + self.objective.grain * noise).clamp(0, 1)
        return images.contiguous(memory_format=torch.channels_last)

    @trusted()
    def forward(self, micro_batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        # One for each image, so that the noise does not depend on how ranks divide a batch.
        device = device_of(self.model)
        generators = [torch.Generator(device).manual_seed(seed) for seed in micro_batch.seeds]
        images = self._noisy_images(micro_batch, generators)
        self._uses_codebook = step >= self.warm_start_steps
        if not self._uses_codebook:
            with autocast(self.settings, device):
                loss = self.bottleneck.loss(self.model, images)
            codebook = (self.model.encoder.blocks.output, self.model.decoder.blocks.input)
            return loss + zero_loss_of(*codebook), {"squared_error": loss.detach()}
        s, step = self.objective, step - self.warm_start_steps
        temperature = cosine(step, s.temperature_start, s.temperature_end, s.temperature_steps)
        kl_weight = cosine(step, 0.0, s.kl_weight, s.kl_steps)
        with autocast(self.settings, device):
            elb = relaxed_elb(self.model, images, temperature, kl_weight, generators)
        if self.training:
            self._used = self._used.to(device)  # where marking them keeps no one waiting
            self._used.index_fill_(0, elb.tokens.flatten(), True)
        loss = elb.loss + zero_loss_of(self.bottleneck) if self.warm_start_steps else elb.loss
        return loss, {
            "reconstruction": elb.reconstruction.detach(),
            "kl": elb.kl.detach(),
            "kl_weight": torch.tensor(kl_weight),
            "temperature": torch.tensor(temperature),
        }

    def replacement_weights(
        self, weights: Weights, read: Callable[[int], Tensor]
    ) -> dict[str, Tensor]:
        device = device_of(self.model)
        generator = torch.Generator(device).manual_seed(self.settings.seed)
        images = read(self.objective.warm_start_images).float() / 255
        images = images.to(device, memory_format=torch.channels_last)
        model = self.empty_model().to_empty(device=device)
        bottleneck = ContinuousBottleneck(model, self.objective.warm_start_bottleneck).to(device)
        modules = nn.ModuleDict({"model": model, "bottleneck": bottleneck})
        modules.load_state_dict(dict(weights))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        scale = self.objective.warm_start_logit_scale
        bottleneck.install_centers(model, images, scale, generator)
        return dict(modules.state_dict())

    def pop_metrics(self) -> dict[str, float]:
        used = distributed.max_over_ranks(self._used.float().tolist())
        self._used.zero_()
        return {"codes_used": sum(used)} if any(used) else {}

    def empty_model(self) -> dvae.DVAE:
        with torch.device("meta"):
            return dvae.DVAE(self.model.config)

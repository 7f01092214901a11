"""Stage one: the dVAE (paper section 2.1, appendix A)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

import dvae
from dalle1.common.images import contact_sheet, to_pil
from dalle1.data.shards.loader import Batch
from dalle1.data.transforms import Augmentation, augment_dvae
from dalle1.training import distributed
from dalle1.training.config import DVAESettings, RunConfig
from dalle1.training.schedules import cosine
from dalle1.training.stages.base import (
    SHEET_COLUMNS,
    Metrics,
    Phase,
    Stage,
    Weights,
    autocast,
    device_of,
    pixels_of,
    zero_of,
)
from dvae.objective import relaxed_elb
from dvae.warm_start import ContinuousBottleneck


class DVAEStage(Stage):
    """Stage one: the relaxed ELB (section 2.1), after a warm start where one is asked for."""

    model: dvae.DVAE

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        assert config.dvae is not None and config.dvae_training is not None
        self.objective: DVAESettings = config.dvae_training
        self.model = dvae.DVAE(config.dvae)
        side = config.reader.image_size
        window = config.dvae.stride * (config.dvae.encoder_window or 1)
        if side % window:
            raise ValueError(
                f"reader.image_size {side} must be a multiple of {window}, the dVAE's stride times "
                "its encoder_window"
            )
        self.warm_up = self.objective.warm_start_steps
        if self.warm_up >= config.steps:
            raise ValueError(
                f"dvae_training.warm_start_steps {self.warm_up} must be less than steps "
                f"{config.steps}"
            )
        if self.warm_up:
            self.bottleneck = ContinuousBottleneck(self.model, self.objective.warm_start_bottleneck)
        self._used = torch.zeros(config.dvae.codebook_size, dtype=torch.bool)
        self._has_codes = True

    @property
    def augmentation(self) -> Augmentation:
        return augment_dvae

    def phase(self, step: int) -> Phase:
        if step < self.warm_up:
            return Phase(0, self.warm_up, self.objective.warm_start_learning_rate)
        return Phase(self.warm_up, self.settings.steps, self.settings.optimizer.learning_rate)

    def placed(self) -> None:
        # A third faster on CPUs; only now, since DeepSpeed broadcasts contiguous weights alone.
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def parameter_groups(self) -> list[list[str]]:
        names = [name for name, _ in self.named_parameters()]
        encoder = [name for name in names if name.startswith("model.encoder.")]
        return [encoder, [name for name in names if name not in encoder]]

    def rate_factors(self, step: int) -> list[float]:
        return [1.0 if step < self.warm_up else self.objective.encoder_rate, 1.0]

    def _grained(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        images = pixels_of(batch, device_of(self.model))
        if self.objective.grain:
            # Flat, noiseless pictures have no best likelihood: ln b would sink without end.
            noise = torch.empty_like(images)
            for part, generator in zip(noise, generators, strict=True):
                part.normal_(generator=generator)
            images = (images + self.objective.grain * noise).clamp(0, 1)
        return images.contiguous(memory_format=torch.channels_last)

    def forward(self, part: Batch, step: int) -> tuple[Tensor, Metrics]:
        # One of each picture: what is drawn does not depend on how a batch is spread.
        device = device_of(self.model)
        generators = [torch.Generator(device).manual_seed(seed) for seed in part.seeds]
        images = self._grained(part, generators)
        self._has_codes = step >= self.warm_up
        if not self._has_codes:
            with autocast(self.settings, device):
                loss = self.bottleneck.loss(self.model, images)
            codebook = (self.model.encoder.blocks.output, self.model.decoder.blocks.input)
            return loss + zero_of(*codebook), {"squared_error": loss.detach()}
        s, step = self.objective, step - self.warm_up
        temperature = cosine(step, s.temperature_start, s.temperature_end, s.temperature_steps)
        kl_weight = cosine(step, 0.0, s.kl_weight, s.kl_steps)
        with autocast(self.settings, device):
            elb = relaxed_elb(self.model, images, temperature, kl_weight, generators)
        if self.training:
            self._used[elb.tokens.flatten().cpu()] = True
        loss = elb.loss + zero_of(self.bottleneck) if self.warm_up else elb.loss
        return loss, {
            "reconstruction": elb.reconstruction.detach(),
            "kl": elb.kl.detach(),
            "kl_weight": torch.tensor(kl_weight),
            "temperature": torch.tensor(temperature),
        }

    def sets_weights(self, step: int) -> bool:
        return bool(self.warm_up) and step == self.warm_up

    def new_weights(self, weights: Weights, read: Callable[[int], Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.settings.seed)
        device = device_of(self.model)
        images = read(self.objective.warm_start_images).float() / 255
        images = images.to(device, memory_format=torch.channels_last)
        model, bottleneck = self.model, self.bottleneck
        model = self.blank().to_empty(device=device)
        bottleneck = ContinuousBottleneck(model, self.objective.warm_start_bottleneck).to(device)
        whole = nn.ModuleDict({"model": model, "bottleneck": bottleneck})
        whole.load_state_dict(dict(weights))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        scale = self.objective.warm_start_logit_scale
        bottleneck.install_centers(model, images, scale, generator)
        return dict(whole.state_dict())

    def counts(self) -> dict[str, float]:
        used = distributed.largest_over_ranks(self._used.float().tolist())
        self._used.zero_()
        return {"codes_used": sum(used)} if any(used) else {}

    def blank(self) -> dvae.DVAE:
        with torch.device("meta"):
            return dvae.DVAE(self.model.config)

    @torch.no_grad()
    def sheet(self, model: nn.Module, batch: Batch) -> tuple[Image.Image, dict[str, float]] | None:
        if not self._has_codes:
            return None  # the warm start trains no tokens to look at
        assert isinstance(model, dvae.DVAE)
        images = pixels_of(batch, device_of(model))
        decoded = model.decode(model.encode(images))
        error = (decoded - images).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        psnr = float(-10 * torch.log10(error).mean())
        rows = [[to_pil(p.cpu()) for p in side[:SHEET_COLUMNS]] for side in (images, decoded)]
        return contact_sheet(rows, ["picture", "encoded and decoded"]), {"psnr": psnr}

    def export(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, dvae.DVAE)
        model.save(folder)

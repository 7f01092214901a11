"""What the three stages differ in: model, loss, sheet, export. The trainer is the same for all."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

import dvae
from dalle1.batching import draw_captions
from dalle1.clip import CLIP
from dalle1.data.images import Augmentation, augment_dalle, augment_dvae
from dalle1.data.shards import Batch, read_captions
from dalle1.layout import padding_id
from dalle1.model import Model, load_clip, save_clip
from dalle1.pictures import contact_sheet
from dalle1.sampling import decode, to_pil
from dalle1.tokenizer import Tokenizer
from dalle1.training.config import DVAESettings, RunConfig, TokenizerSettings
from dalle1.training.schedules import cosine
from dalle1.transformer import Transformer
from dvae.objective import relaxed_elb
from dvae.warm_start import ContinuousBottleneck

SHEET_COLUMNS = 8
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """Updates [first, last) with one course of the step size."""

    first: int
    last: int
    learning_rate: float


class Stage(nn.Module):
    """A model in training. `forward` is one step's loss, so that DeepSpeed wraps all of it."""

    model: nn.Module  # what is averaged and exported

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.settings = config

    @property
    @abstractmethod
    def augmentation(self) -> Augmentation:
        """What is done to each training picture."""

    @abstractmethod
    def forward(self, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        """The loss of a batch at update `step`, and values for the log (scalars, detached)."""

    @abstractmethod
    def sheet(self, batch: Batch) -> tuple[Image.Image, dict[str, float]] | None:
        """A picture of what the (averaged) model does with a batch, and values for the log."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Writes the (averaged) model for use."""

    def phase(self, step: int) -> Phase:
        """The phase that an update belongs to; one for the whole run unless a stage has more."""
        return Phase(0, self.settings.steps, self.settings.optimiser.learning_rate)

    def placed(self) -> None:
        """Called once the engine has put the weights on their device."""

    def parameter_groups(self) -> list[list[str]]:
        """Names of the parameters that share a step size; see `rate_factors`."""
        return [[name for name, _ in self.named_parameters()]]

    def rate_factors(self, step: int) -> list[float]:
        """What each group's step size is multiplied with at update `step`."""
        return [1.0]

    def before_step(self, step: int, read: Callable[[int], Tensor]) -> bool:
        """Called before update `step`; True if weights were set, so that moments start anew.

        read(n) gives n training pictures, uint8 [n, 3, R, R], the same on all ranks.
        """
        return False

    def counts(self) -> dict[str, float]:
        """Values gathered since the last call."""
        return {}


def _pixels(batch: Batch, device: torch.device) -> Tensor:
    return batch.images.to(device).float() / 255


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


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
        return Phase(self.warm_up, self.settings.steps, self.settings.optimiser.learning_rate)

    def placed(self) -> None:
        # A third faster on CPUs; only now, since DeepSpeed broadcasts contiguous weights alone.
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def parameter_groups(self) -> list[list[str]]:
        names = [name for name, _ in self.named_parameters()]
        encoder = [name for name in names if name.startswith("model.encoder.")]
        return [encoder, [name for name in names if name not in encoder]]

    def rate_factors(self, step: int) -> list[float]:
        return [1.0 if step < self.warm_up else self.objective.encoder_rate, 1.0]

    def _grained(self, batch: Batch, generator: torch.Generator) -> Tensor:
        images = _pixels(batch, _device(self.model))
        if self.objective.grain:
            # Flat, noiseless pictures have no best likelihood: ln b would sink without end.
            noise = torch.randn(images.shape, generator=generator).to(images.device)
            images = (images + self.objective.grain * noise).clamp(0, 1)
        return images.contiguous(memory_format=torch.channels_last)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        generator = torch.Generator().manual_seed(batch.seed)
        images = self._grained(batch, generator)
        self._has_codes = step >= self.warm_up
        if not self._has_codes:
            loss = self.bottleneck.loss(self.model, images)
            return loss, {"squared_error": loss.detach()}
        s, step = self.objective, step - self.warm_up
        temperature = cosine(step, s.temperature_start, s.temperature_end, s.temperature_steps)
        kl_weight = cosine(step, 0.0, s.kl_weight, s.kl_steps)
        noise = generator if images.device.type == "cpu" else None
        elb = relaxed_elb(self.model, images, temperature, kl_weight, noise)
        self._used[elb.tokens.flatten().cpu()] = True
        return elb.loss, {
            "reconstruction": elb.reconstruction.detach(),
            "kl": elb.kl.detach(),
            "kl_weight": torch.tensor(kl_weight),
            "temperature": torch.tensor(temperature),
        }

    def before_step(self, step: int, read: Callable[[int], Tensor]) -> bool:
        if not self.warm_up or step != self.warm_up:
            return False
        generator = torch.Generator().manual_seed(self.settings.seed)
        images = read(self.objective.warm_start_pictures).float() / 255
        images = images.to(_device(self.model), memory_format=torch.channels_last)
        scale = self.objective.warm_start_logit_scale
        self.bottleneck.install_centres(self.model, images, scale, generator)
        return True

    def counts(self) -> dict[str, float]:
        count = float(self._used.sum())
        self._used.zero_()
        return {"codes_used": count} if count else {}

    @torch.no_grad()
    def sheet(self, batch: Batch) -> tuple[Image.Image, dict[str, float]] | None:
        if not self._has_codes:
            return None  # the warm start trains no tokens to look at
        images = _pixels(batch, _device(self.model))
        decoded = self.model.decode(self.model.encode(images))
        error = (decoded - images).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        psnr = float(-10 * torch.log10(error).mean())
        rows = [[to_pil(p.cpu()) for p in side[:SHEET_COLUMNS]] for side in (images, decoded)]
        return contact_sheet(rows, ["picture", "encoded and decoded"]), {"psnr": psnr}

    def export(self, folder: Path) -> None:
        self.model.save(folder)


class CLIPStage(Stage):
    """CLIP, by the symmetric cross-entropy over the whole batch; it also trains the tokenizer."""

    model: CLIP

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        assert config.clip is not None and config.tokenizer is not None
        if config.reader.image_size < config.clip.image_size:
            raise ValueError(
                f"reader.image_size {config.reader.image_size} must be at least clip.image_size "
                f"{config.clip.image_size}"
            )
        self.tokenizer = _train_tokenizer(
            config, config.tokenizer, config.clip.text_vocab - 2, config.clip.text_length - 1
        )
        self.model = CLIP(config.clip)

    @property
    def augmentation(self) -> Augmentation:
        return augment_dalle

    def _tokens(self, captions: list[str]) -> Tensor:
        ids = self.tokenizer.encode_for_clip(captions, self.model.config.text_length)
        return ids.to(_device(self.model))

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        images = _pixels(batch, _device(self.model))
        loss = self.model.loss(images, self._tokens(batch.captions))
        return loss, {"logit_scale": self.model.scale().detach()}

    @torch.no_grad()
    def sheet(self, batch: Batch) -> tuple[Image.Image, dict[str, float]] | None:
        """The batch's captions, each with its own picture and then those that fit it best."""
        images = _pixels(batch, _device(self.model))
        scores = self.model(images, self._tokens(batch.captions)).t()  # [texts, images]
        hits = (scores.argmax(dim=1).cpu() == torch.arange(len(scores))).float().mean()
        best = scores.argsort(dim=1, descending=True).cpu()
        rows = [
            [to_pil(images[j].cpu()) for j in (i, *best[i, : SHEET_COLUMNS - 1].tolist())]
            for i in range(min(SHEET_COLUMNS, len(images)))
        ]
        titles = ("its own", "best by CLIP")
        sheet = contact_sheet(rows, batch.captions[: len(rows)], titles, columns_before_gap=1)
        return sheet, {"retrieval": float(hits)}

    def export(self, folder: Path) -> None:
        save_clip(self.model, self.tokenizer, folder)


class DALLEStage(Stage):
    """Stage two: the transformer over captions and the frozen dVAE's tokens (section 2.2)."""

    model: Transformer

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        assert config.transformer is not None and config.dvae_model is not None
        clip = None
        if config.clip_model is not None:
            clip, tokenizer = load_clip(config.clip_model)
        else:
            assert config.tokenizer is not None
            t = config.transformer
            tokenizer = _train_tokenizer(config, config.tokenizer, t.text_vocab, t.text_length)
        codec = dvae.load(config.dvae_model).requires_grad_(False)
        side = config.transformer.grid * codec.config.stride
        if side != config.reader.image_size:
            raise ValueError(
                f"reader.image_size is {config.reader.image_size}, but a grid of "
                f"{config.transformer.grid} tokens of the dVAE {config.dvae_model} is {side} pixels"
            )
        self.model = Transformer(config.transformer, config.execution)
        # In a tuple, where neither DeepSpeed nor the checkpoint takes them for trained weights.
        self._frozen = (codec, clip)
        self.tokenizer = tokenizer.resized(config.transformer.text_length)
        self._whole()  # refuses parts of different runs before the first step

    @property
    def augmentation(self) -> Augmentation:
        return augment_dalle

    def _whole(self) -> Model:
        training = self.model.training
        codec, clip = self._frozen
        model = Model(self.tokenizer, self.model, codec, clip)
        self.model.train(training)  # Model is for use and sets eval mode
        return model

    def _text(self, batch: Batch) -> Tensor:
        rng = random.Random(batch.seed)
        tokens = self.tokenizer.encode(batch.captions, rng)
        if self.settings.caption_dropout:
            length, vocab = self.tokenizer.text_length, self.tokenizer.vocab_size
            empty = torch.tensor([padding_id(vocab, p) for p in range(length)])
            for row in tokens:
                if rng.random() < self.settings.caption_dropout:
                    row.copy_(empty)
        return tokens

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        device = _device(self.model)
        codec = self._frozen[0].to(device)
        image_tokens = rearrange(codec.encode(_pixels(batch, device)), "b r c -> b (r c)")
        losses = self.model.loss(self._text(batch).to(device), image_tokens)
        return losses.loss, {"text": losses.text.detach(), "image": losses.image.detach()}

    @torch.no_grad()
    def sheet(self, batch: Batch) -> tuple[Image.Image, dict[str, float]] | None:
        """Captions of the batch, each with its own picture and a few draws, unranked."""
        model = self._whole().to(_device(self.model))
        rows, captions = [], batch.captions[:SHEET_COLUMNS]
        drawn = draw_captions(model, captions, SHEET_COLUMNS - 1, self.settings.seed)
        for own, tokens in zip(batch.images, drawn, strict=False):
            rows.append([to_pil(p) for p in (own / 255, *decode(model, tokens))])
        self.model.train()
        return contact_sheet(rows, captions, ("its own", "drawn"), columns_before_gap=1), {}

    def export(self, folder: Path) -> None:
        self._whole().save(folder)
        self.model.train()


STAGES: dict[str, type[Stage]] = {"dvae": DVAEStage, "clip": CLIPStage, "dalle": DALLEStage}


def _train_tokenizer(
    config: RunConfig, settings: TokenizerSettings, vocab_size: int, text_length: int
) -> Tokenizer:
    """Learns the byte-pair vocabulary from the training captions (every rank the same)."""
    captions = read_captions(config.data, config.reader.caption_key, settings.captions)
    tokenizer = Tokenizer.train(captions, vocab_size, text_length, settings.dropout)
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"the captions give only {tokenizer.vocab_size} byte-pair tokens of the {vocab_size} "
            f"that the model's text_vocab asks for: set text_vocab to {tokenizer.vocab_size} "
            "(for CLIP, 2 more)"
        )
    return tokenizer

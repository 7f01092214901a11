"""What the three stages differ in: model, loss, sheet, export. The trainer is the same for all."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

import dvae
from dalle1.batching import draw_captions
from dalle1.clip import CLIP
from dalle1.data.images import Augmentation, augment_dalle, augment_dvae
from dalle1.data.shards import Batch
from dalle1.data.sources import TOKENS, Index, read_captions
from dalle1.data.tokens import TokenShard
from dalle1.layout import padding_id
from dalle1.model import Model, load_clip, save_clip
from dalle1.pictures import contact_sheet
from dalle1.sampling import decode, to_pil
from dalle1.tokenising import fingerprint
from dalle1.tokenizer import Tokenizer
from dalle1.training import distributed
from dalle1.training.config import DVAESettings, RunConfig, TokenizerSettings
from dalle1.training.schedules import cosine
from dalle1.training.stage import Metrics, Phase, Sharding, Stage, Weights
from dalle1.transformer import Layer, Transformer, count_text_targets
from dvae.objective import relaxed_elb
from dvae.warm_start import ContinuousBottleneck

SHEET_COLUMNS = 8
TOKENIZER = "tokenizer.json"  # in the run's folder, where the run learns one


def _pixels(batch: Batch, device: torch.device) -> Tensor:
    assert batch.images is not None  # see Stage.check_data
    return batch.images.to(device).float() / 255


def _autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Products in bfloat16 where the run asks for it; parameters and losses stay in 32 bits."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.parallel.precision == "bf16")


def _nothing_of(*modules: Any) -> Tensor:
    """0, with a gradient of 0 for the modules' weights: those that a loss does not read would keep
    their last gradient under ZeRO 3, and it would count in the norm."""
    return 0.0 * torch.stack([p.sum() for m in modules for p in m.parameters()]).sum()


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

    def _grained(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        images = _pixels(batch, _device(self.model))
        if self.objective.grain:
            # Flat, noiseless pictures have no best likelihood: ln b would sink without end.
            noise = torch.empty_like(images)
            for part, generator in zip(noise, generators, strict=True):
                part.normal_(generator=generator)
            images = (images + self.objective.grain * noise).clamp(0, 1)
        return images.contiguous(memory_format=torch.channels_last)

    def forward(self, part: Batch, step: int) -> tuple[Tensor, Metrics]:
        # One of each picture: what is drawn does not depend on how a batch is spread.
        device = _device(self.model)
        generators = [torch.Generator(device).manual_seed(seed) for seed in part.seeds]
        images = self._grained(part, generators)
        self._has_codes = step >= self.warm_up
        if not self._has_codes:
            with _autocast(self.settings, device):
                loss = self.bottleneck.loss(self.model, images)
            codebook = (self.model.encoder.blocks.output, self.model.decoder.blocks.input)
            return loss + _nothing_of(*codebook), {"squared_error": loss.detach()}
        s, step = self.objective, step - self.warm_up
        temperature = cosine(step, s.temperature_start, s.temperature_end, s.temperature_steps)
        kl_weight = cosine(step, 0.0, s.kl_weight, s.kl_steps)
        with _autocast(self.settings, device):
            elb = relaxed_elb(self.model, images, temperature, kl_weight, generators)
        if self.training:
            self._used[elb.tokens.flatten().cpu()] = True
        loss = elb.loss + _nothing_of(self.bottleneck) if self.warm_up else elb.loss
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
        device = _device(self.model)
        images = read(self.objective.warm_start_pictures).float() / 255
        images = images.to(device, memory_format=torch.channels_last)
        model, bottleneck = self.model, self.bottleneck
        model = self.blank().to_empty(device=device)
        bottleneck = ContinuousBottleneck(model, self.objective.warm_start_bottleneck).to(device)
        whole = nn.ModuleDict({"model": model, "bottleneck": bottleneck})
        whole.load_state_dict(dict(weights))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        scale = self.objective.warm_start_logit_scale
        bottleneck.install_centres(model, images, scale, generator)
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
        images = _pixels(batch, _device(model))
        decoded = model.decode(model.encode(images))
        error = (decoded - images).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        psnr = float(-10 * torch.log10(error).mean())
        rows = [[to_pil(p.cpu()) for p in side[:SHEET_COLUMNS]] for side in (images, decoded)]
        return contact_sheet(rows, ["picture", "encoded and decoded"]), {"psnr": psnr}

    def export(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, dvae.DVAE)
        model.save(folder)


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

    def blank(self) -> CLIP:
        with torch.device("meta"):
            return CLIP(self.model.config)

    def _tokens(self, captions: list[str]) -> Tensor:
        ids = self.tokenizer.encode_for_clip(captions, self.model.config.text_length)
        return ids.to(_device(self.model))

    def forward(self, part: Batch, step: int) -> tuple[Tensor, Metrics]:
        images = _pixels(part, _device(self.model))
        tokens = self._tokens(part.captions)
        first = distributed.rank() * len(images)
        with _autocast(self.settings, images.device):
            loss = self.model.loss(images, tokens, distributed.gathered, first)
        return loss, {"logit_scale": self.model.scale().detach()}

    @torch.no_grad()
    def sheet(self, model: nn.Module, batch: Batch) -> tuple[Image.Image, dict[str, float]] | None:
        """The batch's captions, each with its own picture and then those that fit it best."""
        assert isinstance(model, CLIP)
        images = _pixels(batch, _device(model))
        scores = model(images, self._tokens(batch.captions)).t()  # [texts, images]
        hits = (scores.argmax(dim=1).cpu() == torch.arange(len(scores))).float().mean()
        best = scores.argsort(dim=1, descending=True).cpu()
        rows = [
            [to_pil(images[j].cpu()) for j in (i, *best[i, : SHEET_COLUMNS - 1].tolist())]
            for i in range(min(SHEET_COLUMNS, len(images)))
        ]
        titles = ("its own", "best by CLIP")
        sheet = contact_sheet(rows, batch.captions[: len(rows)], titles, columns_before_gap=1)
        return sheet, {"retrieval": float(hits)}

    def export(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, CLIP)
        save_clip(model, self.tokenizer, folder)


@dataclass
class Streams:
    """A pass of stage two: captions as tokens, and the pictures that the dVAE will encode."""

    text: Tensor  # int64 [b, text_length]
    pictures: Batch  # or their tokens
    text_count: float  # text targets of a pass, mean over the passes of all ranks


class DALLEStage(Stage):
    """Stage two: the transformer over captions and the frozen dVAE's tokens (section 2.2)."""

    model: Transformer

    def __init__(self, config: RunConfig, sharding: Sharding | None = None) -> None:
        """sharding: given, weights are spread over the ranks as they are made."""
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
        # In a tuple, where neither DeepSpeed nor the checkpoint takes them for trained weights.
        self._frozen = (codec, clip)
        self.tokenizer = tokenizer.resized(config.transformer.text_length)
        self._shape = config.transformer
        self._whole(self.blank())  # refuses parts of different runs before the first step
        if sharding is None:
            self.model = Transformer(config.transformer, config.execution, config.seed)
        else:
            with sharding.building():
                self.model = Transformer(config.transformer, config.execution, config.seed)
            self.model.initialise(config.seed, sharding.whole)
        self._set_precision(config.parallel.precision)

    @property
    def augmentation(self) -> Augmentation:
        return augment_dalle

    def _set_precision(self, precision: str) -> None:
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            if precision == "bf16":
                layer.narrow = torch.bfloat16
            elif precision == "fp16":
                self.gradient_scales += layer.scale_gradients(distributed.ranks())

    def blank(self) -> Transformer:
        with torch.device("meta"):
            return Transformer(self._shape)

    def sharded_apart(self) -> Sequence[nn.Module]:
        return list(self.model.layers)

    def _whole(self, transformer: nn.Module) -> Model:
        assert isinstance(transformer, Transformer)
        codec, clip = self._frozen
        return Model(self.tokenizer, transformer, codec, clip)

    def _text(self, batch: Batch) -> Tensor:
        rows = []
        length, vocab = self.tokenizer.text_length, self.tokenizer.vocab_size
        empty = torch.tensor([padding_id(vocab, p) for p in range(length)])
        dropout = self.settings.caption_dropout if self.training else 0.0
        for caption, seed in zip(batch.captions, batch.seeds, strict=True):
            rng = random.Random(seed)
            row = self.tokenizer.encode(caption, rng if self.training else None)[0]
            rows.append(empty if dropout and rng.random() < dropout else row)
        return torch.stack(rows)

    def parts(self, batch: Batch, size: int) -> Sequence[Streams]:
        text, pictures = self._text(batch), batch.split(size)
        count = count_text_targets(text, self._shape.text_vocab) / len(pictures)
        # The loss is divided by the whole batch's count, not each part by its own (2.4, 2.2).
        mean = distributed.mean_over_ranks({"count": count})["count"]
        return [Streams(*pair, mean) for pair in zip(text.split(size), pictures, strict=True)]

    def _image_tokens(self, batch: Batch, device: torch.device) -> Tensor:
        """int64 [b, grid²]: those of token shards, or what the dVAE makes of the pictures."""
        if batch.tokens is not None:
            return batch.tokens.to(device, torch.int64)
        codec = self._frozen[0].to(device)
        return rearrange(codec.encode(_pixels(batch, device)), "b r c -> b (r c)")

    def forward(self, part: Streams, step: int) -> tuple[Tensor, Metrics]:
        device = _device(self.model)
        image_tokens = self._image_tokens(part.pictures, device)
        losses = self.model.loss(part.text.to(device), image_tokens, part.text_count)
        return losses.loss, {"text": losses.text.detach(), "image": losses.image.detach()}

    @torch.no_grad()
    def sheet(self, model: nn.Module, batch: Batch) -> tuple[Image.Image, dict[str, float]] | None:
        """Captions of the batch, each with its own picture and a few draws, unranked."""
        whole = self._whole(model).to(_device(self.model))
        rows, captions = [], batch.captions[:SHEET_COLUMNS]
        drawn = draw_captions(whole, captions, SHEET_COLUMNS - 1, self.settings.seed)
        for own, tokens in zip(self._own(whole, batch), drawn, strict=False):
            rows.append([to_pil(p) for p in (own, *decode(whole, tokens))])
        return contact_sheet(rows, captions, ("its own", "drawn"), columns_before_gap=1), {}

    def _own(self, whole: Model, batch: Batch) -> Tensor:
        """The batch's own pictures [b, 3, h, w] in [0, 1], decoded where there are tokens alone."""
        if batch.images is not None:
            return batch.images / 255
        assert batch.tokens is not None
        return decode(whole, batch.tokens[:SHEET_COLUMNS].to(torch.int64))

    def check_data(self, index: Index) -> None:
        """Token shards must be of this dVAE, or at least of its grid and vocabulary."""
        if index.kind != TOKENS:
            return
        made, c = TokenShard(index.shards[0]).settings, self._shape
        for name, theirs, ours in (
            ("a grid", made.grid, c.grid),
            ("a vocabulary", made.codebook_size, c.image_vocab),
        ):
            if theirs != ours:
                raise ValueError(
                    f"data: the token shards {index.data!r} have {name} of {theirs}, the "
                    f"transformer one of {ours}: make them anew with launch/tokenize.py and "
                    f"dvae_model {self.settings.dvae_model}"
                )
        key = self.settings.reader.caption_key
        if made.caption_key != key:
            raise ValueError(
                f"reader.caption_key is {key!r}, but the token shards {index.data!r} were made "
                f"with {made.caption_key!r}: set it to that, or make them anew"
            )
        mine = fingerprint(self._frozen[0])
        if made.dvae != mine:
            raise ValueError(
                f"data: the token shards {index.data!r} are of the dVAE {made.dvae}, dvae_model "
                f"{self.settings.dvae_model} is {mine}: what their tokens mean differs"
            )

    def export(self, model: nn.Module, folder: Path) -> None:
        self._whole(model).save(folder)


STAGES: dict[str, type[Stage]] = {"dvae": DVAEStage, "clip": CLIPStage, "dalle": DALLEStage}


def make_stage(config: RunConfig, sharding: Sharding | None = None) -> Stage:
    """The stage that a config names. The transformer alone is large enough to be made sharded."""
    if config.stage == "dalle":
        return DALLEStage(config, sharding)
    return STAGES[config.stage](config)


def _train_tokenizer(
    config: RunConfig, settings: TokenizerSettings, vocab_size: int, text_length: int
) -> Tokenizer:
    """The byte-pair vocabulary of the training captions: learnt once, by the first rank, and kept
    in the run's folder, so that captions that arrive later do not change the tokens."""
    path, r = Path(config.run) / TOKENIZER, config.reader
    failure: Exception | None = None
    if distributed.rank() == 0 and not path.exists():
        try:
            captions = read_captions(config.data, r.caption_key, settings.captions, r.caption_lines)
            tokenizer = Tokenizer.train(captions, vocab_size, text_length, settings.dropout)
            _check_vocabulary(tokenizer, vocab_size)
            tokenizer.save(path)
        except (OSError, ValueError) as error:
            failure = error
    if distributed.ranks() > 1:
        distributed.meeting(timedelta(seconds=config.faults.save_timeout))()
    if distributed.any_rank(failure is not None):
        raise failure or ValueError("the first rank could not learn the tokenizer")
    tokenizer = Tokenizer.load(path)
    _check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def _check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"the captions give only {tokenizer.vocab_size} byte-pair tokens of the {vocab_size} "
            f"that the model's text_vocab asks for: set text_vocab to {tokenizer.vocab_size} "
            "(for CLIP, 2 more)"
        )

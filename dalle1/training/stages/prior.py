"""Stage two: a prior of captions and image tokens (section 2.2), ours or an encoder-decoder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from dalle1 import registry
from dalle1.common.images import contact_sheet, to_pil
from dalle1.common.weights import fingerprint
from dalle1.data.shards.index import TOKENS, Index
from dalle1.data.shards.loader import Batch
from dalle1.data.shards.token_shard import TokenShard
from dalle1.data.transforms import Augmentation, augment_dalle
from dalle1.generation.batches import draw_captions
from dalle1.generation.images import decode
from dalle1.model import Model
from dalle1.protocols import Ranker
from dalle1.seq2seq.config import Seq2SeqConfig
from dalle1.seq2seq.model import Seq2Seq
from dalle1.training import distributed
from dalle1.training.config import RunConfig
from dalle1.training.initialization import sampling_passed_on
from dalle1.training.stages.base import (
    SHEET_COLUMNS,
    Metrics,
    Sharding,
    Stage,
    device_of,
    pixels_of,
)
from dalle1.training.stages.text_tokenizer import fingerprint_of, run_tokenizer
from dalle1.transformer.config import Execution, TransformerConfig
from dalle1.transformer.model import Transformer
from dvae.calls import trusted
from dvae.codec import Codec

TrainedPrior = Transformer | Seq2Seq


def make_prior(
    shape: TransformerConfig | Seq2SeqConfig,
    execution: Execution | None = None,
    seed: int | None = None,
) -> TrainedPrior:
    """A prior of this shape, with initial weights."""
    if isinstance(shape, Seq2SeqConfig):
        return Seq2Seq(shape, execution, seed)
    return Transformer(shape, execution, seed)


@dataclass
class TokenBatch:
    """A pass of stage two: captions as tokens, and the images that the codec will encode."""

    text: Tensor  # int64 [b, text_length]
    images: Batch  # or their tokens
    text_count: float  # text targets of a pass, mean over the passes of all ranks


class PriorStage(Stage):
    """Stage two: a prior over captions and a frozen codec's tokens (section 2.2)."""

    model: TrainedPrior

    def __init__(self, config: RunConfig, sharding: Sharding | None = None) -> None:
        """sharding: given, weights are spread over the ranks as they are made."""
        super().__init__(config)
        assert config.prior is not None and config.codec is not None
        t = config.prior
        codec: Codec = registry.load("codec", config.codec)
        ranker: Ranker | None = registry.load("ranker", config.ranker) if config.ranker else None
        for part in (codec, ranker):
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        side = t.grid * codec.stride
        if side != config.reader.image_size:
            raise ValueError(
                f"reader.image_size is {config.reader.image_size}, but a grid of {t.grid} tokens "
                f"of the codec {config.codec} is {side} pixels"
            )
        # In a tuple, where neither DeepSpeed nor the checkpoint takes them for trained weights.
        self._frozen = (codec, ranker)
        self.tokenizer = run_tokenizer(config, t.text_vocab, t.text_length)
        self._shape = t
        self._model_with(self.empty_model())  # refuses parts that do not fit
        if sharding is None:
            self.model = make_prior(t, config.execution, config.seed)
        else:
            with sharding.init_context():
                self.model = make_prior(t, config.execution, config.seed)
            self.model.initialize(config.seed, sharding.unsharded)
        self.freeze_the_rest()
        self._set_precision(config.parallel.precision)

    @property
    def augmentation(self) -> Augmentation:
        return augment_dalle

    def fingerprints(self) -> dict[str, str]:
        codec, ranker = self._frozen
        found = {"codec": fingerprint(codec), "tokenizer": fingerprint_of(self.tokenizer)}
        if ranker is not None:
            # With what it reads captions by, where it has a tokenizer of its own.
            reader = getattr(getattr(ranker, "tokenizer", None), "fingerprint", None)
            found["ranker"] = fingerprint(ranker) + (f"-{reader()}" if reader else "")
        return found

    def _set_precision(self, precision: str) -> None:
        for layer in self.model.residual_layers:
            if precision == "bf16":
                layer.narrow = torch.bfloat16
            elif precision == "fp16":
                self.gradient_scales += layer.scale_gradients(distributed.world_size())

    def empty_model(self) -> TrainedPrior:
        with torch.device("meta"):
            return make_prior(self._shape)

    def modules_gathered_in_turn(self) -> Sequence[nn.Module]:
        return self.model.residual_layers

    def _model_with(self, prior: nn.Module) -> Model:
        assert isinstance(prior, Transformer | Seq2Seq)
        codec, ranker = self._frozen
        return Model(self.tokenizer, prior, codec, ranker)

    def _text(self, batch: Batch) -> Tensor:
        rows = []
        empty = self.model.empty_caption().cpu()
        dropout = self.settings.caption_dropout if self.training else 0.0
        for caption, seed in zip(batch.captions, batch.seeds, strict=True):
            rng = random.Random(seed)
            row = self.tokenizer.encode(caption, rng if self.training else None)[0]
            rows.append(empty if dropout and rng.random() < dropout else row)
        return torch.stack(rows)

    def micro_batches(self, batch: Batch, size: int) -> Sequence[TokenBatch]:
        text, images = self._text(batch), batch.split(size)
        count = self.model.count_text_targets(text) / len(images)
        # The loss is divided by the whole batch's count, not each part by its own (2.4, 2.2).
        mean = distributed.mean_over_ranks({"count": count})["count"]
        return [TokenBatch(*pair, mean) for pair in zip(text.split(size), images, strict=True)]

    def _image_tokens(self, batch: Batch, device: torch.device) -> Tensor:
        """int64 [b, grid²]: those of token shards, or what the codec makes of the images."""
        if batch.tokens is not None:
            return batch.tokens.to(device, torch.int64)
        codec = self._frozen[0]
        if isinstance(codec, nn.Module):
            codec.to(device)
        return rearrange(codec.encode(pixels_of(batch, device)), "b r c -> b (r c)")

    @trusted()
    def forward(self, part: TokenBatch, step: int) -> tuple[Tensor, Metrics]:
        device = device_of(self.model)
        image_tokens = self._image_tokens(part.images, device)
        losses = self.model.loss(part.text.to(device), image_tokens, part.text_count)
        return losses.loss, losses.metrics

    @torch.no_grad()
    def draw_contact_sheet(
        self, model: nn.Module, batch: Batch
    ) -> tuple[Image.Image, dict[str, float]] | None:
        """Captions of the batch, each with its own image and a few candidates, unranked."""
        full = self._model_with(model).to(device_of(self.model))
        rows, captions = [], batch.captions[:SHEET_COLUMNS]
        drawn = draw_captions(full, captions, SHEET_COLUMNS - 1, self.settings.seed)
        for own, candidates in zip(self._own(full, batch), drawn, strict=False):
            rows.append([to_pil(image) for image in (own, *candidates.images)])
        return contact_sheet(rows, captions, ("its own", "drawn"), columns_before_gap=1), {}

    def _own(self, model: Model, batch: Batch) -> Tensor:
        """The batch's own images [b, 3, h, w] in [0, 1], decoded where there are tokens alone."""
        if batch.images is not None:
            return batch.images / 255
        assert batch.tokens is not None
        tokens = batch.tokens[:SHEET_COLUMNS].to(torch.int64)
        return decode(model.codec, tokens, model.prior.grid)

    def check_data(self, index: Index) -> None:
        """Token shards must be of this codec, or at least of its grid and vocabulary."""
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
                    f"prior one of {ours}: make them anew with launch/tokenize.py and "
                    f"codec={self.settings.codec}"
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
                f"data: the token shards {index.data!r} are of the codec {made.dvae}, codec "
                f"{self.settings.codec} is {mine}: what their tokens mean differs"
            )

    def export(self, model: nn.Module, folder: Path) -> None:
        exported = self._model_with(model)
        exported.sampling = sampling_passed_on(self.settings, folder)
        exported.save(folder)

"""CLIP, which ranks the candidates (section 2.6)."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor, nn

from dalle1.clip.model import CLIP, KIND, MAX_LOGIT_SCALE, CaptionEncoder
from dalle1.common.images import contact_sheet, to_pil
from dalle1.data.shards.loader import Batch
from dalle1.data.transforms import Augmentation, augment_dalle
from dalle1.training import distributed
from dalle1.training.config import RunConfig
from dalle1.training.stages.base import (
    SHEET_COLUMNS,
    Metrics,
    ParameterGroup,
    Stage,
    autocast,
    device_of,
    pixels_of,
)
from dalle1.training.stages.drawings import Drawings
from dalle1.training.stages.text_tokenizer import fingerprint_of, run_tokenizer
from dvae.calls import trusted
from dvae.storage import save_part


class CLIPStage(Stage):
    """CLIP, by the symmetric cross-entropy over the global batch; it also learns the tokenizer.

    With `drawings`, a model draws the batch's captions, and each text finds its image among these
    drawings, too.
    """

    model: CLIP

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        assert config.clip is not None and config.tokenizer is not None
        if config.clip.is_resnet:
            layers = config.clip.vision_layers
            raise ValueError(
                f"clip.vision_layers: expected a number of layers, got {layers}; a ResNet's "
                "running statistics are neither averaged nor kept in checkpoints: train a ViT"
            )
        if config.reader.image_size < config.clip.image_size:
            raise ValueError(
                f"reader.image_size {config.reader.image_size} must be at least clip.image_size "
                f"{config.clip.image_size}"
            )
        tokenizer = run_tokenizer(config, config.clip.text_vocab - 2, config.clip.text_length - 1)
        if not hasattr(tokenizer, "encode_for_clip"):
            raise ValueError(
                f"tokenizer: expected one with ids for CLIP (encode_for_clip), got "
                f"{type(tokenizer).__name__}; take another one"
            )
        self._part = tokenizer
        self.tokenizer = cast(CaptionEncoder, tokenizer)
        self.model = CLIP(config.clip)
        self.freeze_the_rest()
        self._drawings: Drawings | None = None
        if config.drawings is not None:
            narrow = torch.bfloat16 if config.parallel.precision == "bf16" else None
            self._drawings = Drawings(config.drawings, narrow)

    @property
    def augmentation(self) -> Augmentation:
        return augment_dalle

    def parameter_groups(self) -> list[ParameterGroup]:
        """Gains and biases are not decayed, and the logit scale is clipped (Radford et al. 2021,
        section 2.5)."""
        norms = [f"{name}." for name, m in self.named_modules() if isinstance(m, nn.LayerNorm)]
        scale, gains_and_biases, rest = "model.logit_scale", [], []
        for name, _ in self.named_parameters():
            if name.endswith("bias") or name.startswith(tuple(norms)):
                gains_and_biases.append(name)
            elif name != scale:
                rest.append(name)
        return [
            ParameterGroup(rest),
            ParameterGroup(gains_and_biases, decayed=False),
            ParameterGroup([scale], decayed=False, maximum=MAX_LOGIT_SCALE),
        ]

    def learning_rate_factors(self, step: int) -> list[float]:
        return [1.0, 1.0, 1.0]

    def fingerprints(self) -> dict[str, str]:
        found = {"tokenizer": fingerprint_of(self._part)}
        if self._drawings is not None:
            found["drawings.model"] = self._drawings.fingerprint()
        return found

    def empty_model(self) -> CLIP:
        with torch.device("meta"):
            return CLIP(self.model.config)

    def _tokens(self, captions: list[str]) -> Tensor:
        """int64 [b, text_length]"""
        ids = self.tokenizer.encode_for_clip(captions, self.model.config.text_length)
        return ids.to(device_of(self.model))

    @trusted()
    def forward(self, micro_batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        images, drawn = pixels_of(micro_batch, device_of(self.model)), None
        if self._drawings is not None:
            drawings = self._drawings.to(images.device)
            images = drawings.copies(images)
            drawn = drawings.draw(micro_batch.captions, micro_batch.seeds)
        tokens = self._tokens(micro_batch.captions)
        first = distributed.rank() * len(images)
        with autocast(self.settings, images.device):
            loss = self.model.loss(images, tokens, distributed.all_gather, first, drawn)
        return loss, {"logit_scale": self.model.scale().detach()}

    @torch.no_grad()
    def draw_contact_sheet(
        self, model: nn.Module, batch: Batch
    ) -> tuple[Image.Image, dict[str, float]] | None:
        """The batch's captions, each with its own image and then those that fit it best."""
        assert isinstance(model, CLIP)
        images = pixels_of(batch, device_of(model))
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
        model.tokenizer = self.tokenizer
        save_part(KIND, model, folder)

"""Scores of a dual encoder: an image encoder and a text encoder into one space.

Dimensions: b images, c captions, e shared embedding, H W image height and width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle1.common.fitting import Preprocessing
from dvae.calls import isolated
from dvae.images import check_images

SCORED = 256  # images of 224 x 224 pixels or less whose scores are computed at once
SCORED_SIDE = 224


class DualEncoder(nn.Module, ABC):
    """A `protocols.Ranker` and `EmbeddingRanker` by the cosine of two embeddings."""

    @abstractmethod
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings [b, e] of images, float [b, 3, H, W] in [0, 1]."""

    @abstractmethod
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Unit embeddings [c, e]."""

    @abstractmethod
    def scale(self) -> Tensor:
        """The factor [] that turns cosines into logits."""

    @property
    @abstractmethod
    def image_side(self) -> int:
        """The longer side that images are read at, in pixels."""

    @property
    def images_at_once(self) -> int:
        """Images that are embedded at once: as many as keep about the same memory busy."""
        return max(1, min(SCORED, SCORED * SCORED_SIDE**2 // self.image_side**2))

    @isolated()
    @torch.no_grad()
    def score(self, captions: Sequence[str], images: Tensor) -> Tensor:
        """Cosine similarities, float32 [c, b] on the CPU, of images, floats [b, 3, H, W] in
        [0, 1]."""
        check_images(images)
        text = self.embed_captions(captions)
        parts = [
            text @ self.embed_images(part.to(text.device)).t()
            for part in images.split(self.images_at_once)
        ]
        return torch.cat(parts, dim=1).float().cpu()


class PackagedEncoder(DualEncoder):
    """A dual encoder that another package makes.

    Attributes:
        encoder: the package's module.
        preprocessing: what it does to images first.
    """

    encoder: Any  # the packages' methods have no types
    preprocessing: Preprocessing

    @abstractmethod
    def _image_features(self, pixels: Tensor) -> Tensor:
        """Embeddings [b, e] of any length; pixels: as `preprocessing` makes them."""

    @abstractmethod
    def _text_features(self, captions: list[str]) -> Tensor:
        """Embeddings [c, e] of any length."""

    @property
    def image_side(self) -> int:
        """The longer side that images are read at, in pixels."""
        return max(self.preprocessing.size)

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = next(self.encoder.parameters())
        return weight

    @isolated()
    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings [b, e] of images, float [b, 3, H, W] in [0, 1]."""
        weight = self._weight
        pixels = self.preprocessing(images, weight.device, weight.dtype)
        return F.normalize(self._image_features(pixels).float(), dim=-1)

    @isolated()
    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Unit embeddings [c, e]."""
        return F.normalize(self._text_features(list(captions)).float(), dim=-1)

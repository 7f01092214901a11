"""What a model draws for the captions of a batch, as wrong examples for the CLIP that ranks it.

A CLIP that has only seen true images tells one thing from another, and not a good drawing from a
bad one of the same thing (docs/ranking.md).

Dimensions: b captions, k drawings of each, m image positions, R side of the training images, H W
height and width of the model's images in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from dalle1.common.fitting import Preprocessing
from dalle1.common.weights import fingerprint
from dalle1.generation.batches import PartDrawer
from dalle1.generation.images import decode
from dalle1.generation.options import SamplingOptions
from dalle1.model import load
from dalle1.training.clip_config import DrawingsSettings


class Drawings:
    """A frozen model, and what it makes of a batch."""

    def __init__(self, settings: DrawingsSettings, dtype: torch.dtype | None = None) -> None:
        """Opens the model.

        Args:
            settings: of the drawings.
            dtype: of its prior's arithmetic; None: that of its weights.

        Raises:
            ValueError: the folder holds no model that draws.
        """
        try:
            self._model = load(settings.model, ranker="none").to("cpu", dtype)
        except ValueError as error:
            raise ValueError(f"drawings.model: {error}") from error
        self._candidates = settings.candidates
        options = SamplingOptions(temperature=settings.temperature)
        self._drawer = PartDrawer(self._model.prior, options)

    def fingerprint(self) -> str:
        """Of what the images depend on beside the settings."""
        return f"{fingerprint(self._model.prior)}-{fingerprint(self._model.codec)}"

    def to(self, device: torch.device) -> Drawings:
        """Moves the model, where it is elsewhere; returns itself."""
        self._model.to(device)
        return self

    @torch.no_grad()
    def copies(self, images: Tensor) -> Tensor:
        """Training images as the codec copies them: float32 [b, 3, H, W] of [b, 3, R, R] in [0, 1].

        Without them all that a codec does to an image would be the mark of a drawing.
        """
        codec, grid = self._model.codec, self._model.prior.grid
        size = (grid[0] * codec.stride, grid[1] * codec.stride)
        tokens = codec.encode(Preprocessing(size).fitted(images))
        return self._decoded(rearrange(tokens, "b r c -> b (r c)"))

    @torch.no_grad()
    def draw(self, captions: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Drawings of captions: float32 [b * k, 3, H, W] in [0, 1].

        Those of a caption depend on the caption and its seed alone, up to rounding.
        """
        prior = self._model.prior
        text = torch.cat([self._model.tokenizer.encode(caption) for caption in captions])
        shape = (self._candidates, prior.grid[0] * prior.grid[1])
        uniforms = np.stack([np.random.default_rng(seed).random(shape) for seed in seeds])
        tokens = self._drawer.draw(text, torch.from_numpy(uniforms))
        return self._decoded(rearrange(tokens, "b k m -> (b k) m"))

    def _decoded(self, tokens: Tensor) -> Tensor:
        images = decode(self._model.codec, tokens, self._model.prior.grid)
        return images.to(self._model.device)

"""What the stages of codecs share: a warm start without tokens, contact sheets, exports.

Dimensions: b batch, c color channels, H W image height and width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import dvae
from dalle1.common.images import contact_sheet, to_pil
from dalle1.data.shards.loader import Batch
from dalle1.data.transforms import Augmentation, augment_dvae
from dalle1.training.config import RunConfig
from dalle1.training.stages.base import SHEET_COLUMNS, Phase, Stage, device_of, pixels_of
from dvae.warm_start import MAX_SAMPLES


class CodecStage(Stage):
    """A codec in training, which reads no captions.

    A warm start trains without the codebook. `replacement_weights` then set it.

    Attributes:
        warm_start_steps: updates of the warm start; 0: there is none.
        warm_start_learning_rate: of the warm start, at its peak.
    """

    model: dvae.DVAE | dvae.VQGAN
    warm_start_steps: int
    warm_start_learning_rate: float

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._uses_codebook = True  # in the last pass

    def _check_warm_start(self, section: str, images: int) -> None:
        """Raises ValueError for a warm start that does not end, or whose end cannot set the codes.

        Args:
            section: of its settings, for the message.
            images: given to k-means.
        """
        if not self.warm_start_steps:
            return
        if self.warm_start_steps >= self.settings.steps:
            raise ValueError(
                f"{section}.warm_start_steps {self.warm_start_steps} must be less than steps "
                f"{self.settings.steps}"
            )
        codes = self.model.vocab_size
        tokens = (self.settings.reader.image_size // self.model.out_stride) ** 2
        fewest, most = -(-codes // tokens), MAX_SAMPLES // tokens
        if not fewest <= images <= most:
            raise ValueError(
                f"{section}.warm_start_images: expected {fewest} to {most}, of which k-means can "
                f"make {codes} codes with {tokens} tokens an image, got {images}; set it to one of "
                "these"
            )

    @property
    def augmentation(self) -> Augmentation:
        return augment_dvae

    def phase(self, step: int) -> Phase:
        middle, s = self.warm_start_steps, self.settings
        if step < middle:
            return Phase(0, middle, self.warm_start_learning_rate)
        return Phase(middle, s.steps, s.optimizer.learning_rate)

    def replaces_weights(self, step: int) -> bool:
        return bool(self.warm_start_steps) and step == self.warm_start_steps

    def _inputs(self, images: Tensor) -> Tensor:
        """What the encoder reads, of the images that the decoder is to write: these, or where it
        writes twice the side, half of theirs, each pixel the mean of four. Both [b, c, H, W]."""
        smaller = self.model.out_stride // self.model.stride
        return F.avg_pool2d(images, smaller) if smaller > 1 else images

    @torch.no_grad()
    def draw_contact_sheet(
        self, model: nn.Module, batch: Batch
    ) -> tuple[Image.Image, dict[str, float]] | None:
        """Images above their copies, and the copies' PSNR in dB, a mean over the images."""
        if not self._uses_codebook:
            return None  # the warm start has no tokens to draw
        assert isinstance(model, dvae.DVAE | dvae.VQGAN)
        images = pixels_of(batch, device_of(model))
        decoded = model.decode(model.encode(self._inputs(images)))
        error = (decoded - images).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        psnr = float(-10 * torch.log10(error).mean())
        rows = [[to_pil(p.cpu()) for p in side[:SHEET_COLUMNS]] for side in (images, decoded)]
        return contact_sheet(rows, ["image", "encoded and decoded"]), {"psnr": psnr}

    def export(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, dvae.DVAE | dvae.VQGAN)
        model.save(folder)

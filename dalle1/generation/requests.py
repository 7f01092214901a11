"""What is drawn for captions, checked against a model before any work.

Dimensions: H W image height and width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dalle1.common.image_inputs import ImageLike, image_batches, read_images
from dalle1.common.weights import device_of
from dalle1.generation.options import SamplingOptions
from dalle1.protocols import TokenModel
from dvae.calls import isolated

LARGEST_NUMBER = 2**63 - 1  # of a candidate, in int64


@dataclass(frozen=True)
class DrawRequest:
    """Candidates of captions; arguments of `dalle1.sample`.

    Attributes:
        captions: a few, each with the same number of candidates.
        candidates: drawn for each caption.
        keep: kept of them, the best first.
        options: how tokens are drawn.
        seed: of the random numbers.
        rows: token rows that are kept of `pixels`.
        pixels: the image to complete, float32 [1, 3, H, W] in [0, 1]; None: none.
        first: the first candidate's number.
        of_fewer: whether to hand on, too, what is best of fewer candidates
            (`Result.best_of_fewer`).
    """

    captions: tuple[str, ...]
    candidates: int
    keep: int
    options: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0
    rows: int = 0
    pixels: Tensor | None = None
    first: int = 0
    of_fewer: bool = False

    def check(self, model: TokenModel, ranked: bool) -> None:
        """Raises ValueError where the request does not fit the model.

        ranked: whether the model has a ranker, which chooses among more candidates than are kept.
        """
        candidates, keep = self.candidates, self.keep
        if candidates < 1:
            raise ValueError(f"candidates: expected at least 1, got {candidates}")
        if not 1 <= keep <= candidates:
            raise ValueError(f"keep: expected 1 to candidates = {candidates}, got {keep}")
        if not 0 <= self.first <= LARGEST_NUMBER - candidates:
            raise ValueError(
                f"first_candidate: expected 0 to 2**63 - 1 - candidates, got {self.first}"
            )
        if not ranked and keep < candidates:
            raise ValueError(
                f"keep: the model has no ranker to choose by: ask for keep = candidates = "
                f"{candidates}, or train shapes/clip and export again"
            )
        for caption in self.captions:
            model.tokenizer.encode(caption)  # raises ValueError for an empty caption
        self._check_pixels(model)

    def _check_pixels(self, model: TokenModel) -> None:
        grid, stride = model.prior.grid, model.codec.stride
        if self.pixels is None:
            if self.rows:
                raise ValueError(f"rows: {self.rows} rows of which image? Give image too")
            return
        if not 0 < self.rows < grid[0]:
            raise ValueError(
                f"rows: expected 1 to {grid[0] - 1} of the {grid[0]} token rows, got {self.rows}"
            )
        height, width = grid[0] * stride, grid[1] * stride
        if self.pixels.shape[2:] != (height, width):
            got = f"{self.pixels.shape[3]}x{self.pixels.shape[2]}"
            raise ValueError(f"image: expected {width}x{height} pixels, got {got}")

    @isolated()
    @torch.no_grad()
    def prefix(self, model: TokenModel) -> Tensor | None:
        """Tokens of the image's first rows, which every candidate begins with: int64 [rows x
        columns], on the CPU."""
        if self.pixels is None:
            return None
        tokens = model.codec.encode(self.pixels.to(device_of(model.codec)))
        return tokens[0, : self.rows].flatten().cpu()


def image_pixels(image: ImageLike | None) -> Tensor | None:
    """The image to complete, float32 [1, 3, H, W] in [0, 1]; see `read_images`.

    Raises ValueError where it is no image, or not one.
    """
    if image is None:
        return None
    found = read_images(image, "image")
    if len(found) != 1:
        raise ValueError(f"image: expected one image, got {len(found)}")
    (pixels,) = image_batches(found)
    return pixels

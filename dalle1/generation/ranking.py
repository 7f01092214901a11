"""Candidates of a caption, scored: by their tokens where the ranker reads those, else as images.

Dimensions: b candidates, r c rows and columns of the token grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from dalle1.common.images import to_pil
from dalle1.generation.batches import CaptionImages
from dalle1.generation.requests import DrawRequest
from dalle1.protocols import Ranker, TokenModel, TokenRanker
from dvae.calls import trusted


@dataclass
class BestImages:
    """The best of one caption's candidates."""

    drawn: int  # candidates that they were chosen among
    numbers: Tensor  # int64 [keep], the candidates'
    tokens: Tensor  # int64 [keep, r, c]
    scores: Tensor  # float32 [keep]
    images: list[Image.Image]


def best_images(
    model: TokenModel,
    ranker: Ranker | None,
    caption: str,
    drawn: CaptionImages,
    request: DrawRequest,
) -> BestImages:
    """The best of a caption's candidates by the ranker; without a ranker, the first."""
    count = len(drawn.tokens)
    scores = torch.full((count,), float("nan"))
    order = torch.arange(request.keep)
    if ranker is not None:
        scores = score_candidates(ranker, caption, drawn)
        order = scores.argsort(descending=True, stable=True)[: request.keep]
    folded = rearrange(drawn.tokens[order], "b (r c) -> b r c", c=model.prior.grid[1])
    images = [to_pil(image) for image in drawn.images[order]]
    return BestImages(count, request.first + order, folded, scores[order], images)


def score_candidates(ranker: Ranker, caption: str, drawn: CaptionImages) -> Tensor:
    """The ranker's scores of a caption's candidates: float32 [b]."""
    with trusted():  # a codec's images; an error here would lose them
        if isinstance(ranker, TokenRanker):
            return ranker.score_tokens([caption], drawn.tokens)[0]
        return ranker.score([caption], drawn.images)[0]

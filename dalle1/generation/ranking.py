"""Candidates of a caption, scored: by their tokens where the ranker reads those, else as images.

Dimensions: b candidates, r c rows and columns of the token grid.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    of_fewer: BestImages | None = None  # see `Result.best_of_fewer`


def best_images(
    model: TokenModel,
    ranker: Ranker | None,
    caption: str,
    drawn: CaptionImages,
    request: DrawRequest,
) -> BestImages:
    """The best of a caption's candidates by the ranker; without a ranker, the first."""
    scores = torch.full((len(drawn.tokens),), float("nan"))
    order = torch.arange(request.keep)
    if ranker is not None:
        scores = score_candidates(ranker, caption, drawn)
        order = scores.argsort(descending=True, stable=True)[: request.keep]
    best = _chosen(model, drawn, scores, order, request.first)
    if request.of_fewer and ranker is not None:
        ever = best_of_fewer(scores.tolist(), request.keep)
        others = sorted(set(ever) - set(order.tolist()))
        best.of_fewer = _chosen(
            model, drawn, scores, torch.tensor(others, dtype=torch.int64), request.first
        )
    return best


def _chosen(
    model: TokenModel, drawn: CaptionImages, scores: Tensor, order: Tensor, first: int
) -> BestImages:
    """Some of the candidates.

    order: int64 [keep], their places among those drawn, of which the first one's number is `first`.
    """
    tokens = rearrange(drawn.tokens[order], "b (r c) -> b r c", c=model.prior.grid[1])
    images = [to_pil(image) for image in drawn.images[order]]
    return BestImages(len(drawn.tokens), first + order, tokens, scores[order], images)


def best_of_fewer(scores: Sequence[float], keep: int) -> list[int]:
    """Places of the candidates that are among the best `keep` of the first n, for some n; rising.

    With these the best of any number of candidates can be looked at. Of N candidates in random
    order they are about keep * (1 + ln(N / keep)). Of equal scores the first comes first.
    """
    best: list[float] = []  # of those before, at most `keep`
    found = []
    for i, score in enumerate(scores):
        if len(best) == keep:
            lowest = min(best)
            if not score > lowest:
                continue
            best.remove(lowest)
        best.append(score)
        found.append(i)
    return found


def score_candidates(ranker: Ranker, caption: str, drawn: CaptionImages) -> Tensor:
    """The ranker's scores of a caption's candidates: float32 [b]."""
    with trusted():  # a codec's images; an error here would lose them
        if isinstance(ranker, TokenRanker):
            return ranker.score_tokens([caption], drawn.tokens)[0]
        return ranker.score([caption], drawn.images)[0]

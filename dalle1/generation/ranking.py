"""Candidates of a caption, scored: by their tokens where the ranker reads those, else as images;
and with the likelihood that the model gives them, where the ranker's config says so.

A CLIP tells what an image shows; it has seen true images alone and does not tell a good drawing of
it from a bad one. The model's likelihood does, and does not know captions as well.

Dimensions: c captions, b candidates or images, r c rows and columns of the token grid, H W image
height and width.
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
from dalle1.generation.likelihood import LikelihoodRanker
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
        scores = score_candidates(model, ranker, caption, drawn)
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


def likelihood_weight(ranker: Ranker | None) -> float:
    """What a nat of the model's log-likelihood adds to the ranker's scores; 0 where its config says
    nothing of it."""
    return float(getattr(getattr(ranker, "config", None), "likelihood_weight", 0.0))


def score_candidates(
    model: TokenModel, ranker: Ranker, caption: str, drawn: CaptionImages
) -> Tensor:
    """The scores, float32 [b], of a caption's candidates that the model drew."""
    weight = likelihood_weight(ranker)
    with trusted():  # a codec's images; an error here would lose them
        if isinstance(ranker, TokenRanker):
            scores = ranker.score_tokens([caption], drawn.tokens)[0]
        else:
            scores = ranker.score([caption], drawn.images)[0]
        if weight > 0:
            likelihood = LikelihoodRanker(model=model)
            scores = scores + weight * likelihood.score_tokens([caption], drawn.tokens)[0]
    return scores


def score_images(
    model: TokenModel, ranker: Ranker, captions: Sequence[str], images: Tensor
) -> Tensor:
    """The scores, float32 [c, b], of images, floats [b, 3, H, W] in [0, 1], whose tokens are not
    known; where the likelihood counts, the model's codec encodes them."""
    scores, weight = ranker.score(captions, images), likelihood_weight(ranker)
    if weight > 0:
        scores = scores + weight * LikelihoodRanker(model=model).score(captions, images)
    return scores

"""Candidates of a caption, scored: by their tokens where the ranker reads those, else as images."""

from __future__ import annotations

from torch import Tensor

from dalle1.generation.batches import CaptionImages
from dalle1.protocols import Ranker, TokenRanker
from dvae.calls import trusted


def score_candidates(ranker: Ranker, caption: str, drawn: CaptionImages) -> Tensor:
    """The ranker's scores of a caption's candidates: float32 [b]."""
    with trusted():  # a codec's images; an error here would lose them
        if isinstance(ranker, TokenRanker):
            return ranker.score_tokens([caption], drawn.tokens)[0]
        return ranker.score([caption], drawn.images)[0]

"""Ranking by the model's own likelihood: no second network is needed.

ruDALL-E sorts its images so. A model's likelihood prefers plain images, which have few surprises;
CLIP's score does not.

Dimensions: c captions, b images, t text positions, m image positions, v image tokens, k positions
of one step, H W image height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dalle1.common.fitting import Preprocessing
from dalle1.common.weights import device_of
from dalle1.generation.images import images_at_once
from dalle1.protocols import Prior, TokenModel, TokenwisePrior
from dvae.calls import isolated
from dvae.images import check_images
from dvae.storage import Kind

LOGITS_AT_ONCE = 2**26  # numbers, [b, m, v]; 8 images at the paper's size
MAX_ROWS = 64
STEP = 32  # positions of a step


class LikelihoodConfig(BaseModel):
    """What images are ranked by."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measure: Literal["log_prob", "perplexity"] = Field(
        "log_prob",
        description="log_prob: ln p(image tokens | caption) in nats; perplexity: ruDALL-E's, "
        "negative, so that more is better",
    )


class LikelihoodRanker:
    """A `protocols.TokenRanker` by the probabilities that the model's prior gives to tokens.

    Images without tokens are encoded by the model's codec first.

    The perplexity is that of ruDALL-E: the mean of exp(cross-entropy) over the tokens behind the
    first, those whose cross-entropy is 0 left out. This is the mean of 1 / p, so a single unlikely
    token may decide. (Their version 2 compares each probability with the token behind its own; here
    it is its own in all versions.)
    """

    def __init__(
        self, config: LikelihoodConfig | None = None, model: TokenModel | None = None
    ) -> None:
        self.config = config or LikelihoodConfig()
        self._model = model

    def bound_to(self, model: TokenModel) -> LikelihoodRanker:
        """The same measure of this model's likelihood."""
        return LikelihoodRanker(self.config, model)

    @property
    def model(self) -> TokenModel:
        """The model whose likelihood it is; ValueError where there is none."""
        if self._model is None:
            raise ValueError(
                "ranker: expected a model whose likelihood ranks, got none; name one, too"
            )
        return self._model

    @isolated()
    @torch.no_grad()
    def score(self, captions: Sequence[str], images: Tensor) -> Tensor:
        """Scores, float32 [c, b] on the CPU, of images, floats [b, 3, H, W] in [0, 1].

        They are brought to the size that the codec reads: the shorter side is resized, and the
        center is cut out.
        """
        check_images(images)
        codec, grid = self.model.codec, self.model.prior.grid
        size = (grid[0] * codec.stride, grid[1] * codec.stride)
        fitted = Preprocessing(size).fitted(images.float()).to(device_of(codec))
        parts = fitted.split(images_at_once(codec, grid))
        tokens = torch.cat([codec.encode(part) for part in parts])
        return self.score_tokens(captions, rearrange(tokens, "b r c -> b (r c)"))

    @isolated()
    @torch.no_grad()
    def score_tokens(self, captions: Sequence[str], tokens: Tensor) -> Tensor:
        """Scores, float32 [c, b] on the CPU, of image tokens, int64 [b, m]."""
        prior = self.model.prior
        text = self.model.tokenizer.encode(captions).to(device_of(prior))
        tokens = tokens.to(device_of(prior))
        rows = LOGITS_AT_ONCE // (tokens.shape[1] * prior.image_vocab)
        parts = tokens.split(min(MAX_ROWS, max(1, rows)))
        scores = [torch.cat([self._score(row, part) for part in parts]) for row in text]
        return torch.stack(scores).cpu()

    def _score(self, text: Tensor, image: Tensor) -> Tensor:
        """float32 [b] of one caption, int64 [t], and image tokens, int64 [b, m]."""
        prior, texts = self.model.prior, text.expand(len(image), -1)
        if self.config.measure == "log_prob":
            return prior.log_prob(texts, image)
        if isinstance(prior, TokenwisePrior):
            log_probs = prior.token_log_probs(texts, image)
        else:
            log_probs = stepped_log_probs(prior, text, image)
        return -perplexity(log_probs)


def perplexity(log_probs: Tensor) -> Tensor:
    """ruDALL-E's perplexity, float32 [b], of the tokens' log-probabilities, [b, m].

    Where all of them are certain it is 1.
    """
    cross_entropy = -log_probs[:, 1:]
    counted = cross_entropy != 0
    total = cross_entropy.exp().masked_fill(~counted, 0).sum(dim=1)
    count = counted.sum(dim=1)
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


def stepped_log_probs(prior: Prior, text: Tensor, image: Tensor) -> Tensor:
    """ln p of each token given the caption and those before it: float32 [b, m], of any prior.

    text: int64 [t]; image: int64 [b, m]. The tokens are fed through a decoding state.
    """
    state = prior.start(1, len(image), False)
    state.prefill(text[None])
    start = image.new_full((len(image), 1), prior.image_vocab)
    before = torch.cat([start, image[:, :-1]], dim=1)
    result = []
    for first in range(0, image.shape[1], STEP):
        here = slice(first, first + STEP)
        logits = state.step(before[:, here], first)  # [b, k, v]
        chosen = logits.log_softmax(dim=-1).gather(-1, image[:, here, None])[..., 0]
        result.append(chosen)
    return torch.cat(result, dim=1)


KIND: Kind = Kind("ranker", "likelihood", LikelihoodConfig, LikelihoodRanker, None)

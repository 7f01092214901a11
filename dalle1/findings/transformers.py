"""Transformers that do one thing otherwise than the paper's, for findings alone.

They are trained and their losses are measured. They draw no images: the caches of decoding know the
paper's attention only. Weights have the names of the paper's model, so that a seed gives all of
them the same initial weights.

Dimensions: b batch, n stream positions, t text positions, m image positions, s heads, d head size,
w width, v text and image tokens together.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dalle1.transformer.config import Execution, TransformerConfig
from dalle1.transformer.layers import Attention, Layer
from dalle1.transformer.loss import IGNORED
from dalle1.transformer.masks import allowed
from dalle1.transformer.model import Losses, Transformer
from dalle1.transformer.sequence import Pattern
from dalle1.transformer.tokens import check_tokens, image_targets, text_targets

DENSE = Execution(attention="dense")


class MaskedPaddingTransformer(Transformer):
    """Nothing attends to padding, in place of a learned embedding for each position.

    The scores of keys that read a padding are -inf. Position p reads token p - 1, and position 0
    the start, so that every query has a key. What a text position computes behind the caption is
    read by nobody.
    """

    def __init__(self, config: TransformerConfig, seed: int) -> None:
        super().__init__(config, DENSE, seed)
        self.layers = nn.ModuleList(MaskedLayer(config, p, DENSE) for p in config.patterns)
        self.initialize(seed)

    def states(self, text_tokens: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As `Transformer.states`."""
        check_tokens(self.config, text_tokens, image_tokens)
        t, m = self.config.text_length, max(1, image_tokens.shape[1])
        readable = torch.ones(len(text_tokens), t + m, dtype=torch.bool)
        readable[:, 1:t] = text_tokens[:, :-1] < self.config.text_vocab
        x = self.embed(text_tokens, image_tokens, m)
        for layer in self.layers:
            x = layer(x, readable)
        x = self.final_norm(x)
        return x[:, :t], x[:, t:]


class MaskedLayer(Layer):
    """A layer whose attention reads some keys alone."""

    def __init__(self, config: TransformerConfig, pattern: Pattern, execution: Execution) -> None:
        super().__init__(config, pattern, execution)
        self.attention = MaskedAttention(config, pattern, execution)

    def forward(self, x: Tensor, readable: Tensor) -> Tensor:  # type: ignore[override]
        """[b, n, w] and, which keys may be read, bool [b, n] -> [b, n, w]."""
        return self.add(1, self.add(0, x, readable))


class MaskedAttention(Attention):
    """The pattern's attention to some keys alone."""

    def forward(self, x: Tensor, readable: Tensor) -> Tensor:  # type: ignore[override]
        """[b, n, w] and bool [b, n] -> [b, n, w]."""
        n = x.shape[1]
        mask = allowed(self.pattern, self.text_length, self.grid, self.kernel)[:n, :n]
        mask = mask & readable[:, None, None]  # [b, 1, n, n]
        return self.merge(F.scaled_dot_product_attention(*self.project(x), attn_mask=mask))


class SeparateSoftmaxTransformer(Transformer):
    """Image positions attend to the text and to the image in two softmaxes, and add the results.

    The text's attention is the paper's. The queries, keys and values are those that one softmax
    would use, so that both models have the same weights.
    """

    def __init__(self, config: TransformerConfig, seed: int) -> None:
        super().__init__(config, DENSE, seed)
        for layer, pattern in zip(self.layers, config.patterns, strict=True):
            assert isinstance(layer, Layer)
            layer.attention = SeparateAttention(config, pattern, DENSE)
        self.initialize(seed)


class SeparateAttention(Attention):
    """A softmax over the keys of the text and another over those of the image."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sparse: bool) -> Tensor:
        """[b, s, n, d] each -> [b, s, n, d]."""
        t, n = self.text_length, q.shape[2]
        mask = allowed(self.pattern, t, self.grid, self.kernel)[:n, :n]
        text = F.scaled_dot_product_attention(q, k[:, :, :t], v[:, :, :t], mask[:, :t])
        image = F.scaled_dot_product_attention(q[:, :, t:], k[:, :, t:], v[:, :, t:], mask[t:, t:])
        return torch.cat([text[:, :, :t], text[:, :, t:] + image], dim=2)


class JointVocabularyTransformer(Transformer):
    """Every position predicts a token of text or image, in one softmax over both vocabularies.

    In the paper's model text positions predict text tokens alone, and image positions image tokens.
    `image_logits` and `token_log_probs` are those of image tokens alone here too, as for drawing.
    """

    def __init__(self, config: TransformerConfig, seed: int) -> None:
        super().__init__(config, DENSE, seed)

    def loss(
        self, text_tokens: Tensor, image_tokens: Tensor, text_count: float | None = None
    ) -> Losses:
        """As `Transformer.loss` of a full batch, over both vocabularies."""
        assert text_count is None, "one pass"
        targets = text_targets(self.config, text_tokens, image_tokens)
        image = image_targets(self.config, image_tokens) + self.config.text_classes
        parts = []
        pairs = zip(self.states(text_tokens, image_tokens), (targets, image), strict=True)
        for states, wanted in pairs:
            logits = torch.cat([self.text_head(states), self.image_head(states)], dim=-1).float()
            flat = rearrange(logits, "b n v -> (b n) v")
            parts.append(F.cross_entropy(flat, wanted.flatten(), ignore_index=IGNORED))
        weight = self.config.text_loss_weight
        return Losses(weight * parts[0] + (1 - weight) * parts[1], parts[0], parts[1])

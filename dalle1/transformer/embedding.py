"""What the transformer's layers read first: embeddings of tokens, plus those of their positions.

Dimensions: b batch, t text positions, m image positions, w width, r c grid rows and columns.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.tokens import embedded_ids


class InputEmbedding(nn.Module):
    """The transformer's tables of tokens and positions (paper section 2.2, appendix B.1)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = c = config
        # One table for byte-pair tokens and, behind them, the padding of each text position.
        self.text_embedding = nn.Embedding(c.text_ids, c.width)
        self.text_position = nn.Embedding(c.text_positions, c.width)
        if c.variant.start == "vectors":
            self.start_of_text = nn.Parameter(torch.empty(c.width))
        self.image_embedding = nn.Embedding(c.image_vocab, c.width)
        if c.variant.image_positions == "grid":
            self.row_position = nn.Embedding(c.grid, c.width)
            self.column_position = nn.Embedding(c.grid, c.width)
        else:
            self.image_position = nn.Embedding(c.sequence.image_length, c.width)
        if c.variant.start == "vectors":
            self.start_of_image = nn.Parameter(torch.empty(c.width))

    def embed(self, text_tokens: Tensor, image_tokens: Tensor, positions: int) -> Tensor:
        """States of all text inputs and of the first of the image: [b, t + positions, w].

        Args:
            text_tokens: int64 [b, t].
            image_tokens: int64 [b, m], those that the positions read, or more.
            positions: of the image.
        """
        image = self.embed_image(text_tokens, image_tokens, positions)
        x = torch.cat([self.embed_text(text_tokens), image], dim=1)
        share = self.config.variant.embedding_gradient
        # The same value, and a smaller gradient.
        return x if share == 1 else torch.lerp(x.detach(), x, share)

    def embed_text(self, text_tokens: Tensor) -> Tensor:
        """States of the text inputs: int64 [b, t] -> [b, t, w].

        Behind a start they are [start, t0 ... t_{T-2}], else [t0 ... t_{T-1}].
        """
        b, t = text_tokens.shape
        ids = embedded_ids(self.config, text_tokens)
        if self.config.shift:
            x = self.text_embedding(ids)
        else:
            start = self._start_of_text().expand(b, 1, -1)
            x = torch.cat([start, self.text_embedding(ids[:, :-1])], dim=1)
        embedded: Tensor = x + self.text_position.weight[:t]
        return embedded

    def _start_of_text(self) -> Tensor:  # [w]
        v = self.config.variant
        vector = self.start_of_text if v.start == "vectors" else None
        return self.text_embedding.weight[v.start_token] if vector is None else vector

    def image_start(self, text_tokens: Tensor) -> Tensor:
        """What stands before the first image token of captions, without its position: int64
        [b, t] -> [b or 1, w]."""
        if self.config.variant.start == "vectors":
            return self.start_of_image[None]
        start: Tensor = self.text_embedding(embedded_ids(self.config, text_tokens)[:, -1])
        return start

    def embed_image(self, text_tokens: Tensor, image_tokens: Tensor, positions: int) -> Tensor:
        """States of the first image inputs, of captions int64 [b, t]: int64 [b, m] ->
        [b, positions, w].

        Behind a start they are [start, z0, z1 ...], else [z0, z1 ...].
        """
        b = image_tokens.shape[0]
        if self.config.shift:
            x = self.image_embedding(image_tokens[:, :positions])
        else:
            start = self.image_start(text_tokens)[:, None].expand(b, -1, -1)
            tokens = self.image_embedding(image_tokens[:, : positions - 1])
            x = torch.cat([start, tokens], dim=1)
        embedded: Tensor = x + self.image_positions()[:positions]
        return embedded

    def embed_image_inputs(self, tokens: Tensor, start: Tensor) -> Tensor:
        """Embeddings [..., w], without positions, of int64 [...]; image_vocab is the start, which
        has the embedding `start`."""
        is_start = (tokens == self.config.image_vocab)[..., None]
        embedded = self.image_embedding(tokens.clamp(max=self.config.image_vocab - 1))
        return torch.where(is_start, start, embedded)

    def image_positions(self) -> Tensor:
        """What is added to each image input for its position, raster order: [r * c, w]."""
        if self.config.variant.image_positions == "raster":
            table = self.image_position.weight
        else:
            rows = rearrange(self.row_position.weight, "r w -> r 1 w")
            columns = rearrange(self.column_position.weight, "c w -> 1 c w")
            table = rearrange(rows + columns, "r c w -> (r c) w")
        if self.config.variant.start == "token":
            # Each token has its own position with it: the first input is the text's last token.
            last = self.text_position.weight[self.config.text_length]
            table = torch.cat([last[None], table[:-1]])
        return table

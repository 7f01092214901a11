"""The two stacks of layers with their embeddings: encoder of captions, decoder of image tokens.

Dimensions: b batch, t text positions, m image positions, w width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dalle1.seq2seq.config import Seq2SeqConfig
from dalle1.seq2seq.layers import EPSILON, BiasNorm, DecoderLayer, EncoderLayer
from dalle1.transformer.config import Execution


class Encoder(nn.Module):
    """Captions to states: attention among all tokens that are no padding."""

    def __init__(self, c: Seq2SeqConfig, execution: Execution) -> None:
        super().__init__()
        self.embedding = nn.Embedding(c.text_vocab, c.width)
        self.position = nn.Embedding(c.text_length, c.width)
        self.embedding_norm = nn.LayerNorm(c.width, EPSILON)
        self.layers = nn.ModuleList(EncoderLayer(c, execution) for _ in range(c.encoder_layers))
        self.norm = BiasNorm(c.width)

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """States [b, t, w] of int64 [b, t]; counts: which are no padding, bool [b, 1, 1, t].

        Padding beyond the vocabulary is embedded as its last token: no state depends on it.
        """
        tokens = tokens.clamp(max=self.embedding.num_embeddings - 1)
        x = self.embedding_norm(self.embedding(tokens) + self.position.weight)
        for layer in self.layers:
            x = layer(x, counts)
        y: Tensor = self.norm(x)
        return y


class Decoder(nn.Module):
    """Image tokens, each given those before it and the caption's states."""

    def __init__(self, c: Seq2SeqConfig, execution: Execution) -> None:
        super().__init__()
        self.config = c
        self.embedding = nn.Embedding(c.image_embeddings, c.width)
        self.position = nn.Embedding(c.image_length, c.width)
        self.embedding_norm = nn.LayerNorm(c.width, EPSILON)
        self.layers = nn.ModuleList(DecoderLayer(c, execution) for _ in range(c.decoder_layers))
        self.norm = BiasNorm(c.width)
        self.head = nn.Linear(c.width, c.image_embeddings, bias=False)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """States [..., w] of what stands before image positions, int64 [...]: the image token of
        the position before, or `image_vocab`, the start."""
        c = self.config
        if c.start_row != c.image_vocab:
            tokens = tokens.masked_fill(tokens == c.image_vocab, c.start_row)
        x: Tensor = self.embedding_norm(self.embedding(tokens) + self.position(positions))
        return x

    def forward(self, tokens: Tensor, text: Tensor, counts: Tensor) -> Tensor:
        """States [b, m, w] that the head reads, of image tokens, int64 [b, m]; the last one is not
        read. text: the encoder's states [b, t, w], of which `counts` count."""
        before = torch.cat([torch.full_like(tokens[:, :1], self.config.image_vocab), tokens], dim=1)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embed(before[:, :-1], positions)
        for layer in self.layers:
            x = layer(x, text, counts)
        y: Tensor = self.norm(x)
        return y

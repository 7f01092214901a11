"""The transformer over caption tokens followed by image tokens (paper section 2.2, appendix B).

Dimensions: b batch, t text positions, m image positions, n = t + m, s heads, d head size,
w width (= s * d), r c grid rows and columns.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from dalle1.transformer.config import Execution, TransformerConfig
from dalle1.transformer.layers import Layer
from dalle1.transformer.loss import IGNORED, linear_cross_entropy
from dalle1.transformer.sequence import END_OF_CAPTION


@dataclass
class Losses:
    """Means in nats a token; `loss` is their weighted sum (section 2.2: 1/8 and 7/8)."""

    loss: Tensor
    text: Tensor
    image: Tensor


class Transformer(nn.Module):
    """Autoregressive model of caption tokens followed by image tokens."""

    def __init__(
        self,
        config: TransformerConfig | None = None,
        execution: Execution | None = None,
        seed: int | None = None,
    ) -> None:
        """seed: of the initial weights; None draws one from torch's generator."""
        super().__init__()
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        self.config = c = config or TransformerConfig()
        execution = execution or Execution()
        # One table for byte-pair tokens and, behind them, the padding of each text position.
        self.text_embedding = nn.Embedding(c.text_vocab + c.text_length, c.width)
        self.text_position = nn.Embedding(c.text_length, c.width)
        self.start_of_text = nn.Parameter(torch.empty(c.width))
        self.image_embedding = nn.Embedding(c.image_vocab, c.width)
        self.row_position = nn.Embedding(c.grid, c.width)
        self.column_position = nn.Embedding(c.grid, c.width)
        self.start_of_image = nn.Parameter(torch.empty(c.width))
        self.layers = nn.ModuleList(Layer(c, pattern, execution) for pattern in c.patterns)
        self.norm = nn.LayerNorm(c.width)
        self.text_head = nn.Linear(c.width, c.text_vocab)
        self.image_head = nn.Linear(c.width, c.image_vocab)
        self.initialize(seed)

    @torch.no_grad()
    def initialize(
        self,
        seed: int,
        whole: Callable[[nn.Parameter], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Ours, the paper gives none: N(0, init_std), the maps that end a block by 1/sqrt(2 L).

        What a weight begins with is a function of the seed and its name, so that it is the same
        however the weights are spread. whole: makes a sharded weight whole while it is set.
        """
        ends = ("attention.out.weight", "mlp.down.weight")
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            with whole(parameter):
                if name.endswith("norm.weight"):
                    parameter.fill_(1)
                elif name.endswith("bias"):
                    parameter.zero_()
                else:
                    std = self.config.init_std
                    if name.endswith(ends):
                        std /= math.sqrt(2 * self.config.layers)
                    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
                    values = torch.empty(parameter.shape, device="cpu")
                    parameter.copy_(values.normal_(0, std, generator=generator))

    def embed_text(self, text_tokens: Tensor) -> Tensor:
        """States of the text inputs [start, t0 ... t_{T-2}]: int64 [b, t] -> [b, t, w]."""
        b, t = text_tokens.shape
        start = self.start_of_text.expand(b, 1, -1)
        tokens = self.text_embedding(text_tokens[:, :-1])
        x: Tensor = torch.cat([start, tokens], dim=1) + self.text_position.weight[:t]
        return x

    def embed_image(self, image_tokens: Tensor, positions: int) -> Tensor:
        """States of the image inputs [start, z0 ... z_{m-2}]: int64 [b, >= m-1] -> [b, m, w]."""
        b = image_tokens.shape[0]
        start = self.start_of_image.expand(b, 1, -1)
        tokens = self.image_embedding(image_tokens[:, : positions - 1])
        x: Tensor = torch.cat([start, tokens], dim=1) + self.grid_positions()[:positions]
        return x

    def grid_positions(self) -> Tensor:
        """Row plus column embedding of each image position, raster order: [r * c, w]."""
        rows = rearrange(self.row_position.weight, "r w -> r 1 w")
        columns = rearrange(self.column_position.weight, "c w -> 1 c w")
        return rearrange(rows + columns, "r c w -> (r c) w")

    def forward(self, text_tokens: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every position; position p of a segment predicts its token p.

        text_tokens: int64 [b, text_length], padded by `Tokenizer.encode`;
        image_tokens: int64 [b, m], m <= grid^2, raster order; with none, the start alone is fed.
        Returns float32 [b, text_length, text_vocab] and [b, max(m, 1), image_vocab].
        Raises ValueError when a shape, type or token does not fit.
        """
        text, image = self.states(text_tokens, image_tokens)
        return self.text_head(text).float(), self.image_head(image).float()

    def states(self, text_tokens: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the two heads read, [b, text_length, w] and [b, max(m, 1), w]; as `forward`."""
        self.check_tokens(text_tokens, image_tokens)
        x = torch.cat(
            [
                self.embed_text(text_tokens),
                self.embed_image(image_tokens, max(1, image_tokens.shape[1])),
            ],
            dim=1,
        )
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return x[:, : self.config.text_length], x[:, self.config.text_length :]

    def loss(
        self, text_tokens: Tensor, image_tokens: Tensor, text_count: float | None = None
    ) -> Losses:
        """Cross-entropies of whole streams (section 2.2); shapes as for `forward`.

        Each is divided by the batch's count of targets of its kind. Text targets are the
        caption's tokens and one end-of-caption; the padding behind it is no target.
        text_count: of a part of a larger batch, the mean of the parts' counts of text targets (see
        `count_text_targets`): the mean of the parts' losses is then that of the whole.
        """
        text_states, image_states = self.states(text_tokens, image_tokens)
        targets = text_targets(text_tokens, self.config.text_vocab)
        text = linear_cross_entropy(
            rearrange(text_states, "b t w -> (b t) w"),
            self.text_head,
            rearrange(targets, "b t -> (b t)"),
        )
        if text_count is not None:
            text = text * ((targets != IGNORED).sum() / text_count)
        image = linear_cross_entropy(
            rearrange(image_states, "b m w -> (b m) w"),
            self.image_head,
            rearrange(image_tokens, "b m -> (b m)"),
        )
        weight = self.config.text_loss_weight
        return Losses(weight * text + (1 - weight) * image, text, image)

    def check_tokens(self, text_tokens: Tensor, image_tokens: Tensor) -> None:
        """Raises ValueError when the tokens do not fit the stream or the vocabularies."""
        c = self.config
        for name, tokens in (("text_tokens", text_tokens), ("image_tokens", image_tokens)):
            if tokens.ndim != 2 or tokens.dtype != torch.int64:
                raise ValueError(
                    f"{name}: expected int64 [batch, positions], got {tokens.dtype} "
                    f"{list(tokens.shape)}"
                )
        if text_tokens.shape[1] != c.text_length:
            raise ValueError(
                f"text_tokens: expected {c.text_length} positions (Tokenizer.encode pads to "
                f"them), got {text_tokens.shape[1]}"
            )
        if image_tokens.shape[1] > c.stream.image_length:
            raise ValueError(
                f"image_tokens: expected at most {c.stream.image_length} positions, got "
                f"{image_tokens.shape[1]}"
            )
        if text_tokens.shape[0] != image_tokens.shape[0]:
            raise ValueError(
                f"text_tokens and image_tokens differ in batch: {text_tokens.shape[0]} and "
                f"{image_tokens.shape[0]}"
            )
        if text_tokens.device.type != "cpu":
            return  # reading values would stall the device; its embedding look-up asserts there
        if image_tokens.numel() and not (
            int(image_tokens.min()) >= 0 and int(image_tokens.max()) < c.image_vocab
        ):
            raise ValueError(
                f"image_tokens: expected values in [0, {c.image_vocab - 1}], got "
                f"[{int(image_tokens.min())}, {int(image_tokens.max())}]"
            )
        padding = c.text_vocab + torch.arange(c.text_length)
        fits = ((text_tokens >= 0) & (text_tokens < c.text_vocab)) | (text_tokens == padding)
        if not bool(fits.all()):
            wrong = int(text_tokens[~fits][0])
            raise ValueError(
                f"text_tokens: expected tokens in [0, {c.text_vocab - 1}] or, at position p, the "
                f"padding {c.text_vocab} + p; got {wrong}"
            )


def text_targets(text_tokens: Tensor, text_vocab: int) -> Tensor:
    """Targets of the text positions: int64 [b, t] -> int64 [b, t].

    Tokens stay, the first padding becomes END_OF_CAPTION, later padding is IGNORED.
    """
    padded = text_tokens >= text_vocab
    first = padded & (padded.cumsum(dim=1) == 1)
    targets = text_tokens.masked_fill(padded, IGNORED)
    return targets.masked_fill(first, END_OF_CAPTION)


def count_text_targets(text_tokens: Tensor, text_vocab: int) -> int:
    """Positions of int64 [b, t] that the text loss counts."""
    return int((text_targets(text_tokens, text_vocab) != IGNORED).sum())

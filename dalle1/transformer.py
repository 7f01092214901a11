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
from typing import Literal

import torch
from einops import rearrange
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dalle1.attention import CONV_KERNEL, dense_attention
from dalle1.layout import END_OF_CAPTION, Pattern, Stream, layer_pattern
from dalle1.loss import IGNORED, linear_cross_entropy
from dalle1.scaling import GradientScale
from dalle1.sparse_attention import banded_attention, by_column, sparse_pays


class TransformerConfig(BaseModel):
    """Shape of the transformer; the defaults are the paper's 12 billion (section 2.2, B.1)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int = Field(3968, ge=1, description="model width, heads x head_size")
    layers: int = Field(64, ge=1)
    heads: int = Field(62, ge=1)
    head_size: int = Field(64, ge=1)
    text_vocab: int = Field(16384, ge=2, description="byte-pair tokens, end-of-caption included")
    text_length: int = Field(256, ge=2, description="text positions")
    image_vocab: int = Field(8192, ge=2, description="the dVAE's codebook size")
    grid: int = Field(32, ge=1, description="rows and columns of the image's token grid")
    conv_kernel: int = Field(CONV_KERNEL, ge=1, description="kernel of the last layer's pattern")
    init_std: float = Field(0.02, gt=0, description="deviation of the initial weights")
    text_loss_weight: float = Field(1 / 8, ge=0, le=1, description="the image's is 1 minus this")

    @model_validator(mode="after")
    def _check(self) -> TransformerConfig:
        if self.width != self.heads * self.head_size:
            raise ValueError(
                f"width must be heads x head_size = {self.heads} x {self.head_size} = "
                f"{self.heads * self.head_size}, got {self.width}"
            )
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel must be odd, got {self.conv_kernel}")
        return self

    @property
    def stream(self) -> Stream:
        return Stream(self.text_length, self.grid)

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """Attention pattern of each layer, first to last."""
        return tuple(layer_pattern(i, self.layers) for i in range(1, self.layers + 1))


class Execution(BaseModel):
    """How a transformer is run in training; the results are the same up to rounding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: Literal["auto", "dense", "sparse"] = Field(
        "auto", description="boolean masks, only the allowed blocks, or whichever is faster"
    )
    checkpointing: bool = Field(
        False, description="keep each residual block's input alone; compute the rest twice"
    )
    compile: bool = Field(False, description="torch.compile of the residual blocks")


class Attention(nn.Module):
    """Residual path of a layer: pre-norm, sparse multi-head attention."""

    def __init__(self, config: TransformerConfig, pattern: Pattern, execution: Execution) -> None:
        super().__init__()
        self.execution = execution
        self.heads, self.head_size = config.heads, config.head_size
        self.pattern = pattern
        self.grid, self.text_length = config.grid, config.text_length
        self.kernel = config.conv_kernel
        self.norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [b, s, n, d] of states [b, n, w]."""
        q, k, v = rearrange(
            self.qkv(self.norm(x)), "b n (three s d) -> three b s n d", three=3, s=self.heads
        )
        return q, k, v

    def merge(self, x: Tensor) -> Tensor:
        """The output map on heads put side by side: [b, s, n, d] -> [b, n, w]."""
        y: Tensor = self.out(rearrange(x, "b s n d -> b n (s d)"))
        return y

    def forward(self, x: Tensor) -> Tensor:  # [b, n, w] -> [b, n, w]
        sparse = self.runs_sparse(x)
        if not (sparse and self.pattern == "column"):
            return self.merge(self.attend(*self.project(x), sparse))
        # Column layers on transposed image states: the allowed keys are contiguous (B.1).
        turned = by_column(x, self.text_length, self.grid)
        y = self.merge(self.attend(*self.project(turned), sparse))
        return by_column(y, self.text_length, self.grid)

    def runs_sparse(self, x: Tensor) -> bool:
        """Whether states [b, n, w] go through the blocks rather than a boolean mask."""
        if x.shape[1] < self.text_length + self.grid**2:
            return False  # an image cut short: the mask is simply cut with it
        choice = self.execution.attention
        return choice == "sparse" or (choice == "auto" and sparse_pays(x, self.head_size))

    # Its masks are made once and kept; a graph of torch.compile would make them anew.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(self, q: Tensor, k: Tensor, v: Tensor, sparse: bool) -> Tensor:
        """One softmax over the keys that the pattern allows: [b, s, n, d] each, in run order."""
        run = banded_attention if sparse else dense_attention
        return run(q, k, v, self.pattern, self.text_length, self.grid, self.kernel)


class MLP(nn.Module):
    """Residual path of a layer: pre-norm, four times the width, GELU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:  # [b, n, w] -> [b, n, w]
        y: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return y


class Layer(nn.Module):
    """Attention and MLP, two residual blocks, each added to what it reads.

    The sum stays in 32 bits. With `narrow` the blocks compute in 16 bits: bfloat16 as it is,
    float16 with a gradient scale for each (2.4), once `scale_gradients` was called.
    """

    def __init__(self, config: TransformerConfig, pattern: Pattern, execution: Execution) -> None:
        super().__init__()
        self.narrow: torch.dtype | None = None
        self.scales: list[GradientScale] = []
        self.checkpointing = execution.checkpointing
        self.attention = Attention(config, pattern, execution)
        self.mlp = MLP(config)
        if execution.compile:
            self.attention.compile()
            self.mlp.compile()

    def scale_gradients(self, workers: int) -> list[GradientScale]:
        """The blocks in float16 from now on, with scales for so many data-parallel workers."""
        self.narrow = torch.float16
        self.scales = [GradientScale(block, workers) for block in (self.attention, self.mlp)]
        return self.scales

    def forward(self, x: Tensor) -> Tensor:  # [b, n, w] -> [b, n, w]
        for i, block in enumerate((self.attention, self.mlp)):
            run = self._residual if self.narrow else _plain
            if self.checkpointing and torch.is_grad_enabled():
                y = checkpoint(run, i, block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                y = run(i, block, x)
            x = x + y
        return x

    def _residual(self, i: int, block: nn.Module, x: Tensor) -> Tensor:
        if self.scales:
            return self.scales[i].run(block, x)
        with torch.autocast(x.device.type, self.narrow):
            y: Tensor = block(x)
        return y


def _plain(i: int, block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = block(x)
    return y


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
        self.initialise(seed)

    @torch.no_grad()
    def initialise(
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

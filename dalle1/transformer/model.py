"""The transformer over caption tokens followed by image tokens (paper section 2.2, appendix B).

Dimensions: b batch, t text positions, m image positions, n = t + m, s heads, d head size,
w width (= s * d), r c grid rows and columns.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from dalle1.tokenizer import END_OF_CAPTION, padding_id
from dalle1.transformer.config import Execution, TransformerConfig
from dalle1.transformer.kv_cache import KVCache, cache_bytes, working_bytes
from dalle1.transformer.layers import Layer
from dalle1.transformer.loss import IGNORED, linear_cross_entropy
from dalle1.transformer.prepacked_linear import prepacked
from dalle1.transformer.sequence import layer_pattern
from dalle1.transformer.tokens import check_tokens, text_targets
from dalle1.transformer.window_cache import WindowCache, window_bytes
from dvae.calls import isolated
from dvae.storage import Kind

# Steps of several positions pay for a few rows on CPUs, which read the weights for them: how many
# positions, by the largest number of rows (docs/benchmarks).
WINDOWS = {2: 16, 4: 8}


@dataclass
class Losses:
    """Means in nats a token; `loss` is their weighted sum (section 2.2: 1/8 and 7/8)."""

    loss: Tensor
    text: Tensor
    image: Tensor


class Transformer(nn.Module):
    """Autoregressive model of caption tokens followed by image tokens.

    A `protocols.Prior`, and a `protocols.TextPrior`.
    """

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
        patterns = (layer_pattern(i, c.layers) for i in range(1, c.layers + 1))
        self.layers = nn.ModuleList(Layer(c, pattern, execution) for pattern in patterns)
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

    @property
    def text_vocab(self) -> int:
        """Tokens of the text vocabulary, without paddings."""
        return self.config.text_vocab

    @property
    def text_length(self) -> int:
        """Text positions."""
        return self.config.text_length

    @property
    def image_vocab(self) -> int:
        """Image tokens."""
        return self.config.image_vocab

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image's token grid."""
        return self.config.grid, self.config.grid

    def empty_caption(self) -> Tensor:
        """The text of no caption: int64 [text_length], all padding."""
        c = self.config
        device = self.start_of_text.device
        return torch.tensor(
            [padding_id(c.text_vocab, p) for p in range(c.text_length)], device=device
        )

    def start(self, captions: int, candidates: int, static: bool = False) -> TransformerState:
        """Empty caches for so many captions and candidates of each; see `protocols.Prior`."""
        return TransformerState(self, captions, candidates, static)

    def decoding_bytes(self) -> tuple[int, int]:
        """Bytes that decoding holds and works with, for each caption and for each candidate."""
        c, dtype = self.config, self.start_of_image.dtype
        shared = cache_bytes(c, 0, dtype)
        return shared, cache_bytes(c, 1, dtype) - shared + working_bytes(c, dtype)

    def best_window(self, rows: int) -> int:
        """Positions of a step that pay for so many rows; see `protocols.WindowPrior`."""
        return next((window for most, window in WINDOWS.items() if rows <= most), 1)

    def window_bytes(self, window: int) -> int:
        """Bytes that decoding holds and works with for each row; see `protocols.WindowPrior`."""
        c, dtype = self.config, self.start_of_image.dtype
        return window_bytes(c, window, dtype) + window * working_bytes(c, dtype)

    @isolated()
    @torch.no_grad()
    def log_prob(self, text: Tensor, image: Tensor) -> Tensor:
        """ln p(image | text) in nats, float32 [b]: int64 [b, text_length] and [b, grid^2]."""
        _, logits = self(text, image)
        chosen = logits.log_softmax(dim=-1).gather(-1, image[..., None])[..., 0]
        total: Tensor = chosen.sum(dim=-1)
        return total

    @isolated()
    @torch.no_grad()
    def next_text_logits(self, ids: Sequence[int]) -> Tensor:
        """Logits of the text token behind the first ids of a caption: float32 [text_vocab].

        Text is short: all positions so far are run.
        """
        # The last token is a target only, so any will do there.
        tokens = torch.tensor([[*ids, END_OF_CAPTION]], device=self.start_of_text.device)
        x = self.embed_text(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.text_head(self.norm(x[0, -1])).float()
        return logits

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

    def embed_image_inputs(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., w], without positions, of int64 [...]; image_vocab is the start."""
        is_start = (tokens == self.config.image_vocab)[..., None]
        embedded = self.image_embedding(tokens.clamp(max=self.config.image_vocab - 1))
        return torch.where(is_start, self.start_of_image, embedded)

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
        check_tokens(self.config, text_tokens, image_tokens)
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


class TransformerState:
    """What the transformer remembers while it draws: a `protocols.DecodingState`.

    Whether the first step behind `prefill` has one position or several decides which caches there
    are: those of many rows, where a step of several positions is so many steps of one, or those of
    windows, where it is one pass. Positions that are fed again are written over; where a row goes
    back further than its caches allow, which hold only what the patterns still read, they are
    filled anew from the tokens that it was fed.
    """

    @torch.no_grad()
    def __init__(
        self, transformer: Transformer, captions: int, candidates: int, static: bool = False
    ) -> None:
        """See `protocols.Prior.start`."""
        self.transformer, self.candidates, self.static = transformer, candidates, static
        c, rows = transformer.config, captions * candidates
        self.captions, self.rows = captions, rows
        self._active: KVCache | WindowCache | None = None
        self._kept: dict[type, KVCache | WindowCache] = {}  # one of each kind, to be filled again
        self._prefilled: Tensor | None = None  # states that the caches are to be filled with
        self._positions = transformer.grid_positions()
        # For rows that go back: the text, the image inputs fed, and how many positions were fed.
        device = self._positions.device
        self._text = torch.empty(0, device=device)
        self._inputs = torch.zeros(rows, c.sequence.image_length, dtype=torch.int64, device=device)
        self._fed = torch.zeros(rows, dtype=torch.int64)
        self._furthest = self._fed  # end of what was fed since the caches were filled
        if static:  # all memory is taken before the step is recorded
            self._begin(1)

    @torch.no_grad()
    def prefill(self, text: Tensor, prefix: Tensor | None = None) -> None:
        """Runs captions, int64 [c, text_length], and the first image tokens of all rows, int64 [p],
        in one pass."""
        c = self.transformer.config
        if text.shape != (self.captions, c.text_length):
            raise ValueError(
                f"text: expected [{self.captions}, {c.text_length}], got {list(text.shape)}"
            )
        self._text = text
        x = self.transformer.embed_text(text)
        given = 0 if prefix is None else len(prefix)
        if prefix is not None and given:
            image = self.transformer.embed_image(prefix.expand(self.captions, -1), given)
            x = torch.cat([x, image], dim=1)
            self._inputs[:, 0] = c.image_vocab
            self._inputs[:, 1:given] = prefix[:-1]
        self._fed = torch.full_like(self._fed, given)
        self._furthest = self._fed
        self._prefilled = x
        if self.static:
            self._begin(1)

    @property
    def cache(self) -> KVCache | WindowCache:
        """The caches in use; before the first step, those of single positions."""
        if self._active is None:
            self._begin(1)
        assert self._active is not None
        return self._active

    def _begin(self, count: int) -> None:
        """Fills the caches for steps of so many positions with what `prefill` was given."""
        t, c = self.transformer, self.transformer.config
        kind = KVCache if count == 1 else WindowCache
        active = self._kept.get(kind)
        if isinstance(active, WindowCache) and active.window < count:
            active = None
        if active is None:
            if kind is KVCache:
                active = KVCache(t.layers, c, self.captions, self.candidates, self.static)
            else:
                active = WindowCache(t.layers, c, self.captions, self.candidates, count)
            self._kept[kind] = active
            self._head: nn.Module = prepacked(t.image_head, self.rows * count)
        self._active = active
        if self._prefilled is not None:
            active.prefill(self._prefilled)
            self._prefilled = None

    @torch.no_grad()
    def step(self, tokens: Tensor, position: int | Tensor) -> Tensor:
        """Logits, float32 [n, k, image_vocab]; see `protocols.DecodingState`."""
        if isinstance(position, Tensor) and self.static:
            return self._step(tokens[:, 0], position)[:, None]
        first = self._first(position, tokens.shape[1])
        if self._active is None or self._prefilled is not None:
            self._begin(tokens.shape[1])
        self._go_back(first)
        at_once = self._active.window if isinstance(self._active, WindowCache) else 1
        logits = []
        for part in tokens.split(at_once, dim=1):
            logits.append(self._steps(part, first))
            first = first + part.shape[1]
        self._fed = first
        self._furthest = torch.maximum(self._furthest, first)
        return torch.cat(logits, dim=1)

    def _steps(self, tokens: Tensor, first: Tensor) -> Tensor:
        """Logits [n, k, image_vocab] of tokens [n, k] that are fed at once, from positions [n] on,
        on the CPU."""
        positions = (first[:, None] + torch.arange(tokens.shape[1])).to(tokens.device)
        self._inputs.scatter_(1, positions, tokens)
        if not isinstance(self._active, WindowCache):
            uniform = bool((first == first[0]).all())
            here = int(first[0]) if uniform else positions[:, 0]
            return self._step(tokens[:, 0], here)[:, None]
        x = self.transformer.embed_image_inputs(tokens) + self._positions[positions]
        x = self._active.step(x, positions)
        logits: Tensor = self._head(self.transformer.norm(x))
        return logits.float()

    def _step(self, tokens: Tensor, position: int | Tensor) -> Tensor:
        """Logits [n, image_vocab] of tokens [n] fed at a position; see `SlotBuffer`."""
        assert isinstance(self._active, KVCache)
        x = self.transformer.embed_image_inputs(tokens) + self._positions[position]
        x = self._active.step(x, position)
        logits: Tensor = self._head(self.transformer.norm(x))
        return logits.float()

    def _first(self, position: int | Tensor, count: int) -> Tensor:
        """Each row's first position, int64 [n] on the CPU; ValueError where it cannot be fed."""
        if isinstance(position, int):
            first = torch.full((self.rows,), position)
        else:
            first = position.to("cpu", torch.int64).expand(self.rows)
        length = self._inputs.shape[1]
        if int(first.min()) < 0 or bool((first > self._fed).any()):
            raise ValueError(
                f"position: expected at most the next one, {int(self._fed.max())}, got "
                f"{int(first.max())}"
            )
        if int(first.max()) + count > length:
            raise ValueError(
                f"position: expected at most {length - count} for {count} tokens, got "
                f"{int(first.max())}"
            )
        return first

    def _go_back(self, first: Tensor) -> None:
        """Fills the caches anew of rows that go back further than the caches remember: slots of
        what they read may hold later positions."""
        assert self._active is not None
        behind = first < self._furthest - self._active.window
        self._furthest = torch.where(behind, first, self._furthest)
        for position in first[behind].unique().tolist():
            rows = (behind & (first == position)).nonzero()[:, 0].to(self._inputs.device)
            if not position:
                continue  # nothing before it is read
            x = self.transformer.embed_text(self._text[rows // self.candidates])
            before = self._inputs[rows, 1:position]  # without the start
            image = self.transformer.embed_image(before, position)
            self._active.prefill(torch.cat([x, image], dim=1), rows)


KIND: Kind = Kind(
    "prior", "sparse_transformer", TransformerConfig, Transformer, "transformer.safetensors"
)

"""The transformer over caption tokens followed by image tokens (paper section 2.2, appendix B).

With other settings (`variant`) it is ruDALL-E or minDALL-E. Scores are added up in 32 bits or by
kernels that do so, so what those do against overflow in 16 bits is not needed: ruDALL-E's scores
that are divided by 32 and multiplied again, and its limits of 65,504.

Dimensions: b batch, t text positions, m image positions, n = t + m, s heads, d head size,
w width (= s * d), r c grid rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dalle1.transformer.config import Execution, TransformerConfig
from dalle1.transformer.embedding import InputEmbedding
from dalle1.transformer.kv_cache import KVCache, cache_bytes, working_bytes
from dalle1.transformer.layers import Layer
from dalle1.transformer.loss import IGNORED, linear_cross_entropy
from dalle1.transformer.prepacked_linear import prepacked
from dalle1.transformer.prior import ResidualPrior, first_positions
from dalle1.transformer.residual import ResidualLayer
from dalle1.transformer.tokens import (
    check_tokens,
    count_text_targets,
    empty_caption,
    image_targets,
    text_targets,
)
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

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Values for the log, detached."""
        return {"text": self.text.detach(), "image": self.image.detach()}


class Transformer(InputEmbedding, ResidualPrior):
    """Autoregressive model of caption tokens followed by image tokens.

    A `protocols.Prior`, and a `protocols.TextPrior`.
    """

    config: TransformerConfig

    def __init__(
        self,
        config: TransformerConfig | None = None,
        execution: Execution | None = None,
        seed: int | None = None,
    ) -> None:
        """seed: of the initial weights; None draws one from torch's generator."""
        c, execution = config or TransformerConfig(), execution or Execution()
        super().__init__(c)
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        v = c.variant
        self.layers = nn.ModuleList(Layer(c, pattern, execution) for pattern in c.each_pattern())
        self.norm = nn.LayerNorm(c.width)
        self.head_norm = nn.LayerNorm(c.width) if v.norms == "sandwich" else nn.Identity()
        self.text_head = nn.Linear(c.width, c.text_classes, v.head_bias)
        self.image_head = nn.Linear(c.width, c.image_vocab, v.head_bias)
        self.initialize(seed)

    def initial_std(self, name: str) -> float:
        """Ours, the paper gives none: init_std, of the maps that end a block by 1/sqrt(2 L)."""
        std = self.config.init_std
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            std /= math.sqrt(2 * self.config.layers)
        return std

    @property
    def end_of_caption(self) -> int:
        """The text token that ends a caption; see `protocols.TextPrior`."""
        return self.config.variant.end_of_caption

    @property
    def residual_layers(self) -> Sequence[ResidualLayer]:
        """The layers, in the order that they are run in."""
        return cast(list[ResidualLayer], list(self.layers))

    def count_text_targets(self, text_tokens: Tensor) -> int:
        """Positions of int64 [b, text_length] that the text loss counts."""
        return count_text_targets(self.config, text_tokens)

    def empty_caption(self) -> Tensor:
        """The text of no caption: int64 [text_length], all padding in the paper's model."""
        return empty_caption(self.config).to(self.image_embedding.weight.device)

    def start(self, captions: int, candidates: int, static: bool = False) -> TransformerState:
        """Empty caches for so many captions and candidates of each; see `protocols.Prior`."""
        return TransformerState(self, captions, candidates, static)

    def decoding_bytes(self) -> tuple[int, int]:
        """Bytes that decoding holds and works with, for each caption and for each candidate."""
        c, dtype = self.config, self.image_embedding.weight.dtype
        shared = cache_bytes(c, 0, dtype)
        return shared, cache_bytes(c, 1, dtype) - shared + working_bytes(c, dtype)

    def best_window(self, rows: int) -> int:
        """Positions of a step that pay for so many rows; see `protocols.WindowPrior`."""
        return next((window for most, window in WINDOWS.items() if rows <= most), 1)

    def window_bytes(self, window: int) -> int:
        """Bytes that decoding holds and works with for each row; see `protocols.WindowPrior`."""
        c, dtype = self.config, self.image_embedding.weight.dtype
        return window_bytes(c, window, dtype) + window * working_bytes(c, dtype)

    def image_logits(self, text: Tensor, image: Tensor) -> Tensor:
        """The image's part of `forward`, without the text's logits."""
        _, states = self.states(text, image)
        logits: Tensor = self.image_head(states).float()
        return logits

    @isolated()
    @torch.no_grad()
    def next_text_logits(self, ids: Sequence[int]) -> Tensor:
        """Logits of the text token behind the first ids of a caption: float32 [text_vocab].

        Text is short: all positions so far are run. Raises ValueError for no ids where no start
        stands before the text, so that nothing predicts its first token.
        """
        if not ids and self.config.shift:
            raise ValueError("text: expected a beginning, got none; this model has no start token")
        tokens = torch.tensor([ids], dtype=torch.int64, device=self.image_embedding.weight.device)
        if not self.config.shift:
            tokens = F.pad(tokens, (0, 1))  # the last token is a target only: any will do
        x = self.embed_text(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.text_head(self.final_norm(x[0, -1])).float()
        return logits[: self.config.text_vocab]

    def final_norm(self, x: Tensor) -> Tensor:
        """States as the heads read them: [..., w] -> [..., w]."""
        y: Tensor = self.head_norm(self.norm(x))
        return y

    def forward(self, text_tokens: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every position; position p of a segment predicts its token p.

        text_tokens: int64 [b, text_length], padded by `Tokenizer.encode`;
        image_tokens: int64 [b, m], m <= grid^2, raster order; with none, the start alone is fed.
        Returns float32 [b, text_length, text_vocab] and [b, max(m, 1), image_vocab]. A variant
        without starts has no logits of the first text token: [b, text_length - 1, ...] are those
        of the tokens behind it. Where it predicts paddings, they are classes behind the tokens.
        Raises ValueError when a shape, type or token does not fit.
        """
        text, image = self.states(text_tokens, image_tokens)
        text = text[:, : self.config.text_length - self.config.shift]
        return self.text_head(text).float(), self.image_head(image).float()

    def states(self, text_tokens: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the two heads read, [b, text_length, w] and [b, max(m, 1), w]; as `forward`.

        Without a start the text's last position predicts the first image token and is in both, and
        what the last image token leads to is left out: nothing is predicted there.
        """
        check_tokens(self.config, text_tokens, image_tokens)
        t, m, shift = self.config.text_length, image_tokens.shape[1], self.config.shift
        x = self.embed(text_tokens, image_tokens, max(1 - shift, m))
        for layer in self.layers:
            x = layer(x)
        x = self.final_norm(x)
        return x[:, :t], x[:, t - shift : t - shift + max(1, m)]

    def loss(
        self, text_tokens: Tensor, image_tokens: Tensor, text_count: float | None = None
    ) -> Losses:
        """Cross-entropies of whole streams (section 2.2); shapes as for `forward`.

        Each is divided by the batch's count of targets of its kind. Text targets are the
        caption's tokens and one end-of-caption; the padding behind it is no target, unless the
        variant says so (`tokens.text_targets`).
        text_count: of a part of a larger batch, the mean of the parts' counts of text targets (see
        `count_text_targets`): the mean of the parts' losses is then that of the whole.
        """
        text_states, image_states = self.states(text_tokens, image_tokens)
        targets = text_targets(self.config, text_tokens, image_tokens)
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
            rearrange(image_targets(self.config, image_tokens), "b m -> (b m)"),
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

    Where no start stands before the image, its first token is predicted by the text's last
    position, which `prefill` runs, and the token that a position p reads has the place p - 1 in the
    caches.
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
        self._positions, self._shift = transformer.image_positions(), c.shift
        # For rows that go back: the text, the image inputs fed, and how many positions were fed.
        device = self._positions.device
        self._text = torch.empty(0, device=device)
        self._inputs = torch.zeros(rows, c.sequence.image_length, dtype=torch.int64, device=device)
        self._fed = torch.zeros(rows, dtype=torch.int64)
        self._furthest = self._fed  # end of what was fed since the caches were filled
        # What a caption gives its rows, in one place for a recorded step: the embedding that stands
        # before the first image token, [n, w], and the logits of that token, [n, image_vocab].
        like = transformer.image_embedding.weight
        self._start = like.new_zeros(rows, c.width)
        self._first_logits = torch.zeros(rows * c.shift, c.image_vocab, device=device)
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
        if not self._shift:
            start = self.transformer.image_start(text).expand(self.captions, -1)
            self._start.copy_(start.repeat_interleave(self.candidates, dim=0))
        given = 0 if prefix is None else len(prefix)
        if prefix is None or not given:
            x = self.transformer.embed_text(text)
        else:
            tokens = prefix.expand(self.captions, -1)
            x = self.transformer.embed(text, tokens, given - self._shift)
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
            last = active.prefill(self._prefilled)
            self._prefilled = None
            if self._shift:
                logits = t.image_head(t.final_norm(last)).float()
                self._first_logits.copy_(logits.repeat_interleave(self.candidates, dim=0))

    @torch.no_grad()
    def step(self, tokens: Tensor, position: int | Tensor) -> Tensor:
        """Logits, float32 [n, k, image_vocab]; see `protocols.DecodingState`."""
        if isinstance(position, Tensor) and self.static:
            return self._step(tokens[:, 0], position)[:, None]
        first = first_positions(position, tokens.shape[1], self._fed, self._inputs.shape[1])
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
        places = positions - self._shift  # -1, which nothing is kept of, where there is no start
        x = self.transformer.embed_image_inputs(tokens, self._start[:, None])
        x = self._active.step(x + self._positions[places], places)
        logits: Tensor = self._head(self.transformer.final_norm(x)).float()
        return self._with_first(logits, positions, self._first_logits[:, None])

    def _step(self, tokens: Tensor, position: int | Tensor) -> Tensor:
        """Logits [n, image_vocab] of tokens [n] fed at a position; see `SlotBuffer`."""
        assert isinstance(self._active, KVCache)
        place = position - self._shift
        if isinstance(place, Tensor):
            place = place.clamp(min=0)  # written over by the next step
        elif place < 0:
            return self._first_logits.clone()
        x = self.transformer.embed_image_inputs(tokens, self._start)
        x = self._active.step(x + self._positions[place], place)
        logits: Tensor = self._head(self.transformer.final_norm(x)).float()
        return self._with_first(logits, position, self._first_logits)

    def _with_first(self, logits: Tensor, position: int | Tensor, first: Tensor) -> Tensor:
        """Logits [..., image_vocab] at positions [...], those of position 0 the text's where there
        is no start."""
        if not self._shift or isinstance(position, int):
            return logits
        return torch.where((position == 0)[..., None], first, logits)

    def _go_back(self, first: Tensor) -> None:
        """Fills the caches anew of rows that go back further than the caches remember: slots of
        what they read may hold later positions."""
        assert self._active is not None
        behind = first < self._furthest - self._active.window
        self._furthest = torch.where(behind, first, self._furthest)
        for position in first[behind].unique().tolist():
            rows = (behind & (first == position)).nonzero()[:, 0].to(self._inputs.device)
            if position <= self._shift:
                continue  # nothing before it is read
            text = self._text[rows // self.candidates]
            before = self._inputs[rows, 1:position]  # without the start
            x = self.transformer.embed(text, before, position - self._shift)
            self._active.prefill(x, rows)


KIND: Kind = Kind(
    "prior", "sparse_transformer", TransformerConfig, Transformer, "transformer.safetensors"
)

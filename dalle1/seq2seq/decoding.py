"""What the encoder-decoder remembers while it draws, and its steps.

The encoder runs once, when captions are read. Of each layer of the decoder, the caption's keys and
values are then held once for all of its candidates, whose queries are one matrix product a head.
Each candidate has its own keys and values of the image positions, of which a step reads those that
are filled. They are never given up, so a row may go back to any position.

Dimensions: c captions (or passes), b candidates of each, n = c * b rows, k positions of a step,
t text positions, m image positions, s heads, d head size, w width (= s * d).
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from dalle1.common.attention import attend_widened
from dalle1.seq2seq.config import Seq2SeqConfig
from dalle1.seq2seq.layers import DecoderLayer
from dalle1.seq2seq.stacks import Decoder, Encoder
from dalle1.seq2seq.tokens import check_text, is_token
from dalle1.transformer.prepacked_linear import prepacked, prepacked_linear
from dalle1.transformer.prior import first_positions


def cache_bytes(c: Seq2SeqConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes held for a caption and for each of its candidates."""
    numbers = 2 * c.decoder_layers * c.width
    text = max(dtype.itemsize, torch.float32.itemsize)  # see `_text_dtype`
    return numbers * c.text_length * text, numbers * c.image_length * dtype.itemsize


def working_bytes(c: Seq2SeqConfig, dtype: torch.dtype) -> int:
    """About what a position of one row works with: logits and their sums over the vocabulary, and
    the states of a layer."""
    return 32 * c.image_vocab + (16 * c.width + 6 * c.ffn_width) * dtype.itemsize


def window_bytes(c: Seq2SeqConfig, window: int, dtype: torch.dtype) -> int:
    """Bytes that each row holds and works with for steps of so many positions."""
    widened = 2 * c.width * c.image_length * torch.float32.itemsize  # of one layer, on CPUs
    return sum(cache_bytes(c, dtype)) + widened + window * working_bytes(c, dtype)


def _text_dtype(weight: Tensor) -> torch.dtype:
    """The type that a caption's keys and values are held in: on CPUs float32 for bfloat16, to which
    attention with several queries would widen them anew in each step."""
    narrow = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return torch.float32 if narrow else weight.dtype


class Positions:
    """The image positions of a step: where they are kept, and what each may read.

    allowed: a mask of what is read, that fits [n, s, k, m]; None where all is allowed.
    """

    def __init__(
        self, position: int | Tensor, count: int, length: int, device: torch.device
    ) -> None:
        """position: a number, from which on all rows have `count` positions; int64 [n, k]; or, for
        a static step, int64 [1], the one position of all rows. length: image positions m."""
        self.position = position
        self.static = isinstance(position, Tensor) and position.ndim == 1
        self.allowed: Tensor | None = None
        if isinstance(position, int):
            self.end = position + count
            self.index = torch.arange(position, self.end, device=device)
            if count > 1:
                self.allowed = torch.arange(self.end, device=device) <= self.index[:, None]
            return
        self.index = position
        self.end = length if self.static else int(position.max()) + 1
        keys = torch.arange(self.end, device=device)
        if self.static:
            self.allowed = (keys <= position)[None]
        else:
            self.allowed = (keys <= position[..., None])[:, None]

    def keep(self, held: Tensor, new: Tensor) -> Tensor:
        """Writes keys or values [n, s, k, d] into those held, [n, s, m, d]; gives what is read of
        them."""
        if isinstance(self.position, int):
            held[:, :, self.position : self.end] = new
        elif self.static:
            held.index_copy_(2, self.index, new)
        else:
            held.scatter_(2, self.index[:, None, :, None].expand_as(new), new)
        return held[:, :, : self.end]


class LayerCache:
    """One decoder layer: what it holds of captions and rows, and its step."""

    def __init__(self, layer: DecoderLayer, c: Seq2SeqConfig, captions: int, rows: int) -> None:
        self.module, self.heads = layer, c.heads
        attention, cross = layer.attention, layer.cross_attention
        self.qkv, self.out = prepacked(attention.qkv, rows), prepacked(attention.out, rows)
        self.q, self.cross_out = prepacked(cross.q, rows), prepacked(cross.out, rows)
        self.mlp = prepacked(layer.mlp, rows)
        weight = attention.qkv.weight
        # Keys and values; numbers from the first, as a static step is tried before any `prefill`.
        self.image = weight.new_zeros(2, rows, c.heads, c.image_length, c.head_size)
        shape = (2, captions, c.heads, c.text_length, c.head_size)
        self.text = weight.new_zeros(shape, dtype=_text_dtype(weight))

    def read_caption(self, states: Tensor) -> None:
        """Keeps the keys and values of the encoder's states [c, t, w]."""
        for held, new in zip(self.text, self.module.cross_attention.project(states), strict=True):
            held.copy_(new)

    def read_prefix(self, x: Tensor, counts: Tensor, is_last: bool) -> Tensor:
        """Runs states [c, p, w] of the first image positions, which all candidates of a caption
        share, and keeps their keys and values. Returns the states behind the layer, which of the
        last one nobody reads. counts: which text positions do, bool [c, 1, 1, t]."""
        layer, captions = self.module, len(x)
        q, k, v = layer.attention.project(x)
        for held, new in zip(self.image, (k, v), strict=True):
            rows = rearrange(held, "(c b) s m d -> c b s m d", c=captions)
            rows[..., : x.shape[1], :] = new[:, None]
        if is_last:
            return x
        x = x + layer.attention.merge(layer.attention.attend(q, k, v))
        keys, values = self.text
        x = x + layer.cross_attention.attend(x, keys, values, counts)
        y: Tensor = x + layer.mlp(x)
        return y

    def step(self, x: Tensor, positions: Positions, counts: Tensor) -> Tensor:
        """States [n, k, w] through the layer; counts: which of the first text positions count,
        bool [c, 1, 1, t]; of those behind them none does."""
        attention, cross = self.module.attention, self.module.cross_attention
        q, *new = rearrange(
            self.qkv(attention.norm(x)), "n k (three s d) -> three n s k d", three=3, s=self.heads
        )
        k, v = (positions.keep(held, x) for held, x in zip(self.image, new, strict=True))
        attend = partial(F.scaled_dot_product_attention, attn_mask=positions.allowed)
        # For one query of a row the kernel is as fast in 16 bits.
        y = attend(q, k, v) if x.shape[1] == 1 else attend_widened(attend, q, k, v)
        x = x + attention.out_norm(self.out(rearrange(y, "n s k d -> n k (s d)")))

        c, t = counts.shape[0], counts.shape[-1]
        q = rearrange(self.q(cross.norm(x)), "(c b) k (s d) -> c s (b k) d", c=c, s=self.heads)
        k, v = self.text[..., :t, :]
        y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=counts).to(x.dtype)
        y = rearrange(y, "c s (b k) d -> (c b) k (s d)", k=x.shape[1])
        x = x + cross.out_norm(self.cross_out(y))
        z: Tensor = x + self.mlp(x)
        return z


class Seq2SeqState:
    """What the encoder-decoder remembers while it draws: a `protocols.DecodingState`."""

    @torch.no_grad()
    def __init__(
        self, encoder: Encoder, decoder: Decoder, captions: int, candidates: int, static: bool
    ) -> None:
        """See `protocols.Prior.start`."""
        self.encoder, self.decoder, self.static = encoder, decoder, static
        self.config = c = decoder.config
        self.captions, self.rows = captions, captions * candidates
        self.device = decoder.head.weight.device
        self.layers = [
            LayerCache(cast(DecoderLayer, layer), c, captions, self.rows)
            for layer in decoder.layers
        ]
        # An id that the codec does not have is never drawn: those rows of the head are left out.
        self.head = prepacked_linear(decoder.head.weight[: c.image_vocab], None, self.rows)
        # Which text positions are attended to, bool [c, 1, 1, t].
        self.counts = torch.ones(
            captions, 1, 1, c.text_length, dtype=torch.bool, device=self.device
        )
        self._used = c.text_length  # text positions, up to the last that counts
        self._fed = torch.zeros(self.rows, dtype=torch.int64)  # positions, of each row

    @torch.no_grad()
    def prefill(self, text: Tensor, prefix: Tensor | None = None) -> None:
        """Encodes captions, int64 [c, text_length], and runs the first image tokens of all rows,
        int64 [p], in one pass. Raises ValueError where they do not fit."""
        c = self.config
        if len(text) != self.captions:
            raise ValueError(f"text: expected {self.captions} captions, got {len(text)}")
        check_text(c, text)
        self.counts.copy_(is_token(c, text))
        states = self.encoder(text, self.counts)
        for layer in self.layers:
            layer.read_caption(states)
        if not self.static:  # padding stands at the end, and need not be read
            self._used = int(self.counts.any(0).nonzero()[-1, -1]) + 1
        given = 0 if prefix is None else len(prefix)
        self._fed = torch.full_like(self._fed, given)
        if prefix is not None and given:
            before = torch.cat([prefix.new_tensor([c.image_vocab]), prefix[:-1]])
            positions = torch.arange(given, device=self.device)
            x = self.decoder.embed(before, positions).expand(self.captions, -1, -1)
            for layer in self.layers:
                x = layer.read_prefix(x, self.counts, layer is self.layers[-1])

    @torch.no_grad()
    def step(self, tokens: Tensor, position: int | Tensor) -> Tensor:
        """Logits, float32 [n, k, image_vocab]; see `protocols.DecodingState`."""
        count, length = tokens.shape[1], self.config.image_length
        if self.static and isinstance(position, Tensor):
            return self._step(tokens, Positions(position, count, length, self.device))
        first = first_positions(position, count, self._fed, length)
        self._fed = first + count
        here: int | Tensor = int(first[0])
        if not bool((first == here).all()):
            here = (first[:, None] + torch.arange(count)).to(self.device)
        return self._step(tokens, Positions(here, count, length, self.device))

    def _step(self, tokens: Tensor, positions: Positions) -> Tensor:
        x = self.decoder.embed(tokens, positions.index)
        for layer in self.layers:
            x = layer.step(x, positions, self.counts[..., : self._used])
        logits: Tensor = self.head(self.decoder.norm(x))
        return logits.float()

"""Draws image tokens one position at a time, with cached keys and values (paper section 2.6).

The caption is run once, and its keys and values are held once for all candidates. Each image
position then costs one row of every layer and reads only the keys that the layer's pattern allows.

Candidate i of a caption uses uniform numbers that depend on (seed, caption, i) alone, so batches
of any size draw the same pictures.

Dimensions: b candidates, t text positions, m image positions, s heads, d head size, w width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from dalle1.attention import cache_length, cached_attention, dense_attention, ring
from dalle1.layout import END_OF_CAPTION, padding_id
from dalle1.transformer import Layer, Transformer, TransformerConfig


@dataclass(frozen=True)
class Options:
    """How a token is drawn from its logits; the paper's are the defaults (section 2.6).

    temperature: divides the logits; 0 takes the likeliest token.
    top_k: keeps the k likeliest tokens. top_p: keeps the smallest set of total mass >= p.
    guidance: unconditional + guidance * (conditional - unconditional) logits; 1 is none.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < float("inf")):
            raise ValueError(f"temperature: expected a number >= 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1 or None, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1] or None, got {self.top_p}")
        if not (0 <= self.guidance < float("inf")):
            raise ValueError(f"guidance: expected a number >= 0, got {self.guidance}")


def cache_bytes(
    config: TransformerConfig, candidates: int = 512, dtype: torch.dtype = torch.float32
) -> int:
    """Bytes of the keys and values held for one caption and its candidates."""
    lengths = [cache_length(p, config.grid, config.conv_kernel) for p in config.patterns]
    positions = config.layers * config.text_length + candidates * sum(lengths)
    return 2 * config.width * positions * dtype.itemsize


class Cache:
    """Keys and values of every layer: one caption's text, once, and of b candidates the image
    positions that later ones may read."""

    def __init__(self, transformer: Transformer, text_tokens: Tensor, candidates: int) -> None:
        """Runs one caption, int64 [t], through the text side and makes room for the image's."""
        c = transformer.config
        self.text_k: list[Tensor] = []  # of each layer: [s, t, d]
        self.text_v: list[Tensor] = []
        x = transformer.embed_text(text_tokens[None])
        for layer in transformer.layers:
            assert isinstance(layer, Layer)
            q, k, v = layer.attention.project(x)
            self.text_k.append(k[0].contiguous())
            self.text_v.append(v[0].contiguous())
            # Text reads text causally whatever the layer's pattern.
            y = dense_attention(q, k, v, "full", c.text_length, c.grid, c.conv_kernel)
            x = layer.mlp(x + layer.attention.merge(y))
        self.rings = [ring(pattern, c.grid, c.conv_kernel) for pattern in c.patterns]
        self.image = [  # of each layer: keys and values [2, b, s, slots, d]
            x.new_empty(2, candidates, c.heads, r.length, c.head_size) for r in self.rings
        ]

    def step(self, transformer: Transformer, x: Tensor, position: int) -> Tensor:
        """Image logits [b, image_vocab] of the states x [b, w] fed at an image position."""
        for i, layer in enumerate(transformer.layers):
            assert isinstance(layer, Layer)
            q, k, v = layer.attention.project(x[:, None])
            held, slot = self.image[i], position % self.rings[i].length
            held[0, :, :, slot] = k[:, :, 0]
            held[1, :, :, slot] = v[:, :, 0]
            image_k, image_v = _read(held, self.rings[i].reads[position])
            y = cached_attention(q[:, :, 0], self.text_k[i], self.text_v[i], image_k, image_v)
            x = layer.mlp(x + layer.attention.merge(rearrange(y, "b s d -> b s 1 d"))[:, 0])
        logits: Tensor = transformer.image_head(transformer.norm(x))
        return logits.float()


def _read(held: Tensor, slots: slice | Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [b, s, m, d] of a layer's ring [2, b, s, slots, d] at the given slots."""
    if isinstance(slots, slice):
        return tuple(held[:, :, :, slots])
    return tuple(held.index_select(3, slots.to(held.device)))


@torch.inference_mode()
def draw(
    transformer: Transformer,
    text_tokens: Tensor,
    uniforms: Tensor,
    options: Options | None = None,
    prefix: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draws b candidates for one caption: int64 [b, grid^2].

    text_tokens: int64 [t], padded; uniforms: [b, grid^2] in [0, 1), see `candidate_uniforms`;
    prefix: int64 [p] image tokens that every candidate begins with; on_step is called with the
    number of positions done and the tokens [b, grid^2], of which so many are drawn.
    """
    options = options or Options()
    c = transformer.config
    b, m = uniforms.shape
    device = transformer.start_of_image.device
    uniforms = uniforms.to(device)
    text_tokens = text_tokens.to(device)
    caches = [Cache(transformer, text_tokens, b)]
    if options.guidance != 1:
        empty = [padding_id(c.text_vocab, p) for p in range(c.text_length)]
        caches.append(Cache(transformer, torch.tensor(empty, device=device), b))
    given = 0 if prefix is None else len(prefix)
    tokens = torch.empty(b, m, dtype=torch.int64, device=device)
    if prefix is not None:
        tokens[:, :given] = prefix.to(device)
    positions = transformer.grid_positions()
    previous = transformer.start_of_image.expand(b, -1)
    for p in range(m):
        logits = [cache.step(transformer, previous + positions[p], p) for cache in caches]
        if p >= given:
            mixed = logits[0]
            if len(logits) == 2:
                mixed = logits[1] + options.guidance * (logits[0] - logits[1])
            tokens[:, p] = choose(mixed, uniforms[:, p], options)
        previous = transformer.image_embedding(tokens[:, p])
        if on_step:
            on_step(p + 1, tokens)
    return tokens


@torch.inference_mode()
def draw_text(
    transformer: Transformer, given: list[int], uniforms: Tensor, options: Options | None = None
) -> list[int]:
    """Goes on with a caption: token ids from the first given to the last before its end.

    given: the caption's first tokens; uniforms: [text_length] in [0, 1). Each position's number
    draws its token, so the result does not depend on how much is given. Text is short: every step
    runs all positions so far anew.
    """
    options = options or Options()
    if options.guidance != 1:
        raise ValueError("guidance: captions have no condition to be guided by; leave it at 1")
    c = transformer.config
    device = transformer.start_of_text.device
    ids = list(given)
    while len(ids) < c.text_length:
        # The last token is a target only, so any will do there.
        x = transformer.embed_text(torch.tensor([[*ids, END_OF_CAPTION]], device=device))
        for layer in transformer.layers:
            x = layer(x)
        logits = transformer.text_head(transformer.norm(x[:, -1])).float()
        token = int(choose(logits, uniforms[len(ids), None].to(device), options))
        if token == END_OF_CAPTION:
            break
        ids.append(token)
    return ids


def choose(logits: Tensor, uniforms: Tensor, options: Options) -> Tensor:
    """Tokens [b] by inverse transform of uniforms [b] under the options: logits [b, v]."""
    if options.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / options.temperature
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        least = logits.topk(options.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if options.top_p is not None and options.top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        # A token goes when those before it already hold the mass; the likeliest always stays.
        surplus = ordered.cumsum(dim=-1) - ordered >= options.top_p
        logits = logits.masked_fill(surplus.scatter(-1, order, surplus), -torch.inf)
    cumulative = F.softmax(logits.double(), dim=-1).cumsum(dim=-1)
    # Against the actual total, so that rounding never points behind the last token.
    point = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True)[:, 0]


def candidate_uniforms(seed: int, caption: str, first: int, count: int, length: int) -> Tensor:
    """Uniform numbers of candidates first ... first + count - 1: float64 [count, length].

    Row i is a function of (seed, caption, first + i) alone: a counter-based generator for each.
    """
    digest = hashlib.sha256(f"{seed}\0{caption}".encode()).digest()
    key = int.from_bytes(digest[:8], "little")
    rows = []
    for i in range(first, first + count):
        bits = np.random.Philox(key=np.array([key, i], dtype=np.uint64))
        rows.append(np.random.Generator(bits).random(length))
    return torch.from_numpy(np.stack(rows))

"""What decoding remembers of a layer, and one step of all layers through it (paper section 2.6).

The caption's keys and values are held once for all of its candidates. Of each candidate a layer
holds the image positions that its pattern still reads, and a step reads only those:

- row and conv layers: keys and values, in a ring as long as the pattern looks back;
- column layers, which need the whole grid: the normed states that keys and values are maps of,
  half as much memory. The maps are applied to the query and to the result instead,
  q (W x + b) = (W^T q) x + q b, so that nothing is computed anew and nothing is approximated.

Dimensions: c captions (or passes), b candidates of each, n = c * b rows, t text positions, m image
positions read, s heads, d head size, w width (= s * d), v image vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from dalle1.transformer.attention import dense_attention
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.layers import Layer
from dalle1.transformer.masks import Slots, cache_length, slots
from dalle1.transformer.model import Transformer
from dalle1.transformer.prepacked_linear import packed, packed_linear
from dalle1.transformer.sequence import Pattern

# Rows whose products are formed at once on CPUs, so that they stay in the processor's cache.
CPU_ROWS = 32


def holds_states(pattern: Pattern) -> bool:
    """Whether a layer's cache holds states rather than keys and values: where it needs the whole
    grid, memory is what counts."""
    return pattern != "row"


def cache_bytes(
    config: TransformerConfig, candidates: int = 512, dtype: torch.dtype = torch.float32
) -> int:
    """Bytes held for one caption and its candidates."""
    each = 0
    for pattern in config.patterns:
        length = cache_length(pattern, config.grid, config.conv_kernel)
        each += length if holds_states(pattern) else 2 * length
    shared = 2 * config.layers * config.text_length
    return config.width * (shared + candidates * each) * dtype.itemsize


class Memory:
    """A tensor with a dimension of slots for image positions.

    Positions are numbers, then reads are views where the slots lie evenly; or, for a step that is
    recorded once and replayed, int64 tensors [1] on the device, then shapes never change.
    """

    def __init__(self, held: Tensor, rows_dim: int, dim: int, where: Slots, recorded: bool) -> None:
        """rows_dim: the dimension of candidates; dim: that of slots."""
        self.held, self.rows_dim, self.dim, self.where = held, rows_dim, dim, where
        if recorded:
            self.place = where.place.to(held.device)
            table, counts = where.table()
            self.gathers = table.shape[1] < where.length
            self.table, self.counts = table.to(held.device), counts.to(held.device)
            # What does not count is multiplied by 0, so it has to be a number.
            held.zero_()

    def write(self, new: Tensor, position: int | Tensor) -> None:
        """Keeps what belongs to a position: the held tensor's shape without the slots."""
        if isinstance(position, int):
            self.held.select(self.dim, int(self.where.place[position])).copy_(new)
        else:
            place = self.place.index_select(0, position)
            self.held.index_copy_(self.dim, place, new.unsqueeze(self.dim))

    def write_first(self, new: Tensor, rows: int) -> None:
        """Keeps the first positions, side by side in `new`'s dimension of slots; of those that
        share a slot the last. new has a row for each caption, which all its candidates get."""
        count = new.shape[self.dim]
        kept = range(count)[-self.where.length :]
        new = new.narrow(self.dim, kept.start, len(kept))
        new = new.repeat_interleave(rows // new.shape[self.rows_dim], dim=self.rows_dim)
        place = self.where.place[kept.start : kept.stop].to(self.held.device)
        self.held.index_copy_(self.dim, place, new)

    def read(self, position: int | Tensor) -> tuple[Tensor, Tensor | None]:
        """What the position may read, m slots; and which of them count, bool [m], or all."""
        if isinstance(position, Tensor):
            counts = self.counts.index_select(0, position)[0]
            if not self.gathers:
                return self.held, counts
            return self.held.index_select(self.dim, self.table[position][0]), counts
        reads = self.where.reads[position]
        if isinstance(reads, slice):
            return self.held[(slice(None),) * self.dim + (reads,)], None
        return self.held.index_select(self.dim, reads.to(self.held.device)), None


class LayerCache(ABC):
    """One layer's cache, and its step: the two kinds differ in how they hold the image."""

    def __init__(
        self, layer: Layer, c: TransformerConfig, captions: int, candidates: int, recorded: bool
    ) -> None:
        like = layer.attention.qkv.weight
        self.captions, self.rows = captions, captions * candidates
        self.attention = layer.attention
        # Numbers from the first: a step is tried before any caption is read when it is recorded.
        self.text = like.new_zeros(2, captions, c.heads, c.text_length, c.head_size)
        where = slots(layer.attention.pattern, c.grid, c.conv_kernel)
        self.image = self.make_room(like, where, recorded)
        self.out = packed(layer.attention.out, self.rows)
        self.mlp = packed(layer.mlp, self.rows)

    @abstractmethod
    def make_room(self, like: Tensor, where: Slots, recorded: bool) -> Memory:
        """The image part, empty."""

    @abstractmethod
    def keep_image(self, states: Tensor, k: Tensor, v: Tensor) -> None:
        """Keeps first image positions p, the same for a caption's candidates: normed states
        [c, p, w], keys and values [c, s, p, d]."""

    @abstractmethod
    def attend(self, states: Tensor, position: int | Tensor) -> Tensor:
        """Keeps a position and attends to what it may read: normed states [n, w] -> [n, s, d]."""

    def step(self, x: Tensor, position: int | Tensor) -> Tensor:
        """States [n, w] of an image position, through the layer."""
        y = self.attend(self.attention.norm(x), position)
        x = x + self.out(rearrange(y, "n s d -> n (s d)"))
        z: Tensor = x + self.mlp(x)
        return z

    def mixed(
        self,
        q: Tensor,
        on_image: Tensor,
        counts: Tensor | None,
        from_image: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """One softmax over the caption and the image: scaled q [n, s, d] -> [n, s, d].

        on_image: scores [n, s, m]; counts: see `Memory.read`; from_image: what weights [n, s, m]
        take from the image, [n, s, d].
        """
        t = self.text.shape[3]
        if counts is not None:
            on_image = on_image.masked_fill(~counts, -torch.inf)
        # All candidates of a caption against its keys: one matrix product a head.
        q = rearrange(q, "(c b) s d -> c s b d", c=self.captions)
        on_text = rearrange(q @ self.text[0].transpose(-1, -2), "c s b t -> (c b) s t")
        weights = torch.cat([on_text, on_image], dim=-1).softmax(dim=-1)
        of_text = rearrange(weights[..., :t], "(c b) s t -> c s b t", c=self.captions)
        from_text = rearrange(of_text @ self.text[1], "c s b d -> (c b) s d")
        return from_text + from_image(weights[..., t:])


class KeyValueCache(LayerCache):
    """Holds keys and values of the image: [2, n, s, slots, d]."""

    def make_room(self, like: Tensor, where: Slots, recorded: bool) -> Memory:
        a = self.attention
        self.projection = packed(a.qkv, self.rows)
        held = like.new_empty(2, self.rows, a.heads, where.length, a.head_size)
        return Memory(held, 1, 3, where, recorded)

    def keep_image(self, states: Tensor, k: Tensor, v: Tensor) -> None:
        self.image.write_first(torch.stack([k, v]), self.rows)

    def attend(self, states: Tensor, position: int | Tensor) -> Tensor:
        q, *kv = rearrange(
            self.projection(states), "n (three s d) -> three n s d", three=3, s=self.attention.heads
        )
        self.image.write(torch.stack(kv), position)
        (k, v), counts = self.image.read(position)
        q = q * q.shape[-1] ** -0.5
        on_image = _scores(q, k)
        return self.mixed(q, on_image, counts, lambda weights: _weighted(weights, v))


class StateCache(LayerCache):
    """Holds the normed states of the image: [n, slots, w]."""

    def make_room(self, like: Tensor, where: Slots, recorded: bool) -> Memory:
        a = self.attention
        w = a.heads * a.head_size
        self.query = packed_linear(a.qkv.weight[:w], a.qkv.bias[:w], self.rows)
        weights = rearrange(a.qkv.weight[w:], "(two s d) w -> two s d w", two=2, s=a.heads)
        bias = rearrange(a.qkv.bias[w:], "(two s d) -> two s d", two=2, s=a.heads)
        self.weight_k, self.weight_v = weights.detach().unbind()
        self.bias_k, self.bias_v = bias.detach().unbind()
        return Memory(like.new_empty(self.rows, where.length, w), 0, 1, where, recorded)

    def keep_image(self, states: Tensor, k: Tensor, v: Tensor) -> None:
        self.image.write_first(states, self.rows)

    def attend(self, states: Tensor, position: int | Tensor) -> Tensor:
        self.image.write(states, position)
        seen, counts = self.image.read(position)  # [n, m, w]
        q = rearrange(self.query(states), "n (s d) -> n s d", s=self.attention.heads)
        q = q * q.shape[-1] ** -0.5
        # The map of the keys, applied to the query: [n, s, d] -> [n, s, w].
        asked = (q.transpose(0, 1) @ self.weight_k).transpose(0, 1)
        on_image = asked @ seen.transpose(1, 2) + (q * self.bias_k).sum(-1, keepdim=True)

        def from_image(weights: Tensor) -> Tensor:
            found = (weights @ seen).transpose(0, 1)  # [s, n, w]
            values = (found @ self.weight_v.transpose(1, 2)).transpose(0, 1)
            return values + weights.sum(-1, keepdim=True) * self.bias_v

        return self.mixed(q, on_image, counts, from_image)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Products of q [n, s, d] with keys [n, s, m, d]: [n, s, m]."""
    if q.device.type == "cpu":  # its batched products of one row each are slower
        parts = zip(q.split(CPU_ROWS), k.split(CPU_ROWS), strict=True)
        return torch.cat([(k * q[:, :, None]).sum(-1) for q, k in parts])
    return (k @ q[..., None])[..., 0]


def _weighted(weights: Tensor, v: Tensor) -> Tensor:
    """Sums of values [n, s, m, d] by weights [n, s, m]: [n, s, d]."""
    if weights.device.type == "cpu":
        parts = zip(weights.split(CPU_ROWS), v.split(CPU_ROWS), strict=True)
        return torch.cat([(weights[..., None] * v).sum(-2) for weights, v in parts])
    return (weights[:, :, None] @ v)[:, :, 0]


class Cache:
    """The caches of all layers, for c captions and b candidates of each."""

    def __init__(
        self, transformer: Transformer, captions: int, candidates: int, recorded: bool = False
    ) -> None:
        """recorded: positions will be tensors, see `Memory`."""
        self.transformer = transformer
        self.layers: list[LayerCache] = []
        for layer in transformer.layers:
            assert isinstance(layer, Layer)
            kind = StateCache if holds_states(layer.attention.pattern) else KeyValueCache
            made = kind(layer, transformer.config, captions, candidates, recorded)
            self.layers.append(made)
        self.head: nn.Module = packed(transformer.image_head, captions * candidates)

    @property
    def bytes(self) -> int:
        """What is held, as `cache_bytes` foretells."""
        held = [x for layer in self.layers for x in (layer.text, layer.image.held)]
        return sum(x.numel() * x.element_size() for x in held)

    def read(self, text_tokens: Tensor, prefix: Tensor | None = None) -> None:
        """Runs captions, int64 [c, t], and the first image tokens of all candidates, int64 [p],
        in one pass."""
        c = self.transformer.config
        x = self.transformer.embed_text(text_tokens)
        t = c.text_length
        if prefix is not None and len(prefix):
            given = prefix.expand(len(text_tokens), -1)
            image = self.transformer.embed_image(given, len(prefix))
            x = torch.cat([x, image], dim=1)
        for layer, cache in zip(self.transformer.layers, self.layers, strict=True):
            assert isinstance(layer, Layer)
            a = layer.attention
            q, k, v = a.project(x)
            cache.text[0], cache.text[1] = k[:, :, :t], v[:, :, :t]
            if x.shape[1] > t:
                cache.keep_image(a.norm(x[:, t:]), k[:, :, t:], v[:, :, t:])
            if cache is self.layers[-1]:
                break  # the last layer's results are not asked for
            y = dense_attention(q, k, v, a.pattern, t, c.grid, c.conv_kernel)
            x = x + a.merge(y)
            x = x + layer.mlp(x)

    def step(self, x: Tensor, position: int | Tensor) -> Tensor:
        """Image logits, float32 [n, v], of states [n, w] fed at an image position."""
        for layer in self.layers:
            x = layer.step(x, position)
        logits: Tensor = self.head(self.transformer.norm(x))
        return logits.float()

"""What decoding holds of each layer, and one step of all layers through it (paper section 2.6).

The caption's keys and values are held once for all of its candidates. Of each candidate a layer
holds the image positions that its pattern still reads, and a step reads only those:

- row layers: keys and values, in a ring as long as the pattern looks back;
- all others, which look back further: the normed states that keys and values are maps of, half as
  much memory, in a ring or, where the pattern needs it, of the whole grid. The maps are applied to
  the query and to the result instead, q (W x + b) = (W^T q) x + q b, so that nothing is computed
  anew and nothing is approximated.

Dimensions: c captions (or passes), b candidates of each, n = c * b rows, t text positions, m image
positions read, s heads, d head size, w width (= s * d).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dalle1.common.attention import attend_widened
from dalle1.transformer.attention import dense_attention
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.layers import Layer
from dalle1.transformer.masks import Slots, cache_length, slots
from dalle1.transformer.prepacked_linear import prepacked, prepacked_linear
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


def working_bytes(config: TransformerConfig, dtype: torch.dtype) -> int:
    """About what one candidate's step works with: scores and their sums over the vocabulary, of
    the layers the hidden states, the queries of every head on whole states, the keys gathered."""
    rows = config.conv_kernel // 2 + 1
    if "conv_torus" in config.patterns:
        rows = config.conv_kernel
    gathered = rows * config.conv_kernel
    states = 16 + 6 * config.heads + 2 * gathered
    return 32 * config.image_vocab + states * config.width * dtype.itemsize


class SlotBuffer:
    """A tensor with a dimension of slots for image positions.

    A position is a number, the same for all rows: then reads are views where the slots lie evenly.
    Or it is an int64 tensor on the device: [1], the same for all rows, for a static step, whose
    shapes never change; [n], one for each row.
    """

    def __init__(self, held: Tensor, rows_dim: int, dim: int, where: Slots) -> None:
        """rows_dim: the dimension of rows; dim: that of slots. What held begins with is a number:
        slots that do not count are multiplied by 0."""
        self.held, self.rows_dim, self.dim, self.where = held, rows_dim, dim, where
        self._tables: tuple[Tensor, Tensor, Tensor] | None = None

    def prepare(self) -> None:
        """Puts the tables of slots on the device, which positions that are tensors are looked up
        in; before a step is recorded, and not while."""
        if self._tables is None:
            reads, counts = self.where.table()
            device = self.held.device
            self._tables = self.where.place.to(device), reads.to(device), counts.to(device)

    def _looked_up(self) -> tuple[Tensor, Tensor, Tensor]:
        self.prepare()
        assert self._tables is not None
        return self._tables

    def write(self, new: Tensor, position: int | Tensor) -> None:
        """Keeps what belongs to a position: the held tensor's shape without the slots."""
        if isinstance(position, int):
            self.held.select(self.dim, int(self.where.place[position])).copy_(new)
            return
        place = self._looked_up()[0].index_select(0, position)
        new = new.unsqueeze(self.dim)
        if len(position) == 1:
            self.held.index_copy_(self.dim, place, new)
        else:
            self.held.scatter_(self.dim, self._by_row(place[:, None]).expand_as(new), new)

    def write_first(self, new: Tensor, rows: Tensor | None = None) -> None:
        """Keeps the first positions, side by side in `new`'s dimension of slots; of those that
        share a slot the last.

        new: has a row for each caption, which all its candidates get; or one for each of `rows`,
        int64, which alone are written.
        """
        count = new.shape[self.dim]
        kept = range(count)[-self.where.length :]
        new = new.narrow(self.dim, kept.start, len(kept))
        place = self.where.place[kept.start : kept.stop].to(self.held.device)
        if rows is None:
            repeats = self.held.shape[self.rows_dim] // new.shape[self.rows_dim]
            new = new.repeat_interleave(repeats, dim=self.rows_dim)
            self.held.index_copy_(self.dim, place, new)
        else:
            part = self.held.index_select(self.rows_dim, rows).index_copy_(self.dim, place, new)
            self.held.index_copy_(self.rows_dim, rows, part)

    def read(self, position: int | Tensor) -> tuple[Tensor, Tensor | None]:
        """What the position may read, m slots; and which of them count, bool [m] or [n, 1, m], or
        all."""
        if isinstance(position, int):
            reads = self.where.reads[position]
            if isinstance(reads, slice):
                return self.held[(slice(None),) * self.dim + (reads,)], None
            return self.held.index_select(self.dim, reads.to(self.held.device)), None
        _, table, counts = self._looked_up()
        everything = table.shape[1] == self.where.length  # nothing to gather
        if len(position) == 1:
            counted = counts.index_select(0, position)[0]
            if everything:
                return self.held, counted
            return self.held.index_select(self.dim, table[position][0]), counted
        counted = counts.index_select(0, position)[:, None]
        if everything:
            return self.held, counted
        index = self._by_row(table.index_select(0, position))
        shape = list(self.held.shape)
        shape[self.dim] = table.shape[1]
        return self.held.gather(self.dim, index.expand(shape)), counted

    def _by_row(self, index: Tensor) -> Tensor:
        """[n, m] with a dimension for each of the held tensor, n and m at rows and slots."""
        shape = [1] * self.held.ndim
        shape[self.rows_dim], shape[self.dim] = index.shape
        return index.view(shape)


class LayerCache(ABC):
    """One layer's cache, and its step: the two kinds differ in how they hold the image."""

    def __init__(self, layer: Layer, c: TransformerConfig, captions: int, candidates: int) -> None:
        like = layer.attention.qkv.weight
        self.captions, self.rows = captions, captions * candidates
        self.attention = layer.attention
        # Numbers from the first: a step is tried before any caption is read when it is static.
        self.text = like.new_zeros(2, captions, c.heads, c.text_length, c.head_size)
        where = slots(layer.attention.pattern, c.grid, c.conv_kernel)
        self.image = self.make_room(like, where)
        self.out = prepacked(layer.attention.out, self.rows)
        self.out_norm = layer.attention.out_norm
        self.mlp = prepacked(layer.mlp, self.rows)

    @abstractmethod
    def make_room(self, like: Tensor, where: Slots) -> SlotBuffer:
        """The image part, empty."""

    @abstractmethod
    def keep_image(self, states: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> None:
        """Keeps first image positions p, the same for a caption's candidates: normed states
        [c, p, w], keys and values [c, s, p, d]. rows: see `SlotBuffer.write_first`."""

    @abstractmethod
    def attend(self, states: Tensor, position: int | Tensor) -> Tensor:
        """Keeps a position and attends to what it may read: normed states [n, w] -> [n, s, d]."""

    def step(self, x: Tensor, position: int | Tensor) -> Tensor:
        """States [n, w] of an image position, through the layer."""
        y = self.attend(self.attention.norm(x), position)
        x = x + self.out_norm(self.out(rearrange(y, "n s d -> n (s d)")))
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

        on_image: scores [n, s, m]; counts: see `SlotBuffer.read`; from_image: what weights
        [n, s, m] take from the image, [n, s, d].
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

    def make_room(self, like: Tensor, where: Slots) -> SlotBuffer:
        a = self.attention
        self.projection = prepacked(a.qkv, self.rows)
        held = like.new_zeros(2, self.rows, a.heads, where.length, a.head_size)
        return SlotBuffer(held, 1, 3, where)

    def keep_image(self, states: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> None:
        self.image.write_first(torch.stack([k, v]), rows)

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

    def make_room(self, like: Tensor, where: Slots) -> SlotBuffer:
        a = self.attention
        w = a.heads * a.head_size
        self.query = prepacked_linear(a.qkv.weight[:w], a.qkv.bias[:w], self.rows)
        weights = rearrange(a.qkv.weight[w:], "(two s d) w -> two s d w", two=2, s=a.heads)
        bias = rearrange(a.qkv.bias[w:], "(two s d) -> two s d", two=2, s=a.heads)
        self.weight_k, self.weight_v = weights.detach().unbind()
        self.bias_k, self.bias_v = bias.detach().unbind()
        return SlotBuffer(like.new_zeros(self.rows, where.length, w), 0, 1, where)

    def keep_image(self, states: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> None:
        self.image.write_first(states, rows)

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


class KVCache:
    """The caches of all layers, for c captions and b candidates of each; knows states, not tokens.

    See `model.TransformerState` for the tokens.
    """

    window = 1  # positions of a step

    def __init__(
        self,
        layers: Iterable[nn.Module],
        config: TransformerConfig,
        captions: int,
        candidates: int,
        static: bool = False,
    ) -> None:
        """layers: those of the transformer. static: positions will be tensors [1]."""
        self.config, self.candidates = config, candidates
        self.layers: list[LayerCache] = []
        self._modules: list[Layer] = []
        for module in layers:
            layer = cast(Layer, module)
            kind = StateCache if holds_states(layer.attention.pattern) else KeyValueCache
            self._modules.append(layer)
            self.layers.append(kind(layer, config, captions, candidates))
            if static:
                self.layers[-1].image.prepare()

    @property
    def bytes(self) -> int:
        """What is held, as `cache_bytes` foretells."""
        held = [x for layer in self.layers for x in (layer.text, layer.image.held)]
        return sum(x.numel() * x.element_size() for x in held)

    def prefill(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Runs states of the first positions in one pass and keeps what later steps read.

        x: [c, t + p, w], text and then p image positions, the same for a caption's candidates. Or,
        with rows, int64 [r], those of so many rows: [r, t + p, w], of which the text is held.
        Returns the states of the text's last position behind all layers, [c, w].
        """
        c = self.config
        t = c.text_length
        for layer, cache in zip(self._modules, self.layers, strict=True):
            a = layer.attention
            q, k, v = a.project(x)
            if rows is None:
                cache.text[0], cache.text[1] = k[:, :, :t], v[:, :, :t]
            if x.shape[1] > t:
                cache.keep_image(a.norm(x[:, t:]), k[:, :, t:], v[:, :, t:], rows)
            if cache is self.layers[-1]:  # nothing else is asked of it: text reads text
                x, q, k, v = x[:, t - 1 : t], q[:, :, t - 1 : t], k[:, :, :t], v[:, :, :t]
                y = attend_widened(F.scaled_dot_product_attention, q, k, v)
            else:
                y = dense_attention(q, k, v, a.pattern, t, c.grid, c.conv_kernel)
            x = x + a.merge(y)
            x = x + layer.mlp(x)
        return x[:, 0]

    def step(self, x: Tensor, position: int | Tensor) -> Tensor:
        """States [n, w] at an image position through all layers; position: see `SlotBuffer`."""
        for layer in self.layers:
            x = layer.step(x, position)
        return x

"""What a step of several positions holds of each layer: windows of drafted tokens in one pass.

Sequential steps read the weights once for each position. A step of k positions reads them once for
k, which is what a few rows wait for. So memory does not count here, and the positions' shapes do:
each layer holds keys and values, the caption's and behind them those of the image, in one tensor,
and reads all of it under a mask.

A row's window begins at a position of its own, and the next window may begin anywhere behind its
first position: what was drafted wrongly is written over. So a ring is longer than its pattern looks
back by the window's length less one, and nothing that is still read is lost.

Dimensions: c captions, b candidates of each, n = c * b rows, k positions of a window, t text
positions, l slots of the image, m = grid^2 image positions, s heads, d head size, w width = s * d.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from dalle1.common.attention import attend_widened
from dalle1.transformer.attention import dense_attention
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.layers import Layer
from dalle1.transformer.masks import cache_length, image_allowed
from dalle1.transformer.prepacked_linear import prepacked


def window_bytes(config: TransformerConfig, window: int, dtype: torch.dtype) -> int:
    """Bytes held for each row: of each layer, keys and values of the text and of the slots."""
    slots = sum(_slots(pattern, config, window) + config.text_length for pattern in config.patterns)
    return 2 * config.width * slots * dtype.itemsize


def _slots(pattern: str, c: TransformerConfig, window: int) -> int:
    """Image positions that a layer holds at a time."""
    length = cache_length(pattern, c.grid, c.conv_kernel)  # type: ignore[arg-type]
    return min(c.sequence.image_length, length + window - 1)


class WindowCache:
    """The caches of all layers, for windows of at most `window` positions; knows states alone."""

    def __init__(
        self,
        layers: Iterable[nn.Module],
        config: TransformerConfig,
        captions: int,
        candidates: int,
        window: int,
    ) -> None:
        self.config, self.candidates, self.window = config, candidates, window
        rows = captions * candidates
        self._layers = [_LayerWindow(cast(Layer, m), config, rows, window) for m in layers]

    def prefill(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Runs states of the first positions in one pass and keeps what later windows read.

        Args:
            x: [c, t + p, w], text and then p image positions, the same for a caption's candidates;
                with rows, [r, t + p, w], a line for each of these.
            rows: int64 [r], those that are meant; None: all.

        Returns:
            The states of the text's last position behind all layers, [c, w].
        """
        for layer in self._layers:
            x = layer.prefill(x, self.candidates if rows is None else 1, rows)
        return x[:, self.config.text_length - 1]

    def step(self, x: Tensor, positions: Tensor) -> Tensor:
        """States [n, k, w] at positions [n, k], side by side, through all layers; k is at most the
        window. Nothing is kept of a position -1, which reads the text alone."""
        made: dict[str, tuple[Tensor, Tensor]] = {}  # slots and mask, by pattern
        for layer in self._layers:
            if layer.pattern not in made:
                made[layer.pattern] = layer.places(positions)
            x = layer.step(x, *made[layer.pattern])
        return x


class _LayerWindow:
    """One layer: keys and values [2, n, s, t + l, d]."""

    def __init__(self, layer: Layer, c: TransformerConfig, rows: int, window: int) -> None:
        self.config, self.pattern = c, layer.attention.pattern
        self.length = _slots(self.pattern, c, window)
        self.module, self.norm = layer, layer.attention.norm
        products = rows * window
        self.projection = prepacked(layer.attention.qkv, products)
        self.out = prepacked(layer.attention.out, products)
        self.out_norm = layer.attention.out_norm
        self.mlp = prepacked(layer.mlp, products)
        shape = (2, rows, c.heads, c.text_length + self.length, c.head_size)
        self.held = layer.attention.qkv.weight.new_zeros(shape)

    def prefill(self, x: Tensor, repeats: int, rows: Tensor | None) -> Tensor:
        """See `WindowCache.prefill`; each line of x is for so many rows. Returns the states behind
        the layer."""
        a, c, t = self.module.attention, self.config, self.config.text_length
        q, k, v = a.project(x)
        new = repeat(torch.stack([k, v]), "kv c s n d -> kv (c b) s n d", b=repeats)
        given = x.shape[1] - t
        kept = torch.arange(max(0, given - self.length), given, device=x.device)
        held = self.held if rows is None else self.held[:, rows]
        held[..., :t, :] = new[..., :t, :]
        held[..., t + kept % self.length, :] = new[..., t + kept, :]
        if rows is not None:
            self.held[:, rows] = held
        y = dense_attention(q, k, v, self.pattern, t, c.grid, c.conv_kernel)
        x = x + a.merge(y)
        z: Tensor = x + self.module.mlp(x)
        return z

    def places(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Where positions [n, k] are held, int64 [n, k], and which of t + l places each may read,
        bool [n, 1, k, t + l]."""
        c, length = self.config, self.length
        # A slot holds the newest position that it can, up to the window's last: one below 0 where
        # nothing was fed to it yet but, at most, what stands for the position -1.
        last = positions[:, -1:]
        held = last - (last - torch.arange(length, device=positions.device)) % length  # [n, l]
        query, key = positions[:, :, None], held[:, None]
        image = image_allowed(self.pattern, query, key, c.grid, c.conv_kernel) & (key >= 0)
        allowed = F.pad(image, (c.text_length, 0), value=True)  # every position reads all text
        return c.text_length + positions % length, allowed[:, None]

    def step(self, x: Tensor, places: Tensor, allowed: Tensor) -> Tensor:
        """States [n, k, w] through the layer; see `places`."""
        heads = self.config.heads
        q, *kv = rearrange(
            self.projection(self.norm(x)), "n k (three s d) -> three n s k d", three=3, s=heads
        )
        index = places[:, None, :, None].expand_as(kv[0])
        for held, new in zip(self.held, kv, strict=True):
            held.scatter_(2, index, new)
        keys, values = self.held
        attend = partial(F.scaled_dot_product_attention, attn_mask=allowed)
        y = attend_widened(attend, q, keys, values)
        x = x + self.out_norm(self.out(rearrange(y, "n s k d -> n k (s d)")))
        z: Tensor = x + self.mlp(x)
        return z

"""The residual blocks of encoder and decoder, in the order of NormFormer (Shleifer et al. 2021).

A norm stands before each block and, with a scale, behind each attention. Norms that a linear map
follows have a bias alone: the map's weights hold the scale. Linear maps have no bias.

Dimensions: b batch, n positions, t text positions, s heads, d head size, w width (= s * d),
f width inside a feed-forward block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dalle1.common.attention import attend_widened
from dalle1.seq2seq.config import Seq2SeqConfig
from dalle1.transformer.config import Execution
from dalle1.transformer.residual import ResidualLayer

EPSILON = 1e-5


class BiasNorm(nn.Module):
    """LayerNorm without a scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        # torch takes a bias of another type than the states' only beside a scale.
        return F.layer_norm(x, (self.width,), None, self.bias.to(x.dtype), EPSILON)


class SelfAttention(nn.Module):
    """Residual path of a layer: multi-head attention to the same positions."""

    def __init__(self, c: Seq2SeqConfig, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = c.heads, causal
        self.norm = BiasNorm(c.width)
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)
        self.out_norm = nn.LayerNorm(c.width, EPSILON)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [b, s, n, d] of states [b, n, w]."""
        q, k, v = rearrange(
            self.qkv(self.norm(x)), "b n (three s d) -> three b s n d", three=3, s=self.heads
        )
        return q, k, v

    def merge(self, y: Tensor) -> Tensor:
        """What is added to the states, [b, n, w], of heads [b, s, n, d]."""
        z: Tensor = self.out_norm(self.out(rearrange(y, "b s n d -> b n (s d)")))
        return z

    def attend(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor | None = None) -> Tensor:
        """Heads [b, s, n, d]; counts: as for `forward`."""
        attend = partial(F.scaled_dot_product_attention, attn_mask=counts, is_causal=self.causal)
        return attend_widened(attend, q, k, v)

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """States [b, n, w] -> [b, n, w]; counts: which keys are no padding, bool [b, 1, 1, n]."""
        return self.merge(self.attend(*self.project(x), counts))


class CrossAttention(nn.Module):
    """Residual path of a layer: multi-head attention of image positions to the caption."""

    def __init__(self, c: Seq2SeqConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.norm = BiasNorm(c.width)
        self.q = nn.Linear(c.width, c.width, bias=False)
        self.kv = nn.Linear(c.width, 2 * c.width, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)
        self.out_norm = nn.LayerNorm(c.width, EPSILON)

    def project(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [b, s, t, d] of the encoder's states [b, t, w]."""
        k, v = rearrange(self.kv(text), "b t (two s d) -> two b s t d", two=2, s=self.heads)
        return k, v

    def attend(self, x: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
        """States [b, n, w] to keys and values [b, s, t, d], of which `counts` count, bool
        [b, 1, 1, t] -> [b, n, w]."""
        q = rearrange(self.q(self.norm(x)), "b n (s d) -> b s n d", s=self.heads)
        attend = partial(F.scaled_dot_product_attention, attn_mask=counts)
        y = attend_widened(attend, q, k.to(q.dtype), v.to(q.dtype))
        z: Tensor = self.out_norm(self.out(rearrange(y, "b s n d -> b n (s d)")))
        return z

    def forward(self, x: Tensor, text: Tensor, counts: Tensor) -> Tensor:
        """States [b, n, w], the encoder's [b, t, w] and which of these count -> [b, n, w]."""
        return self.attend(x, *self.project(text), counts)


class GatedFeedForward(nn.Module):
    """Residual path of a layer: GELU of one map times another, with a norm before the third."""

    def __init__(self, c: Seq2SeqConfig) -> None:
        super().__init__()
        self.norm = BiasNorm(c.width)
        self.up = nn.Linear(c.width, 2 * c.ffn_width, bias=False)  # the gate's map, then the other
        self.inner_norm = BiasNorm(c.ffn_width)
        self.down = nn.Linear(c.ffn_width, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [b, n, w] -> [b, n, w]
        gate, value = self.up(self.norm(x)).chunk(2, dim=-1)  # [b, n, f]
        y: Tensor = self.down(self.inner_norm(F.gelu(gate) * value))
        return y


class EncoderLayer(ResidualLayer):
    """Attention among the caption's tokens, and a feed-forward block."""

    def __init__(self, c: Seq2SeqConfig, execution: Execution) -> None:
        super().__init__(execution.checkpointing)
        self.attention = SelfAttention(c, causal=False)
        self.mlp = GatedFeedForward(c)
        _compile(self, execution)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.attention, self.mlp

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """States [b, t, w], and which of them are no padding, bool [b, 1, 1, t]."""
        return self.add(1, self.add(0, x, counts))


class DecoderLayer(ResidualLayer):
    """Causal attention among the image tokens, attention to the caption, a feed-forward block."""

    def __init__(self, c: Seq2SeqConfig, execution: Execution) -> None:
        super().__init__(execution.checkpointing)
        self.attention = SelfAttention(c, causal=True)
        self.cross_attention = CrossAttention(c)
        self.mlp = GatedFeedForward(c)
        _compile(self, execution)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.attention, self.cross_attention, self.mlp

    def forward(self, x: Tensor, text: Tensor, counts: Tensor) -> Tensor:
        """States [b, n, w], the encoder's [b, t, w], and which of these count, [b, 1, 1, t]."""
        return self.add(2, self.add(1, self.add(0, x), text, counts))


def _compile(layer: ResidualLayer, execution: Execution) -> None:
    if execution.compile:
        for block in layer.blocks:
            block.compile()

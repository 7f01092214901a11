"""The residual blocks of the transformer: attention and MLP (paper section 2.2, appendix B).

Dimensions: b batch, t text positions, m image positions, n = t + m, s heads, d head size,
w width (= s * d).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dalle1.transformer.attention import banded_attention, by_column, dense_attention, sparse_pays
from dalle1.transformer.config import Execution, TransformerConfig
from dalle1.transformer.residual import ResidualLayer
from dalle1.transformer.sequence import Pattern


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
        self.out_norm = _norm_behind(config)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [b, s, n, d] of states [b, n, w]."""
        q, k, v = rearrange(
            self.qkv(self.norm(x)), "b n (three s d) -> three b s n d", three=3, s=self.heads
        )
        return q, k, v

    def merge(self, x: Tensor) -> Tensor:
        """The output map on heads put side by side: [b, s, n, d] -> [b, n, w]."""
        y: Tensor = self.out_norm(self.out(rearrange(x, "b s n d -> b n (s d)")))
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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sparse: bool) -> Tensor:
        """One softmax over the keys that the pattern allows: [b, s, n, d] each, in run order."""
        run = banded_attention if sparse else dense_attention
        # Its masks are made once and kept; a graph of torch.compile would make them anew. As a
        # decorator, `disable` imports the compiler, which takes as long as torch does.
        if torch.compiler.is_compiling():
            run = torch.compiler.disable(run)
        return run(q, k, v, self.pattern, self.text_length, self.grid, self.kernel)


class MLP(nn.Module):
    """Residual path of a layer: pre-norm, four times the width, GELU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)
        self.out_norm = _norm_behind(config)
        self.approximate = "tanh" if config.variant.gelu == "tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:  # [b, n, w] -> [b, n, w]
        hidden = F.gelu(self.up(self.norm(x)), approximate=self.approximate)
        y: Tensor = self.out_norm(self.down(hidden))
        return y


def _norm_behind(config: TransformerConfig) -> nn.Module:
    """The second norm of a residual block, where the variant has one."""
    sandwich = config.variant.norms == "sandwich"
    return nn.LayerNorm(config.width) if sandwich else nn.Identity()


class Layer(ResidualLayer):
    """Attention and MLP."""

    def __init__(self, config: TransformerConfig, pattern: Pattern, execution: Execution) -> None:
        super().__init__(execution.checkpointing)
        self.attention = Attention(config, pattern, execution)
        self.mlp = MLP(config)
        if execution.compile:
            self.attention.compile()
            self.mlp.compile()

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.attention, self.mlp

    def forward(self, x: Tensor) -> Tensor:  # [b, n, w] -> [b, n, w]
        return self.add(1, self.add(0, x))

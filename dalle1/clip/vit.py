"""The transformers of CLIP: the blocks of both encoders, and the ViT that reads images.

Dimensions: b batch, n positions, s heads, d head size, w width of an encoder, e shared embedding.
Parameter names are those of the published weights.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dalle1.clip.config import CLIPConfig
from dalle1.common.attention import attend_widened


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the published models' activation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702  # x sigmoid(1.702 x), by a function that torch has whole


ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class SelfAttention(nn.Module):
    """Multi-head self-attention with the published parameter names."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [b, n, w] -> [b, n, w]
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = rearrange(qkv, "b n (three s d) -> three b s n d", three=3, s=self.heads)
        y = attend_widened(self._attend, q, k, v)
        out: Tensor = self.out_proj(rearrange(y, "b s n d -> b n (s d)"))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm attention and MLP of both encoders."""

    def __init__(self, width: int, heads: int, causal: bool, activation: str) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", ACTIVATIONS[activation]())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # [b, n, w] -> [b, n, w]
        x = x + self.attn(self.ln_1(x))
        y: Tensor = x + self.mlp(self.ln_2(x))
        return y


class Stack(nn.Module):
    """The blocks of an encoder, one after the other."""

    def __init__(self, width: int, layers: int, heads: int, causal: bool, activation: str) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.resblocks = nn.Sequential(
            *(ResidualAttentionBlock(width, heads, causal, activation) for _ in range(layers))
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.resblocks(x)
        return y

    def initialize(self) -> None:
        """The published initialization."""
        residual = self.width**-0.5 * (2 * self.layers) ** -0.5
        for block in self.resblocks:
            assert isinstance(block, ResidualAttentionBlock)
            nn.init.normal_(block.attn.in_proj_weight, std=self.width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * self.width) ** -0.5)  # type: ignore[union-attr, arg-type]
            nn.init.normal_(block.mlp.c_proj.weight, std=residual)  # type: ignore[union-attr, arg-type]


class VisionTransformer(nn.Module):
    """Patches and a class token to one embedding."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        assert isinstance(config.vision_layers, int)
        width, patch = config.vision_width, config.patch_size
        patches = (config.image_size // patch) ** 2
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Stack(
            width, config.vision_layers, config.vision_heads, False, config.activation
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.embedding))

    def initialize(self) -> None:
        """The published initialization of the blocks; the rest has it from the start."""
        self.transformer.initialize()

    def forward(self, x: Tensor) -> Tensor:  # [b, 3, H, W] -> [b, e]
        x = rearrange(self.conv1(x), "b w rows columns -> b (rows columns) w")
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        y: Tensor = self.ln_post(x[:, 0]) @ self.proj
        return y

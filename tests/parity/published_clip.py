"""The published CLIP restated with torch's own attention; nothing of `dalle1`."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mask: Tensor | None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU())]
        layers.append(("c_proj", nn.Linear(4 * width, width)))
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.attn_mask = mask

    def forward(self, x: Tensor) -> Tensor:  # [n, b, w]
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, mask: Tensor | None = None) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, heads, mask) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:  # [b, n, w]
        return self.resblocks(x.permute(1, 0, 2)).permute(1, 0, 2)


class Vision(nn.Module):
    def __init__(self, side: int, patch: int, width: int, layers: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) / 8)
        count = (side // patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(torch.randn(count, width) / 8)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Tower(width, layers, width // 64)
        self.proj = nn.Parameter(torch.randn(width, out) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        first = self.class_embedding + torch.zeros(x.shape[0], 1, x.shape[-1])
        x = self.ln_pre(torch.cat([first, x], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0, :]) @ self.proj


class PublishedCLIP(nn.Module):
    """Gives the cosines [images, texts] of normalized pixels and ids."""

    def __init__(
        self,
        side: int = 32,
        patch: int = 16,
        vision: int = 128,
        text: int = 64,
        layers: int = 2,
        out: int = 32,
        vocab: int = 600,
        length: int = 12,
    ) -> None:
        super().__init__()
        self.visual = Vision(side, patch, vision, layers, out)
        mask = torch.full((length, length), float("-inf")).triu(1)
        self.transformer = Tower(text, layers, text // 64, mask)
        self.token_embedding = nn.Embedding(vocab, text)
        self.positional_embedding = nn.Parameter(torch.randn(length, text) / 8)
        self.ln_final = nn.LayerNorm(text)
        self.text_projection = nn.Parameter(torch.randn(text, out) / 8)
        self.logit_scale = nn.Parameter(torch.tensor(2.659))
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, 0.5, 0.3)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding
        x = self.ln_final(self.transformer(x))
        text = x[torch.arange(x.shape[0]), ids.argmax(dim=-1)] @ self.text_projection
        image = self.visual(pixels)
        image = image / image.norm(dim=1, keepdim=True)
        return image @ (text / text.norm(dim=1, keepdim=True)).t()

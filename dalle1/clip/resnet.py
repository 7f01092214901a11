"""CLIP's ResNets: RN50, RN101, RN50x4, RN50x16 and RN50x64 (Radford et al. 2021, section 2.4).

They differ from the usual ResNet in three ways. The stem has three convolutions. Strides are
average pools in front of a convolution of stride 1, against aliasing. The last map is pooled by
attention, whose query is the map's mean. Parameter names are those of the published weights.

Dimensions: b batch, c channels, w width of the first stage, h rows and columns of a map, n
positions of the last map and its mean, s heads, d head size, e shared embedding.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dalle1.clip.config import BLOCK_EXPANSION, RESNET_STRIDE, CLIPConfig
from dalle1.common.attention import attend_widened

EXPANSION = 4  # channels that a block gives, for each of those that it works with


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut: [b, c, h, h] -> [b, 4 c', h / stride, h / stride]."""

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        out = EXPANSION * inner
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            parts: list[tuple[str, nn.Module]] = [
                ("pool", nn.AvgPool2d(stride)),
                ("0", nn.Conv2d(channels, out, 1, bias=False)),
                ("1", nn.BatchNorm2d(out)),
            ]
            self.downsample = nn.Sequential(OrderedDict(parts))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.avgpool(y)))
        return F.relu(y + self.downsample(x))


class AttentionPool(nn.Module):
    """One vector of a map: attention of the map's mean to the mean and all positions."""

    def __init__(self, side: int, width: int, heads: int, out: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width) * width**-0.5)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.c_proj = nn.Linear(width, width), nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:  # [b, c, h, h] -> [b, e]
        x = rearrange(x, "b c rows columns -> b (rows columns) c")
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        q, k, v = (
            rearrange(projection(y), "b n (s d) -> b s n d", s=self.heads)
            for projection, y in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        y = attend_widened(F.scaled_dot_product_attention, q, k, v)
        out: Tensor = self.c_proj(rearrange(y, "b s 1 d -> b (s d)"))
        return out


class ModifiedResNet(nn.Module):
    """Images to one embedding, in the place of `VisionTransformer`."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        assert isinstance(config.vision_layers, tuple)
        width, half = config.vision_width, config.vision_width // 2
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        channels, stages = width, []
        for i, blocks in enumerate(config.vision_layers):
            inner, stride = width * 2**i, 1 if i == 0 else 2
            first = Bottleneck(channels, inner, stride)
            channels = EXPANSION * inner
            rest = (Bottleneck(channels, inner, 1) for _ in range(blocks - 1))
            stages.append(nn.Sequential(first, *rest))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.attnpool = AttentionPool(
            config.image_size // RESNET_STRIDE,
            BLOCK_EXPANSION * width,
            config.vision_heads,
            config.embedding,
        )

    def initialize(self) -> None:
        """The published initialization: each block begins as its shortcut."""
        pool = self.attnpool
        for projection in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:  # [b, 3, H, W] -> [b, e]
        stem = ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))
        for convolution, norm in stem:
            x = F.relu(norm(convolution(x)))
        x = F.avg_pool2d(x, 2)  # [b, w, H / 4, W / 4]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        y: Tensor = self.attnpool(x)  # of [b, 32 w, H / 32, W / 32]
        return y

"""The blocks of a VQGAN's encoder and decoder (Esser et al., 2020), as in taming-transformers.

Dimensions: b batch, c d channels, h w height and width of feature maps.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.vqgan.config import VQGANConfig


def _wide(weight: Tensor, x: Tensor) -> Tensor:
    """A weight held in 16 bits, in the type of maps that are computed in 32."""
    return weight.to(x.dtype) if weight.dtype.itemsize < x.dtype.itemsize else weight


class Conv2d(nn.Conv2d):
    """torch's, with a bias; its weights may be in 16 bits where its input is in 32."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else _wide(bias, input)
        y: Tensor = super()._conv_forward(input, _wide(weight, input), bias)
        return y


class GroupNorm(nn.GroupNorm):
    """torch's, with a scale and a bias; its weights may be in 16 bits where its input is in 32."""

    def __init__(self, channels: int, config: VQGANConfig) -> None:
        super().__init__(config.norm_groups, channels, eps=config.norm_eps)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _wide(self.weight, input), _wide(self.bias, input)
        return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class ResnetBlock(nn.Module):
    """x, through a 1x1 convolution where the channels change, plus two (group norm, SiLU, 3x3
    convolution) in a row."""

    def __init__(self, n_in: int, n_out: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm1 = GroupNorm(n_in, config)
        self.conv1 = Conv2d(n_in, n_out, 3, padding=1)
        self.norm2 = GroupNorm(n_out, config)
        self.conv2 = Conv2d(n_out, n_out, 3, padding=1)
        if n_in != n_out:
            self.nin_shortcut = Conv2d(n_in, n_out, 1)
        self.changes_channels = n_in != n_out

    def forward(self, x: Tensor) -> Tensor:  # [b, c, h, w] -> [b, d, h, w]
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        skip: Tensor = self.nin_shortcut(x) if self.changes_channels else x
        result: Tensor = skip + y
        return result


class AttentionBlock(nn.Module):
    """x plus attention of one head, as wide as the maps, from each position to all."""

    def __init__(self, channels: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, config)
        self.q = Conv2d(channels, channels, 1)
        self.k = Conv2d(channels, channels, 1)
        self.v = Conv2d(channels, channels, 1)
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # [b, c, h, w] -> [b, c, h, w]
        y = self.norm(x)
        q, k, v = (
            rearrange(part(y), "b c h w -> b 1 (h w) c") for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)  # scale c^-1/2
        mixed = rearrange(mixed, "b 1 (h w) c -> b c h w", w=x.shape[3])
        result: Tensor = x + self.proj_out(mixed)
        return result


class Downsample(nn.Module):
    """Half the side: a 3x3 convolution of stride 2 over maps with a row of zeros below and a column
    of zeros to the right, and none above or to the left."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # [b, c, 2h, 2w] -> [b, c, h, w]
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return y


class Upsample(nn.Module):
    """Twice the side: each position four times, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [b, c, h, w] -> [b, c, 2h, 2w]
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, config: VQGANConfig) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, config)
        self.attn_1 = AttentionBlock(channels, config)
        self.block_2 = ResnetBlock(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return y


class Level(nn.Module):
    """The blocks of a resolution, each followed by attention where the level has it."""

    def __init__(self, n_in: int, level: int, blocks: int, config: VQGANConfig) -> None:
        super().__init__()
        n_out = config.widths[level]
        widths = [n_in, *[n_out] * (blocks - 1)]
        self.block = nn.ModuleList(ResnetBlock(n, n_out, config) for n in widths)
        attends = level in config.attention_levels
        self.attn = nn.ModuleList(AttentionBlock(n_out, config) for _ in range(blocks * attends))

    def forward(self, x: Tensor) -> Tensor:  # [b, c, h, w] -> [b, d, h, w]
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class DownLevel(Level):
    """A level of the encoder; every one but the lowest ends in half the side."""

    def __init__(self, level: int, config: VQGANConfig) -> None:
        n_in = config.widths[level - 1] if level else config.width
        super().__init__(n_in, level, config.blocks_per_level, config)
        lowest = level == len(config.widths) - 1
        self.downsample = nn.Identity() if lowest else Downsample(config.widths[level])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.downsample(super().forward(x))
        return y


class UpLevel(Level):
    """A level of the decoder; every one but the image's ends in twice the side."""

    def __init__(self, level: int, config: VQGANConfig) -> None:
        n_in = config.widths[min(level + 1, len(config.widths) - 1)]
        super().__init__(n_in, level, config.blocks_per_level + 1, config)
        self.upsample = Upsample(config.widths[level]) if level else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.upsample(super().forward(x))
        return y


class Encoder(nn.Module):
    """Pixels in the net's range to latent maps."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = Conv2d(config.channels, config.width, 3, padding=1)
        self.down = nn.ModuleList(DownLevel(level, config) for level in range(len(widths)))
        self.mid = Middle(widths[-1], config)
        self.norm_out = GroupNorm(widths[-1], config)
        self.conv_out = Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [b, channels, H, W] -> [b, latent_channels, h, w]
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        y: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return y


class Decoder(nn.Module):
    """Latent maps to pixels in the net's range, or to Haar bands; nothing bounds them."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config)
        # In the order of the resolutions, as the encoder's; they run from the lowest.
        self.up = nn.ModuleList(UpLevel(level, config) for level in range(len(widths)))
        self.norm_out = GroupNorm(widths[0], config)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:  # [b, latent_channels, h, w] -> [b, out_channels, H, W]
        x: Tensor = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        y: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return y

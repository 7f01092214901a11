"""Encoder, decoder and the codec made of both (paper section 2.1, appendix A.1-A.2).

Dimensions: b batch, c channels, H W image height and width, h w token grid, k codebook size.
The defaults are the paper's: 256x256 RGB, four groups, an 8,192-word codebook. Parameter names
are those of the released weights (`blocks.group_1.block_1.res_path.conv_1.w`, ...).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path

import torch
from einops import rearrange
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.calls import isolated
from dvae.convolutions import for_convolutions
from dvae.images import check_images
from dvae.objective import map_pixels, unmap_pixels
from dvae.storage import Kind, save_part
from dvae.tokens import check_tokens


class DVAEConfig(BaseModel):
    """Shape of a discrete VAE; the defaults are the paper's (appendix A.1)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    channels: int = Field(3, ge=1, description="color channels of an image")
    width: int = Field(256, ge=4, multiple_of=4, description="n_hid: width of the outermost group")
    bottleneck: int = Field(128, ge=1, description="n_init: width of the decoder's first map")
    groups: int = Field(4, ge=1, description="groups of blocks; a factor 2 between neighbors")
    blocks_per_group: int = Field(2, ge=1, description="residual blocks in a group")
    codebook_size: int = Field(8192, ge=2, description="k: number of image tokens")
    residual_gain: float | None = Field(
        None,
        gt=0,
        description="post_gain, the factor on each residual path; null: the paper's "
        "1 / (number of blocks)^2",
    )
    init_gain: float = Field(1.0, gt=0, description="factor on the weights' initial deviation")
    encoder_window: int | None = Field(
        None,
        ge=1,
        description="the encoder sees squares of so many tokens a side, each on its own, and so a "
        "token stands for what is in its square and nothing else; null: the full image",
    )

    @property
    def stride(self) -> int:
        """Pixels a token's side stands for (8 in the paper)."""
        return int(2 ** (self.groups - 1))

    @property
    def post_gain(self) -> float:
        """Factor on each residual path."""
        if self.residual_gain is not None:
            return self.residual_gain
        return 1.0 / (self.groups * self.blocks_per_group) ** 2


class Conv2d(nn.Module):
    """Convolution that keeps the image's size; weights start N(0, 1 / (n_in k^2)), biases 0."""

    def __init__(self, n_in: int, n_out: int, kernel: int, full_precision: bool = False) -> None:
        super().__init__()
        self.kernel = kernel
        self.full_precision = full_precision
        self.w = nn.Parameter(torch.empty(n_out, n_in, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(n_out))
        nn.init.normal_(self.w, std=1.0 / math.sqrt(n_in * kernel**2))

    def forward(self, x: Tensor) -> Tensor:  # [b, n_in, H, W] -> [b, n_out, H, W]
        if self.full_precision:
            # The convolutions next to the relaxation stay in 32 bits under mixed precision (A.2).
            with torch.autocast(x.device.type, enabled=False):
                return F.conv2d(x.float(), self.w.float(), self.b.float(), padding=self.kernel // 2)
        w: Tensor = self.w
        b: Tensor = self.b
        if w.dtype.itemsize < x.dtype.itemsize:  # held in 16 bits; images are in 32
            w, b = w.to(x.dtype), b.to(x.dtype)
        return F.conv2d(x, w, b, padding=self.kernel // 2)


class ResidualBlock(nn.Module):
    """identity(x) + post_gain * four (ReLU, convolution) pairs of a quarter of the width."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...], post_gain: float) -> None:
        super().__init__()
        hidden = n_out // 4
        widths = [n_in] + [hidden] * (len(kernels) - 1) + [n_out]
        self.post_gain = post_gain
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        path: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            path[f"relu_{i + 1}"] = nn.ReLU()
            path[f"conv_{i + 1}"] = Conv2d(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(path)

    def forward(self, x: Tensor) -> Tensor:  # [b, n_in, H, W] -> [b, n_out, H, W]
        identity: Tensor = self.id_path(x)
        residual: Tensor = self.res_path(x)
        return identity + self.post_gain * residual


class Encoder(nn.Module):
    """Picture, pixels mapped by `map_pixels`, to logits over the codebook."""

    KERNELS = (3, 3, 3, 1)

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        n_in = config.width
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        blocks["input"] = Conv2d(config.channels, n_in, 7)
        for g in range(config.groups):
            n_out = config.width * 2**g
            group: OrderedDict[str, nn.Module] = OrderedDict()
            for i in range(config.blocks_per_group):
                group[f"block_{i + 1}"] = ResidualBlock(n_in, n_out, self.KERNELS, config.post_gain)
                n_in = n_out
            if g < config.groups - 1:
                group["pool"] = nn.MaxPool2d(2)
            blocks[f"group_{g + 1}"] = nn.Sequential(group)
        blocks["output"] = nn.Sequential(
            OrderedDict(
                relu=nn.ReLU(), conv=Conv2d(n_in, config.codebook_size, 1, full_precision=True)
            )
        )
        self.blocks = nn.Sequential(blocks)
        self.window = config.encoder_window
        self.stride = config.stride

    def features(self, x: Tensor) -> Tensor:  # [b, c, H, W] -> [b, n, h, w]
        """What the output convolution reads."""
        if self.window is None:
            return F.relu(self.blocks[:-1](x))
        side, rows = self.window * self.stride, x.shape[2] // (self.window * self.stride)
        windows = rearrange(x, "b c (r p) (s q) -> (b r s) c p q", p=side, q=side)
        y = F.relu(self.blocks[:-1](for_convolutions(windows)))
        return rearrange(y, "(b r s) n p q -> b n (r p) (s q)", b=len(x), r=rows)

    def forward(self, x: Tensor) -> Tensor:  # [b, c, H, W] -> [b, k, h, w]
        last: Conv2d = self.blocks.output.conv  # type: ignore[union-attr, assignment]
        logits: Tensor = last(self.features(x))
        return logits


class Decoder(nn.Module):
    """One-hot or relaxed tokens to the means and log-scales of the logit-Laplace pixels."""

    KERNELS = (1, 3, 3, 3)

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        n_in = config.bottleneck
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        blocks["input"] = Conv2d(config.codebook_size, n_in, 1, full_precision=True)
        for g in range(config.groups):
            n_out = config.width * 2 ** (config.groups - 1 - g)
            group: OrderedDict[str, nn.Module] = OrderedDict()
            for i in range(config.blocks_per_group):
                group[f"block_{i + 1}"] = ResidualBlock(n_in, n_out, self.KERNELS, config.post_gain)
                n_in = n_out
            if g < config.groups - 1:
                group["upsample"] = nn.Upsample(scale_factor=2, mode="nearest")
            blocks[f"group_{g + 1}"] = nn.Sequential(group)
        blocks["output"] = nn.Sequential(
            OrderedDict(relu=nn.ReLU(), conv=Conv2d(n_in, 2 * config.channels, 1))
        )
        self.blocks = nn.Sequential(blocks)

    def forward(self, z: Tensor) -> Tensor:  # [b, k, h, w] -> [b, 2c, H, W]
        maps: Tensor = self.blocks(z)
        return maps


class DVAE(nn.Module):
    """Images to tokens and back: `encode` is the plain argmax of the logits, without noise.

    A `dvae.codec.Codec`.
    """

    decodes_rows = True  # the decoder is convolutional: only the last row sees what lies below

    def __init__(self, config: DVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config or DVAEConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        if self.config.init_gain != 1:
            with torch.no_grad():
                for module in self.modules():
                    if isinstance(module, Conv2d):
                        module.w.mul_(self.config.init_gain)

    @property
    def vocab_size(self) -> int:
        """Number of image tokens: the codebook's size."""
        return self.config.codebook_size

    @property
    def stride(self) -> int:
        """Pixels of a token's side, read and written."""
        return self.config.stride

    @property
    def out_stride(self) -> int:
        """As `stride`: the decoder writes images as large as those that are read."""
        return self.config.stride

    def logits(self, images: Tensor) -> Tensor:
        """Codebook logits, float [b, k, H/stride, W/stride], of images [b, c, H, W] in [0, 1].

        Raises ValueError when the shape or the values do not fit or the type is not floating point.
        """
        self._check_images(images)
        dtype = self.encoder.blocks.input.w.dtype  # type: ignore[union-attr]
        pixels = map_pixels(images.to(dtype))  # type: ignore[arg-type]
        logits: Tensor = self.encoder(for_convolutions(pixels))
        return logits

    @isolated()
    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Image tokens, int64 [b, H/stride, W/stride], of images, float [b, c, H, W] in [0, 1]."""
        if self.config.encoder_window is None or images.device.type != "cpu":
            return self.logits(images).argmax(dim=1)
        self._check_images(images)
        # Windows are encoded each on its own, so equal ones once: most of a drawing is background.
        # A GPU would wait for their number.
        side = self.config.encoder_window * self.stride
        rows = images.shape[2] // side
        windows = rearrange(images, "b c (r p) (s q) -> (b r s) (c p q)", p=side, q=side)
        different, which = windows.unique(dim=0, return_inverse=True)
        shape = (self.config.channels, side, side)
        tokens = self.logits(different.unflatten(1, shape)).argmax(dim=1)[which]
        return rearrange(tokens, "(b r s) p q -> b (r p) (s q)", b=len(images), r=rows)

    @isolated()
    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images, float [b, c, H, W] in [0, 1], of tokens, int64 [b, h, w].

        Raises ValueError for tokens outside the codebook or of another type or rank.
        """
        check_tokens(tokens, self.vocab_size)
        return self._decode(tokens)

    def _decode(self, tokens: Tensor) -> Tensor:
        first: Conv2d = self.decoder.blocks.input  # type: ignore[assignment]
        # A 1x1 convolution of a one-hot map is a row of its weights: look it up instead.
        rows = F.embedding(tokens, first.w[:, :, 0, 0].t())
        x = rows.float() + first.b.float()  # [b, h, w, bottleneck]
        x = x.movedim(-1, 1)
        x = for_convolutions(x) if x.device.type == "cpu" else x.contiguous()
        x = self.decoder.blocks[1:](x)  # [b, 2c, H, W]
        mean = x[:, : self.config.channels]
        return unmap_pixels(torch.sigmoid(mean.float()))

    def _check_images(self, images: Tensor) -> None:
        side = self.stride * (self.config.encoder_window or 1)
        check_images(images, self.config.channels, stride=side)

    def save(self, folder: str | Path) -> None:
        """Writes `config.json` and `dvae.safetensors` into `folder`; `dvae.load` opens it."""
        save_part(KIND, self, folder)


KIND: Kind = Kind("codec", "dvae", DVAEConfig, DVAE, "dvae.safetensors")

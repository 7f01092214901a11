"""A codec without a network: each distinct patch of the training images is a code.

Images of a few flat colors have few distinct patches. Training images are then copied exactly, and
nothing has to be trained before the prior. The side of the patches is a setting that a finding can
vary.

Dimensions: b images, h w rows and columns of tokens, s side of a patch, v codes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from dalle1.registry import register
from dvae.storage import Kind, save_part


class PatchConfig(BaseModel):
    """Shape of a codebook of patches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    codes: int = Field(ge=2, le=2**16, description="patches in the codebook")
    side: int = Field(ge=1, le=64, description="pixels of a patch's side")


class PatchCodec(nn.Module):
    """A `dvae.codec.Codec`: a token is the patch of the codebook that is nearest to the pixels.

    Attributes:
        patches: float32 [v, 3, s, s] in [0, 1].
    """

    decodes_rows = True  # no token depends on those below it

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.config, self.vocab_size = config, config.codes
        self.stride = self.out_stride = config.side
        shape = (config.codes, 3, config.side, config.side)
        self.patches = nn.Parameter(torch.zeros(shape), requires_grad=False)

    @classmethod
    def of_images(cls, images: Tensor, side: int) -> PatchCodec:
        """The codec whose codes are all distinct patches of images, float [b, 3, H, W] in [0, 1].

        Raises ValueError where they have fewer than 2 or more than 65,536, or sides that are no
        multiples of `side`.
        """
        rows = rearrange(_cut(images, side), "b h w d -> (b h w) d").unique(dim=0)
        if not 2 <= len(rows) <= 2**16:
            raise ValueError(
                f"images: expected 2 to 65,536 distinct patches of {side} x {side} pixels, got "
                f"{len(rows):,}; take images of a few flat colors, or smaller patches"
            )
        codec = cls(PatchConfig(codes=len(rows), side=side))
        codec.patches.data = rearrange(rows, "v (c y x) -> v c y x", y=side, x=side)
        return codec.eval()

    def encode(self, images: Tensor) -> Tensor:
        """float [b, 3, H, W] -> int64 [b, h, w], the patches of the least squared distance."""
        codes = rearrange(self.patches, "v c y x -> v (c y x)")
        rows = [
            torch.cdist(rearrange(part, "b h w d -> b (h w) d"), codes).argmin(-1)
            for part in _cut(images, self.stride).split(64)  # the distances take memory
        ]
        tokens: Tensor = torch.cat(rows).unflatten(1, (-1, images.shape[-1] // self.stride))
        return tokens

    def decode(self, tokens: Tensor) -> Tensor:
        """int64 [b, h, w] -> float32 [b, 3, h s, w s]."""
        images: Tensor = rearrange(self.patches[tokens], "b h w c y x -> b c (h y) (w x)")
        return images

    def knows(self, images: Tensor) -> Tensor:
        """Whether every patch of an image is a code: [b, 3, H, W] -> bool [b]."""
        error = (self.decode(self.encode(images)) - images).abs().amax(dim=(1, 2, 3))
        return error < 1e-3


def _cut(images: Tensor, side: int) -> Tensor:
    """Patches as rows of numbers: [b, 3, H, W] -> [b, h, w, 3 s s]."""
    if images.shape[-1] % side or images.shape[-2] % side:
        raise ValueError(
            f"images: expected sides that are multiples of {side}, got {list(images.shape)}"
        )
    return rearrange(images, "b c (h y) (w x) -> b h w (c y x)", y=side, x=side)


KIND = Kind("codec", "patches", PatchConfig, PatchCodec, "patches.safetensors")


def save_codec(codec: PatchCodec, folder: Path) -> None:
    """Writes a codec that stages can read: its kind is known from now on in this process."""
    register(KIND)
    save_part(KIND, codec, folder)

"""Decodes tokens of a prior's grid to images, a few at a time.

Dimensions: b images, m image positions (rows x columns of the grid), H W image height and width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from dalle1.common.weights import device_of
from dvae.calls import isolated
from dvae.codec import Codec

LARGEST_BATCH = 512
WIDTH = 256  # channels of a decoder's largest feature maps in the paper; few codecs have more


@isolated()
@torch.no_grad()
def decode(codec: Codec, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images of tokens [b, m]: float32 [b, 3, H, W] in [0, 1], on the CPU."""
    folded = rearrange(tokens, "b (r c) -> b r c", c=grid[1])
    device = device_of(codec)
    parts = folded.split(images_at_once(codec, grid))
    # Clamped: what a codec of somebody else's writes a little beyond must not end hours of work.
    images = [codec.decode(part.to(device)).float().clamp(0, 1).cpu() for part in parts]
    return torch.cat(images)


def decode_rows(codec: Codec, tokens: Tensor, rows: int, grid: tuple[int, int]) -> Tensor:
    """The upper part of images of which the first `rows` token rows are drawn.

    A codec that cannot decode rows alone gets token 0 for what is not drawn.

    Args:
        tokens: int64 [b, m].

    Returns:
        float32 [b, 3, rows x out_stride, W] in [0, 1], on the CPU.
    """
    drawn = tokens[:, : rows * grid[1]]
    if codec.decodes_rows:
        return decode(codec, drawn, grid)
    full = F.pad(drawn, (0, grid[0] * grid[1] - drawn.shape[1]))
    return decode(codec, full, grid)[:, :, : rows * codec.out_stride]


def image_size(codec: Codec, grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of decoded images in pixels."""
    return grid[0] * codec.out_stride, grid[1] * codec.out_stride


def images_at_once(codec: Codec, grid: tuple[int, int]) -> int:
    """Images that are decoded at once, by their number of pixels.

    On CUDA 16 images of 256x256 pixels or about as many pixels, on CPUs 16 of 32x32: larger feature
    maps leave the processor's cache.
    """
    height, width = image_size(codec, grid)
    pixels = 2**20 if device_of(codec).type == "cuda" else 2**14
    return min(LARGEST_BATCH, max(1, pixels // (height * width)))


def decoding_images_bytes(codec: Codec, grid: tuple[int, int]) -> int:
    """About the memory that decoding takes: a few feature maps of each image decoded at once."""
    height, width = image_size(codec, grid)
    return images_at_once(codec, grid) * 4 * 4 * WIDTH * height * width

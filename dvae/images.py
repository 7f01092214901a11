"""What images must be before they are encoded or scored.

Dimensions: b images, c channels, H W image height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dvae.calls import is_trusted

TOLERANCE = 1e-3  # beyond [0, 1]: resizing and 16 bits round


def check_images(
    images: Tensor, channels: int = 3, name: str = "images", stride: int | None = None
) -> None:
    """Raises ValueError where images are no floats [b, c, H, W] in [0, 1].

    The values are read, which makes the host wait for the device; not so for our own code, see
    `dvae.calls.trusted`.

    Args:
        images: of any device.
        channels: c.
        name: of the argument, for the message.
        stride: what H and W must be multiples of, in pixels, and not 0; None: any do.
    """
    wanted = f"{name}: expected floats [b, {channels}, H, W] in [0, 1], got"
    if not isinstance(images, Tensor):
        raise ValueError(f"{wanted} {type(images).__name__}; make a tensor of it")
    shape = list(images.shape)
    if not images.is_floating_point():
        remedy = "; divide by 255" if images.dtype == torch.uint8 else ""
        raise ValueError(f"{wanted} {images.dtype} {shape}{remedy}")
    if images.layout != torch.strided:
        raise ValueError(f"{wanted} {images.layout}; use images.to_dense()")
    if images.ndim != 4 or shape[1] != channels:
        raise ValueError(f"{name}: expected [b, {channels}, H, W], got {shape}")
    if stride is not None and (shape[2] % stride or shape[3] % stride or 0 in shape[2:]):
        raise ValueError(f"{name}: height and width must be multiples of {stride}, got {shape[2:]}")
    if is_trusted() or images.is_meta or not images.numel():
        return
    low, high = (float(x) for x in images.detach().aminmax())  # NaN where one value is
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:
        return
    if low != low:
        raise ValueError(f"{wanted} NaN")
    raise ValueError(f"{wanted} values in [{low:g}, {high:g}]{_remedy(low, high)}")


def _remedy(low: float, high: float) -> str:
    """What makes values of a known range those in [0, 1]."""
    if -1 - TOLERANCE <= low < 0 and high <= 1 + TOLERANCE:
        return "; from [-1, 1] it is (images + 1) / 2"
    if low >= 0 and 1 < high <= 255 + TOLERANCE:
        return "; from [0, 255] it is images / 255"
    return "; give images before they are normalized"

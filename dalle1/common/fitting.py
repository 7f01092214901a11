"""Images of any size as a network reads them: fitted into its size, then normalized.

Dimensions: b images, H W height and width as they come, h w as the network reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dalle1.common.image_inputs import ImageLike, read_images
from dalle1.common.images import to_tensor
from dvae.calls import isolated
from dvae.images import check_images

# How the sides are brought to those of the network; square images come out alike, up to rounding.
#   shortest: the shorter side is resized, the center is cut out (OpenAI's CLIP)
#   square: the largest square in the center is cut out and resized (ruCLIP)
#   longest: the longer side is resized, the rest is filled up with black
#   squash: each side is resized for itself (SigLIP)
Fit = Literal["shortest", "square", "longest", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
_PIL = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Preprocessing:
    """What an image encoder is given of an image.

    Attributes:
        size: height and width that it reads.
        mean, std: subtracted from and dividing red, green and blue in [0, 1].
        interpolation: of the resizing, which is smoothed against aliasing.
        fit: see `Fit`.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    interpolation: Interpolation = "bicubic"
    fit: Fit = "shortest"

    def __call__(
        self, images: Tensor | Iterable[ImageLike], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Images as the encoder reads them, [b, 3, h, w] of the type.

        images: pixels [b, 3, H, W] in [0, 1], which stay on their device; or a list of PIL images
            of any mode and size, or of what else `read_images` takes.
        dtype: of the encoder's weights. What is below 32 bits is computed in 32.

        Raises ValueError where there are none, or one is no image.
        """
        wide = torch.promote_types(dtype, torch.float32)  # 16 bits would round at every step
        if isinstance(images, Tensor):
            check_images(images)
            pixels = self.fitted(images.to(wide))
        else:
            images = [] if isinstance(images, Image.Image) else list(images)
            if not images:
                raise ValueError("images: expected a list of at least one image, or a tensor")
            parts = [self._fitted_one(image, wide) for image in read_images(images)]
            pixels = torch.cat(parts).to(device)
        mean, std = (
            _by_channel(values, str(pixels.device), pixels.dtype)
            for values in (self.mean, self.std)
        )
        return ((pixels - mean) / std).to(dtype)

    def fitted(self, images: Tensor) -> Tensor:
        """Resized and cut: floats [b, 3, H, W] in [0, 1] -> [b, 3, h, w]."""
        if 0 in images.shape[2:]:
            raise ValueError(f"images: expected at least one pixel, got {list(images.shape)}")
        top, left, height, width = self._cut_first(images.shape[2], images.shape[3])
        images = images[:, :, top : top + height, left : left + width]
        resized = self._resized(height, width)
        if resized != (height, width):
            images = F.interpolate(
                images, list(resized), mode=self.interpolation, antialias=True
            ).clamp(0, 1)
        return self._centered(images)

    def _fitted_one(self, image: Tensor | Image.Image, dtype: torch.dtype) -> Tensor:
        """The same of one image of `read_images`; of 8 bits by PIL, as published."""
        if isinstance(image, Tensor):
            return self.fitted(image[None].to(dtype))
        top, left, height, width = self._cut_first(image.height, image.width)
        rows, columns = self._resized(height, width)
        if (height, width) != (image.height, image.width):
            # Not by resize's box, whose smoothing reads beyond it.
            image = image.crop((left, top, left + width, top + height))
        image = image.resize((columns, rows), _PIL[self.interpolation])
        return self._centered(to_tensor(image)[None].to(dtype))

    def _cut_first(self, height: int, width: int) -> tuple[int, int, int, int]:
        """What is taken of an image before it is resized: top, left, height, width."""
        if self.fit != "square":
            return 0, 0, height, width
        side = min(height, width)
        return (height - side) // 2, (width - side) // 2, side, side

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to resize to; what is no whole number of pixels is cut off."""
        if self.fit in ("square", "squash"):
            return self.size
        ratios = [(self.size[0], height), (self.size[1], width)]
        # The side that decides is exact; compared as products, without rounding.
        taller = ratios[0][0] * width >= ratios[1][0] * height
        by_height = taller if self.fit == "shortest" else not taller
        numerator, denominator = ratios[0] if by_height else ratios[1]
        return (
            max(1, height * numerator // denominator),
            max(1, width * numerator // denominator),
        )

    def _centered(self, images: Tensor) -> Tensor:
        """The center of images that are larger, or black around those that are smaller."""
        for dim, size in ((2, self.size[0]), (3, self.size[1])):
            spare = images.shape[dim] - size
            if spare > 0:
                images = images.narrow(dim, round(spare / 2), size)
            elif spare < 0:
                before = -spare // 2
                pad = (before, -spare - before)
                images = F.pad(images, (0, 0, *pad) if dim == 2 else pad)
        return images


@lru_cache(maxsize=32)
@isolated()  # kept on the device: a copy at every call would wait for it
def _by_channel(values: tuple[float, ...], device: str, dtype: torch.dtype) -> Tensor:
    """Numbers of the channels, [c, 1, 1]."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]

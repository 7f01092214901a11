"""What people hand in as images, as images: files, arrays, tensors, PIL images, one or many.

Dimensions: b images, c channels, H W image height and width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import groupby

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from dalle1.common.image_files import open_image
from dalle1.common.images import to_rgb, to_tensor
from dvae.images import check_images

# What a person may hand in as an image; see `read_images`.
ImageLike = Image.Image | str | os.PathLike[str] | np.ndarray | Tensor
CHANNELS = (1, 3, 4)  # gray, RGB, RGB and opacity
BATCH = 64  # images that are put together in one tensor


def read_images(
    images: ImageLike | Iterable[ImageLike], name: str = "images"
) -> list[Image.Image | Tensor]:
    """What a person hands in as one or several images.

    Args:
        images: PIL images of any mode and size; image files; NumPy arrays [H, W], [H, W, c] or
            [b, H, W, c] of uint8, or of floats in [0, 1]; tensors [H, W], [c, H, W] or
            [b, c, H, W] of floats in [0, 1]. One of these, or a list of single ones. c is 3, or 1
            for gray; an array may also have 4, of which the last is opacity.
        name: of the argument, for messages.

    Returns:
        At least one: images of 8 bits as PIL images in mode RGB, others as float32 [3, H, W].

    Raises:
        ValueError: there are none, a file cannot be read, or something is no image.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind in "OU":  # of paths, say
        images = images.tolist()
    if isinstance(images, Image.Image | str | os.PathLike | np.ndarray | Tensor):
        found = _read(images, name)
    elif isinstance(images, Iterable) and not isinstance(
        images, bytes | memoryview | Mapping | Set
    ):
        found = [_read_one(image, f"{name}[{i}]") for i, image in enumerate(images)]
    else:
        raise _no_image(images, name)
    if not found:
        raise ValueError(f"{name}: expected at least one")
    return found


def _read_one(image: object, name: str) -> Image.Image | Tensor:
    found = _read(image, name)
    if len(found) != 1:
        raise ValueError(f"{name}: expected one image in each place of a list, got {len(found)}")
    return found[0]


def _read(images: object, name: str) -> list[Image.Image | Tensor]:
    if isinstance(images, Image.Image):
        if 0 in images.size:
            raise _no_image(images, name, f"{images.width}x{images.height} pixels")
        try:
            floats = np.asarray(images) if images.mode == "F" else None
            if floats is None or _are_8_bits(floats):
                return [to_rgb(images)]
        except Exception as error:  # a file that was opened, and closed, or is cut short
            raise ValueError(f"{name}: cannot be read: {error}") from error
        return _read_array(floats, name)
    if isinstance(images, str | os.PathLike):
        return [open_image(images)]
    if isinstance(images, np.ndarray):
        return _read_array(images, name)
    if isinstance(images, Tensor):
        return list(_read_floats(images, name).unbind())
    raise _no_image(images, name)


def _are_8_bits(floats: np.ndarray) -> bool:
    """Whether PIL's floats are those of 8 bits, as its conversion makes them; not of [0, 1]."""
    low, high = float(floats.min()), float(floats.max())
    return low >= 0 and 1 < high <= 255


def _read_array(images: np.ndarray, name: str) -> list[Image.Image | Tensor]:
    """Images of an array [H, W], [H, W, c] or [b, H, W, c]."""
    shaped = images[..., None] if images.ndim == 2 else images
    shaped = shaped[None] if shaped.ndim == 3 else shaped
    floats = images.dtype.kind == "f"
    if not (floats or images.dtype == np.uint8):
        what = f"an array of {images.dtype}"
        raise _no_image(images, name, f"{what}; make it uint8, or floats in [0, 1]")
    if shaped.ndim != 4 or shaped.shape[-1] not in CHANNELS or 0 in shaped.shape[1:]:
        first = images.ndim > 2 and images.shape[-3] in CHANNELS
        hint = "; in arrays the channels come last: use np.moveaxis(x, -3, -1)" if first else ""
        raise _no_image(images, name, f"an array {list(images.shape)}{hint}")
    if not floats:
        squeezed = shaped[..., 0] if shaped.shape[-1] == 1 else shaped
        return [to_rgb(Image.fromarray(np.ascontiguousarray(image))) for image in squeezed]
    pixels = torch.from_numpy(np.array(shaped, np.float32, order="C"))
    pixels = rearrange(pixels, "b h w c -> b c h w")
    check_images(pixels, pixels.shape[1], name)
    if pixels.shape[1] == 4:
        opacity = pixels[:, 3:]
        pixels = pixels[:, :3] * opacity + (1 - opacity)  # on white, as `to_rgb`
    return list(_read_floats(pixels, name).unbind())


def _read_floats(images: Tensor, name: str) -> Tensor:
    """float32 [b, 3, H, W] of a tensor [H, W], [c, H, W] or [b, c, H, W]."""
    shaped = images[None] if images.ndim == 2 else images
    shaped = shaped[None] if shaped.ndim == 3 else shaped
    if shaped.ndim != 4 or shaped.shape[1] not in (1, 3) or 0 in shaped.shape[1:]:
        last = images.ndim > 2 and images.shape[-1] in CHANNELS
        hint = "; in tensors the channels come first: use x.movedim(-1, -3)" if last else ""
        raise _no_image(images, name, f"a tensor {list(images.shape)}{hint}")
    check_images(shaped, shaped.shape[1], name)
    if images.is_meta:
        raise _no_image(images, name, "a tensor without values, on the meta device")
    return shaped.detach().float().expand(-1, 3, -1, -1)


def _no_image(images: object, name: str, what: str = "") -> ValueError:
    return ValueError(
        f"{name}: expected a PIL image, a file, an array, a tensor or a list of these, got "
        f"{what or type(images).__name__}"
    )


def image_batches(images: Sequence[Image.Image | Tensor]) -> Iterator[Tensor]:
    """What `read_images` gave, as float32 [b, 3, H, W] in [0, 1], in the same order.

    Neighbors of one size are put together, at most BATCH of them.
    """

    def size(i: int) -> tuple[object, ...]:
        image = images[i]
        if isinstance(image, Tensor):
            return (*image.shape[1:], image.device)
        return (image.height, image.width, torch.device("cpu"))

    for _, same in groupby(range(len(images)), size):
        numbers = list(same)
        for first in range(0, len(numbers), BATCH):
            some = [images[i] for i in numbers[first : first + BATCH]]
            yield torch.stack([x if isinstance(x, Tensor) else to_tensor(x) for x in some])

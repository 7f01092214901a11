"""What a codec is to the rest of the library, and the kinds of codec that there are.

Dimensions: b batch, H W image height and width in pixels, h w token grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

from torch import Tensor

from dvae import model
from dvae.storage import Kind, load_part
from dvae.vqgan import model as vqgan


class Codec(Protocol):
    """Images to tokens and back; an `nn.Module`, whose device is that of its parameters.

    Attributes:
        vocab_size: number of image tokens.
        stride: pixels of a token's side in the images that are read.
        out_stride: the same in the images that are written; a decoder may write larger ones.
        decodes_rows: whether the upper rows of a grid can be decoded alone, for previews.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def out_stride(self) -> int: ...
    @property
    def decodes_rows(self) -> bool: ...

    def encode(self, images: Tensor) -> Tensor:
        """Tokens, int64 [b, H/stride, W/stride], of images, float [b, 3, H, W] in [0, 1].

        A function of the images alone: no noise. Raises ValueError where the shape does not fit.
        """
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Images, float [b, 3, h * out_stride, w * out_stride] in [0, 1], of int64 [b, h, w]."""
        ...


# By the "kind" in a folder's config.json; see `dalle1.registry.register` for kinds of others.
CODECS: dict[str, Kind] = {kind.name: kind for kind in (model.KIND, vqgan.KIND)}


def load(folder: str | Path) -> Codec:
    """The codec of a folder that a codec's `save` (or a full model's) wrote, in eval mode.

    Raises ValueError that names the file when one is missing, truncated or does not fit.
    """
    return cast(Codec, load_part("codec", CODECS, folder))

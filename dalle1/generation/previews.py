"""The rows drawn so far, as images, while candidates are drawn.

Dimensions: b candidates, h rows of pixels that are drawn, W image width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from dalle1.common.images import to_pil
from dalle1.generation.batches import Part
from dalle1.generation.images import decode_rows
from dalle1.protocols import TokenModel

NOT_DRAWN = "lightgray"


@dataclass
class Preview:
    """The rows drawn so far of one batch of a caption's candidates."""

    caption: str
    first: int  #: candidate number of images[0]
    rows: int  #: token rows that are drawn
    images: Tensor  #: float32 [b, 3, rows x out_stride, W] in [0, 1]: the images' upper parts


class Previews:
    """Calls functions with the rows drawn so far of a part, every few rows."""

    def __init__(
        self,
        model: TokenModel,
        captions: Sequence[str],
        every: int,
        listeners: Sequence[Callable[[Preview], None]],
        limit: int | None = None,
    ) -> None:
        """
        Args:
            captions: all that are drawn; parts name them by their index.
            every: token rows between two previews.
            listeners: called one after the other, with the same previews.
            limit: candidates of a part that are decoded; None: all of them.
        """
        self.model, self.captions, self.every = model, captions, every
        self.listeners, self.limit = listeners, limit

    def show(self, part: Part, rows: int) -> None:
        """Decodes the first rows of a part's images, caption by caption, when a preview is due."""
        grid = self.model.prior.grid
        if rows % self.every and rows != grid[0]:
            return
        for i, tokens in zip(part.captions, part.tokens, strict=True):
            images = decode_rows(self.model.codec, tokens[: self.limit], rows, grid)
            preview = Preview(self.captions[i], part.candidates.start, rows, images)
            for listener in self.listeners:
                listener(preview)


def unfinished_image(upper: Tensor, height: int) -> Image.Image:
    """An image of which some rows are drawn, in full size; what is not drawn yet is gray.

    Args:
        upper: float32 [3, h, W] in [0, 1].
        height: of the full image, in pixels.
    """
    image = Image.new("RGB", (upper.shape[2], height), NOT_DRAWN)
    image.paste(to_pil(upper), (0, 0))
    return image

"""The stream of the transformer: text positions, then image positions in raster order.

Paper section 2.2 and appendix B.1: 256 text + 32 x 32 image positions = 1,280. Position p of a
segment is fed the token before it (a start token at p = 0) and predicts token p.

Token ids of the text segment:
    0 ... text_vocab - 1            byte-pair tokens; END_OF_CAPTION is one of them
    text_vocab + p                  the padding of text position p, one for each position
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Pattern = Literal["row", "column", "conv", "full"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)

END_OF_CAPTION = 0  # the target at the first padding position; never an input


@dataclass(frozen=True)
class Stream:
    """Where things are in the stream.

    text_length: text positions; grid: rows, and columns, of the image's token grid.
    """

    text_length: int = 256
    grid: int = 32

    @property
    def image_length(self) -> int:
        return self.grid * self.grid

    @property
    def length(self) -> int:
        return self.text_length + self.image_length


def padding_id(text_vocab: int, position: int) -> int:
    """The id that stands for padding at a text position (appendix B.1: each has its own)."""
    return text_vocab + position


def layer_pattern(layer: int, layers: int) -> Pattern:
    """The attention pattern of layer 1 ... layers (appendix B.1).

    The last is convolutional; of the others, layer i is column if (i - 2) mod 4 = 0, else row.
    """
    if not 1 <= layer <= layers:
        raise ValueError(f"layer: expected 1 to {layers}, got {layer}")
    if layer == layers:
        return "conv"
    return "column" if (layer - 2) % 4 == 0 else "row"

"""The sequence of the transformer: text positions, then image positions in raster order.

Paper section 2.2 and appendix B.1: 256 text + 32 x 32 image positions = 1,280. Position p of a
segment reads the token before it (a start token at p = 0) and predicts token p. Text ids are those
of `dalle1.tokenizer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Pattern = Literal["row", "column", "conv", "full"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)


@dataclass(frozen=True)
class SequenceShape:
    """Where things are in the sequence.

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


def layer_pattern(layer: int, layers: int) -> Pattern:
    """The attention pattern of layer 1 ... layers (appendix B.1).

    The last is convolutional; of the others, layer i is column if (i - 2) mod 4 = 0, else row.
    """
    if not 1 <= layer <= layers:
        raise ValueError(f"layer: expected 1 to {layers}, got {layer}")
    if layer == layers:
        return "conv"
    return "column" if (layer - 2) % 4 == 0 else "row"

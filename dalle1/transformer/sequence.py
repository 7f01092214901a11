"""The sequence of the transformer: text positions, then image positions in raster order.

Paper section 2.2 and appendix B.1: 256 text + 32 x 32 image positions = 1,280. Position p of a
segment reads the token before it (a start token at p = 0) and predicts token p. Text ids are those
of `dalle1.tokenizer`. What relatives of the paper's model do otherwise is in `variant`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Pattern = Literal["row", "column", "conv", "full", "conv_2d", "conv_torus"]
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


PatternRule = Literal["paper", "rudalle", "rudalle_v2", "full"]
LAST: dict[PatternRule, Pattern] = {"rudalle": "conv_2d", "rudalle_v2": "conv_torus"}


def layer_pattern(layer: int, layers: int, rule: PatternRule = "paper") -> Pattern:
    """The attention pattern of layer 1 ... layers, by the rule of a published model.

    The paper's last is convolutional; of the others, layer i is column if (i - 2) mod 4 = 0, else
    row (appendix B.1). ruDALL-E has this order with convolutions of its own; where its last layer
    is one of the column layers too (42 layers), it stays one.
    """
    if not 1 <= layer <= layers:
        raise ValueError(f"layer: expected 1 to {layers}, got {layer}")
    if rule == "full":
        return "full"
    if layer == layers and rule == "paper":
        return "conv"
    if _is_column(layer):
        return "column"
    return LAST[rule] if layer == layers else "row"


def _is_column(layer: int) -> bool:
    return (layer - 2) % 4 == 0

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


def layer_patterns(rule: PatternRule, layers: int) -> tuple[Pattern, ...]:
    """The attention pattern of each layer, first to last, by the rule of a published model.

    ruDALL-E has the paper's order with convolutions of its own. Where the last layer is one of the
    column layers too (42 layers), it stays one.
    """
    patterns: list[Pattern] = [layer_pattern(i, layers) for i in range(1, layers + 1)]
    if rule == "full":
        patterns = ["full" for _ in patterns]
    elif rule != "paper":
        conv: Pattern = "conv_2d" if rule == "rudalle" else "conv_torus"
        patterns[-1] = "column" if _is_column(layers) else conv
    return tuple(patterns)


def layer_pattern(layer: int, layers: int) -> Pattern:
    """The attention pattern of layer 1 ... layers (appendix B.1).

    The last is convolutional; of the others, layer i is column if (i - 2) mod 4 = 0, else row.
    """
    if not 1 <= layer <= layers:
        raise ValueError(f"layer: expected 1 to {layers}, got {layer}")
    if layer == layers:
        return "conv"
    return "column" if _is_column(layer) else "row"


def _is_column(layer: int) -> bool:
    return (layer - 2) % 4 == 0

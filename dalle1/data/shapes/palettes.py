"""The colors of the built-in data set, by the names that captions call them."""

from __future__ import annotations

RGB = tuple[int, int, int]

# Any two of these, and any of them and a background, are at least 100 apart in RGB, so that a
# reconstruction which is a little off still has one plain name.
COLORS: dict[str, RGB] = {
    "red": (215, 25, 35),
    "orange": (250, 120, 0),
    "yellow": (250, 225, 40),
    "green": (35, 155, 55),
    "cyan": (50, 215, 225),
    "blue": (30, 60, 215),
    "purple": (140, 40, 185),
    "pink": (255, 120, 195),
}
# Other colors under other names, for fine-tuning (docs/finetuning.md). The detector does not know
# them.
EARTH: dict[str, RGB] = {
    "crimson": (150, 15, 60),
    "brown": (140, 80, 35),
    "gold": (205, 165, 30),
    "olive": (110, 120, 30),
    "teal": (20, 125, 125),
    "navy": (20, 35, 110),
    "violet": (95, 60, 170),
    "coral": (250, 125, 110),
}
PALETTES: dict[str, dict[str, RGB]] = {"plain": COLORS, "earth": EARTH}

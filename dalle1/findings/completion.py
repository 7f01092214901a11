"""Finding: the lower half of an image is drawn as the upper one in another style (section 3.3)."""

from __future__ import annotations

from dalle1.findings.emoji_benchmark import emoji_finding

FINDING = emoji_finding(
    True,
    "training shows the emoji in the lower style",
    "training never shows the emoji in that style",
    name="completion",
    claim="Given the upper half of an image, a model draws the same thing below in the style that "
    "the caption asks for",
    paper='"the exact same cat on the top as a sketch on the bottom" works with some reliability; '
    "nobody had trained the model for it.",
    setting="A model of emoji that has seen one emoji in two styles, one above the other. It is "
    "given the upper half. The judge says whether the lower emoji is right, among all emoji.",
)

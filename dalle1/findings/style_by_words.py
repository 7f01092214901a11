"""Finding: an emoji in a style that training never shows it in, by the caption alone."""

from __future__ import annotations

from dalle1.findings.emoji_benchmark import emoji_finding

FINDING = emoji_finding(
    False,
    "training shows the emoji in this style",
    "training shows it in the other styles alone",
    name="style-by-words",
    claim="A model draws a thing in a style that training never shows it in, by words alone",
    paper="captions change the style of what is drawn, for things and styles that were hardly ever "
    "together in training.",
    setting="A model of emoji. Captions name one emoji and a style; the judge compares the image "
    "with all emoji in all styles.",
)

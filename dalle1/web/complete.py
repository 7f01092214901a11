"""A result as galleries: PNGs with their settings inside, and what best-of-N needs."""

from __future__ import annotations

import math

from dalle1.common.png_settings import png_bytes
from dalle1.sampling import Result
from dalle1.web.gallery import Entry, Gallery


def galleries(result: Result) -> list[Gallery]:
    """What is complete of each caption: the best images, and those that are best of fewer."""
    found = []
    for i, caption in enumerate(result.captions):
        entries = _entries(result, i)
        if result.best_of_fewer:
            entries += _entries(result.best_of_fewer[i], 0)
        drawn, seed = result.settings["drawn"][i], result.settings["seed"]
        found.append(Gallery(caption, drawn, len(result.images[i]), seed, entries))
    return found


def _entries(result: Result, caption: int) -> list[Entry]:
    entries = []
    for place, image in enumerate(result.images[caption]):
        settings = result.image_settings(caption, place)
        score = float(result.scores[caption, place])
        png = png_bytes(image, settings)
        entries.append(Entry(settings["candidate"], score if math.isfinite(score) else None, png))
    return entries

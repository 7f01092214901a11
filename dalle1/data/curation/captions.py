"""Which of a picture's captions a sample keeps, and names that a published list may hold.

A sample of several captions is held as everywhere: its txt has the first, and the key `captions` of
its json all of them (`caption_key=captions` reads them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dalle1.data.curation.rows import SHOWN, Row
from dalle1.data.samples import CAPTION_TOO_LARGE, MAX_TEXT, NO_CAPTION

CHOICES = ("all", "first", "one")
OUTSIDE = "path that leads out of the folder"
JSON_BYTES = 6  # of a letter in JSON, at most: \u00fc


@dataclass(frozen=True)
class CaptionChoice:
    """Which of a picture's captions stay: all, the first, or one that the seed chooses."""

    which: str = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.which not in CHOICES:
            raise ValueError(f"captions: expected {', '.join(CHOICES)}, got {self.which!r}")

    def of(self, captions: Sequence[str], number: int) -> list[str]:
        """Those that stay of the picture of a row; a function of seed and row alone."""
        if self.which == "first":
            return list(captions[:1])
        if self.which == "one":
            rng = np.random.default_rng([self.seed, number])
            return [captions[int(rng.integers(len(captions)))]]
        return list(captions)


def captioned(
    number: int,
    name: str,
    image: Path,
    captions: Sequence[str],
    choice: CaptionChoice,
    columns: dict[str, Any],
) -> Row:
    """A row of a picture with captions, of which at least one is needed; columns: of its json."""
    shown = name[:SHOWN]
    if not captions:
        return Row(number, shown, None, None, {}, NO_CAPTION)
    kept = choice.of(captions, number)
    if JSON_BYTES * sum(map(len, kept)) > MAX_TEXT:  # readers of the json would refuse it
        return Row(number, shown, None, None, {}, CAPTION_TOO_LARGE)
    return Row(number, shown, image, kept[0], {**columns, "captions": kept})


def is_inside(name: str) -> bool:
    """Whether a relative path of a published list stays within the folder of the pictures."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts

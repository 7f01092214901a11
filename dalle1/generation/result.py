"""What `sample` returns, and how it is written to files."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle1.common.files import expand_home, replacing, slug, write_text
from dalle1.common.images import contact_sheet
from dalle1.common.png_settings import (
    PngSettings,
    checked_settings,
    png_bytes,
    write_png,
)
from dalle1.generation.notebook import html_sheet, png_sheet

# Settings that all images of a result have in common; the number drawn may differ.
SHARED = PngSettings.model_fields.keys() - {"format", "caption", "candidate", "score", "note"}


@dataclass
class Result:
    """What `sample` returns: for each caption its `keep` best candidates, best first."""

    captions: list[str]
    images: list[list[Image.Image]]  #: [captions][keep]
    tokens: Tensor  #: int64 [captions, keep, rows, columns]
    scores: Tensor  #: float32 [captions, keep], the ranker's; NaN without one
    settings: dict[str, Any] = field(default_factory=dict)  #: what they were drawn with
    #: int64 [captions, keep]: which of the candidates each image is. `sample` draws candidate i
    #: again, alone, with first_candidate=i, candidates=1, keep=1 and the other settings as before.
    candidate_numbers: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    #: For each caption the candidates that are among the best `keep` of the first n, for some n,
    #: but not among those of all; by rising numbers. Only where asked for; `sample` does not ask.
    best_of_fewer: list[Result] = field(default_factory=list)

    def image_settings(self, caption: int, place: int) -> dict[str, Any]:
        """What images[caption][place] was drawn with, as `dalle1.common.png_settings` writes it.

        What the user has put into `settings` besides is left out.
        """
        known = {name: self.settings[name] for name in SHARED if name in self.settings}
        drawn = self.settings.get("drawn")
        if drawn is not None:  # fewer than were asked for, after Ctrl-C
            known["candidates"] = drawn[caption]
        score = float(self.scores[caption, place])
        return {
            **known,
            "caption": self.captions[caption],
            "candidate": int(self.candidate_numbers[caption, place]),
            "score": round(score, 6) if math.isfinite(score) else None,
        }

    def save(self, folder: str | Path) -> Path:
        """Writes a PNG for each image, `sheet.png` and `result.json`; returns the folder.

        Each PNG holds its settings (`image_settings`), which `dalle1 sample --like FILE.png` and
        `dalle1.common.png_settings.read_png_settings` read.
        """
        folder = Path(expand_home(folder))
        folder.mkdir(parents=True, exist_ok=True)
        entries = []
        for i, (caption, images) in enumerate(zip(self.captions, self.images, strict=True)):
            name = slug(caption, "caption")
            names = [f"{i:03d}-{name}-{j:02d}.png" for j in range(len(images))]
            for j, (file, image) in enumerate(zip(names, images, strict=True)):
                write_png(image, folder / file, self._settings_or_none(i, j))
            found = self.scores[i].tolist()
            scores = [round(s, 6) if math.isfinite(s) else None for s in found]
            entries.append({"caption": caption, "files": names, "scores": scores})
            if len(self.candidate_numbers):
                entries[-1]["candidates"] = self.candidate_numbers[i].tolist()
        with replacing(folder / "sheet.png") as temporary:
            contact_sheet(self.images, self.captions).save(temporary, format="PNG")
        content = {"settings": self.settings, "results": entries}
        write_text(folder / "result.json", json.dumps(content, indent=2, default=_plain) + "\n")
        return folder

    def _repr_html_(self) -> str:
        """The images with captions and scores, for notebooks; of many images the first."""
        return html_sheet(self.captions, self.images, self.scores, self._png)

    def _repr_png_(self) -> bytes | None:
        """A contact sheet, for programs that show notebooks without their HTML; None of nothing."""
        return png_sheet(self.captions, self.images) if any(self.images) else None

    def _png(self, caption: int, place: int) -> bytes:
        """An image as `save` writes it."""
        return png_bytes(self.images[caption][place], self._settings_or_none(caption, place))

    def _settings_or_none(self, caption: int, place: int) -> dict[str, Any] | None:
        """An image's settings, checked; None where they are none, such as the user's own."""
        if not len(self.candidate_numbers):  # a result that `sample` has not made
            return None
        try:
            return checked_settings(self.image_settings(caption, place))
        except (ValueError, IndexError, TypeError) as error:  # the image must not be lost
            warnings.warn(f"an image is written without its settings: {error}", stacklevel=3)
            return None


def _plain(value: Any) -> Any:
    """A value for JSON: what the user puts into `Result.settings` must not lose the images."""
    return value.tolist() if hasattr(value, "tolist") else str(value)

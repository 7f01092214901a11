"""What the demo shows of a model trained on the built-in shapes, next to its ranking benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dalle1.common.images import contact_sheet
from dalle1.evaluation.judged import JudgedData, Prompt
from dalle1.evaluation.plots import Figure
from dalle1.model import Model
from dalle1.protocols import cuts_untold
from dalle1.sampling import sample

UNRANKED = 4  # unranked images of each caption on the contact sheet


def reconstruction_accuracy(model: Model, data: JudgedData, prompts: Sequence[Prompt]) -> float:
    """Share of true images that still show their caption after encoding and decoding."""
    true = torch.stack([data.image(prompt, model.image_size) for prompt in prompts])
    decoded = model.codec.decode(model.codec.encode(true))
    correct = [all(data.check(d, p.caption)) for d, p in zip(decoded, prompts, strict=True)]
    return sum(correct) / len(correct)


def sample_sheet(model: Model, captions: list[str], candidates: int, keep: int) -> Image.Image:
    """A contact sheet: of each caption a few unranked images, then the ranker's best."""
    with cuts_untold():  # they are ours
        best = sample(captions, model, candidates=candidates, keep=keep)
        plain = sample(captions, model, candidates=UNRANKED, keep=UNRANKED, progress=False)
    rows = [[*p, *b] for p, b in zip(plain.images, best.images, strict=True)]
    titles = ("unranked draws", f"best {keep} of {candidates} by CLIP")
    return contact_sheet(rows, captions, titles, columns_before_gap=UNRANKED)


def plot_losses(metrics: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The training loss of each run against its steps.

    Args:
        metrics: the lines of each run's metrics file, by the run's name.
        path: the PNG to write.
    """
    with Figure(path, len(metrics)) as panels:
        for axes, (name, lines) in zip(panels, metrics.items(), strict=True):
            # The warm start of the dVAE minimizes another loss, which would squash the curve.
            points = [x for x in lines if "loss" in x and "squared_error" not in x]
            axes.plot([x["step"] for x in points], [x["loss"] for x in points])
            axes.set(title=name, xlabel="updates", ylabel="loss, nats")
            axes.grid(alpha=0.3)

"""A ranker alone: how often it prefers a true image to one with one thing wrong.

Dimensions: b images, H W image height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dalle1 import registry
from dalle1.common.files import check_writable
from dalle1.common.images import contact_sheet, to_pil
from dalle1.common.progress import progress_bar
from dalle1.common.weights import check_finite, in_32_bits
from dalle1.evaluation.config import RetrievalSettings
from dalle1.evaluation.judged import DistractingData, open_judged
from dalle1.evaluation.metrics import mean_and_interval
from dalle1.evaluation.tables import by_group_and_kind, save_results, spread
from dalle1.model import load
from dalle1.protocols import NeedsModel, Ranker, cuts_untold
from dvae.storage import has_part

RESULT, SHEET = "retrieval.json", "retrieval.png"


def run_retrieval(settings: RetrievalSettings, device: str = "cpu", progress: bool = True) -> Path:
    """Scores the true image of each caption and its distractors.

    Returns:
        The file of the results, beside which the contact sheet lies.

    Raises:
        ValueError: the data have no distractors, or the ranker cannot be opened or scores only
            what a model draws.
    """
    check_writable(settings.run, "run")
    data = open_judged(settings)
    if data is None or not isinstance(data, DistractingData):
        raise ValueError(
            "judge: expected data that can be drawn with one thing wrong, such as judge=emoji, got "
            f"{'none' if data is None else type(data).__name__}"
        )
    ranker = _open(settings.ranker)
    if isinstance(ranker, nn.Module):
        check_finite(ranker, "ranker")
        ranker.to(device).eval()
    prompts = data.prompts()
    side = settings.image_size or data.side
    outcomes: list[dict[str, float]] = []  # of each caption: 1 where the true image is first
    for prompt in progress_bar(prompts, unit="caption", desc="scoring", disable=not progress):
        wrong = data.distractors(prompt, side)
        images = torch.stack([data.image(prompt, side), *wrong.values()])
        with cuts_untold():  # they are ours
            true, *others = ranker.score([prompt.caption], images)[0].tolist()
        # Of equal scores either may be the first.
        outcomes.append(
            {name: (true > s) + 0.5 * (true == s) for name, s in zip(wrong, others, strict=True)}
        )

    def figures(numbers: Sequence[int]) -> dict[str, Any]:
        found: dict[str, list[float]] = {}
        for i in numbers:
            for name, first in outcomes[i].items():
                found.setdefault(name, []).append(first)
        return {
            "captions": len(numbers),
            "true first": {
                name: {"pairs": len(first), **mean_and_interval(first, settings.bootstrap)}
                for name, first in found.items()
            },
        }

    results = {
        "settings": settings.model_dump(),
        "notes": data.notes(),
        "groups": by_group_and_kind(prompts, figures),
    }
    folder = Path(settings.run)
    save_results(settings, results, folder / RESULT)
    shown = spread(prompts, settings.sheet_captions)
    rows = [
        [to_pil(i) for i in (data.image(p, side), *data.distractors(p, side).values())]
        for p in shown
    ]
    contact_sheet(rows, [p.caption for p in shown], ("true", "with one thing wrong")).save(
        folder / SHEET
    )
    return folder / RESULT


def _open(name: str) -> Ranker:
    """The ranker of a model, which may read captions by the model's tokenizer, or one alone."""
    if registry.adds_likelihood(name):
        raise ValueError(
            f"ranker: expected one that scores images alone, got {name!r}, which adds a model's "
            "likelihood; take the weight out"
        )
    if Path(name).is_dir() and has_part("prior", Path(name)):
        found = load(name).ranker
        if found is None:
            raise ValueError(f"ranker: {name} has no ranker")
    else:
        found = in_32_bits(registry.open_ranker(name))
    if isinstance(found, NeedsModel):
        raise ValueError(
            f"ranker: expected one that scores images alone, got {name!r}, which needs a model; "
            "rank candidates by it instead"
        )
    return found

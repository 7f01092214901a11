"""A ranking benchmark from its settings to its page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dalle1.evaluation import benchmark, figures
from dalle1.evaluation.draws import draw_all
from dalle1.evaluation.metrics import metric_classes
from dalle1.evaluation.prompts import Prompt, read_prompts
from dalle1.evaluation.settings import RankSettings
from dalle1.model import Model, load
from dalle1.settings import save_settings

FILES = (benchmark.RESULT, "best_of_n.png", "blur.png", "sheet.png", "index.html")


def prepare(settings: RankSettings) -> tuple[Model, list[Prompt]]:
    """The model and the captions; ValueError for what would fail after hours of drawing."""
    metric_classes()
    figures.pyplot()
    model = load(settings.model)
    if model.clip is None:
        raise ValueError(f"model: {settings.model} has no CLIP to rank with")
    model.check_finite()
    return model, read_prompts(settings)


def run(
    model: Model,
    prompts: list[Prompt],
    settings: RankSettings,
    rank: int = 0,
    ranks: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Path | None:
    """Draws this rank's captions, waits for the others, and reports on the first rank.

    Returns the page, on the first rank. Goes on with what a run that was stopped has drawn.
    """
    folder = Path(settings.run)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_settings(settings, folder / "config.yaml")
    draw_all(model, prompts, settings, rank, ranks, progress=rank == 0)
    wait()
    if rank > 0:
        return None
    with torch.random.fork_rng():
        found = benchmark.measure(model, prompts, settings)
    benchmark.save(found, folder)
    return figures.write_page(found, folder)

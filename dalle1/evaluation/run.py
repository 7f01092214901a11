"""A ranking benchmark from its settings to its page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dalle1.common.config import save_settings
from dalle1.common.hardware import DTYPES
from dalle1.evaluation import benchmark, page, plots
from dalle1.evaluation.candidates import claim, draw_all
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.metrics import Network, metric_classes
from dalle1.evaluation.prompts import Prompt, read_prompts
from dalle1.model import Model, load

FILES = (benchmark.RESULT, "best_of_n.png", "blur.png", "sheet.png", "index.html")


@dataclass
class Prepared:
    """What a benchmark begins with."""

    model: Model
    prompts: list[Prompt]
    network: Network  # what FID sees pictures by


def prepare(settings: RankSettings, device: str = "cpu") -> Prepared:
    """Model, captions and network; ValueError for what would fail after hours of drawing."""
    metric_classes()
    plots.pyplot()
    model = load(settings.model)
    if model.ranker is None:
        raise ValueError(f"model: {settings.model} has no ranker")
    model.check_finite()
    model.to(device, DTYPES[settings.dtype])
    prompts = read_prompts(settings)
    captions = [p.caption for p in prompts]
    for caption in captions:
        model.tokenizer.encode(caption)
    return Prepared(model, prompts, benchmark.network_of(model, captions, settings))


def run(
    prepared: Prepared,
    settings: RankSettings,
    rank: int = 0,
    ranks: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Path | None:
    """Draws this rank's captions, waits for the others, and reports on the first rank.

    Returns the page, on the first rank. Goes on with what a run that was stopped has drawn.
    """
    model, prompts = prepared.model, prepared.prompts
    folder = Path(settings.run)
    claim(model, settings, rank)
    if rank == 0:
        save_settings(settings, folder / "config.yaml")
    wait()  # nobody draws into a folder that another rank has refused
    draw_all(model, prompts, settings, rank, ranks, progress=rank == 0)
    wait()
    if rank > 0:
        return None
    found = benchmark.measure(model, prompts, settings, prepared.network)
    benchmark.save(found, folder)
    return page.write_page(found, folder)

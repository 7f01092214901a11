"""A ranking benchmark from its settings to its page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dalle1.common.config import SHAPES, save_settings
from dalle1.common.files import check_writable
from dalle1.common.hardware import DTYPES
from dalle1.evaluation import benchmark, page, plots
from dalle1.evaluation.candidates import draw_candidates, write_or_check_settings
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.features import measure_chosen, measure_true, open_folder
from dalle1.evaluation.metrics import FeatureNetwork
from dalle1.evaluation.prompts import Prompt, read_prompts
from dalle1.model import Model, load
from dalle1.protocols import cuts_told_once, cuts_untold

FILES = (benchmark.RESULT, "best_of_n.png", "blur.png", "sheet.png", "index.html")


@dataclass
class Prepared:
    """What a benchmark needs, loaded and checked."""

    model: Model
    prompts: list[Prompt]
    network: FeatureNetwork  # what FID and Inception Score are computed with


def prepare(settings: RankSettings, device: str = "cpu") -> Prepared:
    """Loads model, captions and network.

    Raises:
        ValueError: something is wrong that would fail after hours of drawing otherwise.
    """
    check_writable(settings.run, "run")
    plots.pyplot()
    model = load(settings.model, settings.ranker)
    if model.ranker is None:
        raise ValueError(f"model: {settings.model} has no ranker")
    model.check_finite()
    model.to(device, DTYPES[settings.dtype])
    prompts = read_prompts(settings)
    captions = [p.caption for p in prompts]
    # The user's captions that are cut are told of here, and not again while they are drawn.
    with cuts_untold() if settings.data == SHAPES else cuts_told_once():
        for caption in captions:
            model.tokenizer.encode(caption)
        network = benchmark.feature_network(model, captions, settings)
    return Prepared(model, prompts, network)


def run(
    prepared: Prepared,
    settings: RankSettings,
    rank: int = 0,
    world_size: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Path | None:
    """Draws and measures this rank's share of the captions; rank 0 then reports on all of them.

    A run that was stopped resumes with the missing candidates and features.

    Args:
        rank: number of this process.
        world_size: number of processes; each draws every world_size-th caption.
        wait: a barrier, which returns when all processes have called it.

    Returns:
        The page, on rank 0; None on the others.
    """
    model, prompts = prepared.model, prepared.prompts
    folder = Path(settings.run)
    write_or_check_settings(model, settings, rank)
    if rank == 0:
        save_settings(settings, folder / "config.yaml")
    wait()  # nobody draws into a folder that another rank has refused
    with cuts_untold():
        draw_candidates(model, prompts, settings, rank, world_size, progress=rank == 0)
        features = open_folder(model, prompts, prepared.network, settings, rank)
        wait()
        measure_true(features, rank, world_size)
        measure_chosen(features, prompts, rank, world_size)
        wait()
        if rank > 0:
            return None
        measured = benchmark.measure(features, prompts)
    benchmark.save(measured, folder)
    return page.write_page(measured, folder)

"""A ranking benchmark from its settings to its page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dalle1.common.config import save_settings
from dalle1.common.files import check_writable
from dalle1.common.hardware import DTYPES
from dalle1.evaluation import benchmark, page, plots
from dalle1.evaluation.candidates import draw_candidates, upper_tokens, write_or_check_settings
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.features import measure_chosen, measure_true, open_folder
from dalle1.evaluation.judged import JudgedData, Prompt, open_judged
from dalle1.evaluation.metrics import FeatureNetwork
from dalle1.evaluation.prompts import read_prompts
from dalle1.generation.images import image_size
from dalle1.model import Model, load
from dalle1.protocols import cuts_told_once, cuts_untold

FILES = (benchmark.RESULT, "best_of_n.png", "blur.png", "sheet.png", "index.html")


@dataclass
class Prepared:
    """What a benchmark needs, loaded and checked."""

    model: Model
    prompts: list[Prompt]
    network: FeatureNetwork  # what FID and Inception Score are computed with
    judged: JudgedData | None = None  # the data, where they have a judge


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
    judged = open_judged(settings)
    prompts = read_prompts(settings, judged)
    captions = [p.caption for p in prompts]
    # The user's captions that are cut are told of here, and not again while they are drawn.
    with cuts_untold() if judged else cuts_told_once():
        for caption in captions:
            model.tokenizer.encode(caption)
        network = benchmark.feature_network(model, captions, settings)
    if judged is not None:
        judged.check(torch.zeros(3, *image_size(model.codec, model.prior.grid)), captions[0])
        if settings.completion:
            upper_tokens(model, judged, prompts[0])
    return Prepared(model, prompts, network, judged)


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
    model, prompts, judged = prepared.model, prepared.prompts, prepared.judged
    folder = Path(settings.run)
    write_or_check_settings(model, settings, rank, judged)
    if rank == 0:
        save_settings(settings, folder / "config.yaml")
    wait()  # nobody draws into a folder that another rank has refused
    with cuts_untold():
        draw_candidates(model, prompts, settings, rank, world_size, rank == 0, judged)
        features = open_folder(model, prompts, prepared.network, settings, rank, judged)
        wait()
        measure_true(features, rank, world_size)
        measure_chosen(features, prompts, rank, world_size)
        wait()
        if rank > 0:
            return None
        measured = benchmark.measure(features, prompts)
    benchmark.save(measured, folder)
    return page.write_page(measured, folder)

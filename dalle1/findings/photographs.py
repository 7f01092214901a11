"""Finding: the paper's dVAE recipe on photographs, with and without our warm start."""

from __future__ import annotations

from dalle1.findings.base import (
    Arm,
    Curve,
    Finding,
    Measure,
    Measurements,
    Options,
    Prediction,
    Settings,
)
from dalle1.findings.codecs import measure_codec
from dalle1.findings.crops import digest_of, missing, unseen_crops, write_crops
from dalle1.findings.dvae_runs import POINTS, codecs_of, measured_at
from dalle1.findings.training import run_settings, train_run
from dalle1.findings.workspace import Workspace
from dalle1.training.metrics_logger import read_metrics

CONFIG = "findings/photographs"
STEPS = 1300
CROPS = 5640


def _settings(arm: Arm, seed: int, options: Options) -> Settings:
    assert options.photographs is not None  # see `missing`
    steps = options.scaled(STEPS, 2 * POINTS)
    warm = round(steps * arm.settings["warm_start"])
    relaxed = steps - warm
    overrides = [
        f"steps={steps}",
        f"dvae_training.warm_start_steps={warm}",
        f"dvae_training.warm_start_images={options.fewer(1024, 64)}",
        f"dvae_training.kl_steps={relaxed // 3}",
        f"dvae_training.temperature_steps={relaxed * 2 // 3}",
        f"optimizer.warmup_steps={min(50, steps // 4)}",
        *measured_at(steps),
        *arm.settings["overrides"],
    ]
    return {
        "train": run_settings(CONFIG, overrides, seed),
        "photographs": digest_of(options.photographs),
        "crops": options.fewer(CROPS, 64),
        "unseen": options.fewer(256, 16),
    }


def _run(settings: Settings, workspace: Workspace) -> Measurements:
    photographs, train = workspace.photographs, settings["train"]
    assert photographs is not None
    side, count = train["reader"]["image_size"], settings["crops"]
    data = workspace.shared(
        "crops",
        {"photographs": settings["photographs"], "side": side, "count": count},
        lambda folder: write_crops(photographs, folder, count, side),
    )
    run = workspace.folder / "dvae"
    train_run(train, run, workspace, data=data)
    images = unseen_crops(photographs, settings["unseen"], side)
    warm = train["dvae_training"]["warm_start_steps"]
    points = [
        (step, measure_codec(codec, images))
        for step, codec in codecs_of(run, train)
        if step > warm  # before, there are no codes
    ]
    speed = [line["images_per_second"] for line in read_metrics(run) if "images_per_second" in line]
    seconds = train["steps"] * train["batch_size"] * len(speed) / sum(speed)
    return Measurements(
        {**points[-1][1].values, "minutes": seconds / 60},
        {
            "psnr": [(step, found.psnr) for step, found in points],
            "codes": [(step, float(found.codes)) for step, found in points],
        },
    )


FINDING = Finding(
    name="photographs",
    claim="The paper's recipe needs no warm start on photographs, and does not collapse there",
    section="section 2.1, appendix A",
    paper="it trains from random weights, and says nothing of a collapse.",
    setting="64x64 crops of photographs, 8x8 tokens of 512 codes, width 32, one block a group. "
    "Measured on crops of photographs that are not trained on, with codes.",
    minutes=32,
    arms=(
        Arm("paper's", "beta to 6.6, tau from 1", {"warm_start": 0.0, "overrides": []}),
        Arm(
            "warm start",
            "0.3 of the updates without codes, then beta 0, tau from 0.15",
            {
                "warm_start": 0.3,
                "overrides": [
                    "dvae_training.kl_weight=0",
                    "dvae_training.temperature_start=0.15",
                    "dvae_training.encoder_rate=0.1",
                ],
            },
        ),
    ),
    measures=(
        Measure("codes", "codes used", 1),
        Measure("perplexity", "perplexity of the codes", 1),
        Measure("psnr", "PSNR, dB"),
        Measure("minutes", "minutes", 1),
    ),
    curves=(Curve("psnr", "PSNR, dB"), Curve("codes", "codes used")),
    predictions=(
        Prediction("psnr", "paper's", "warm start"),
        Prediction("codes", "paper's", "warm start"),
    ),
    settings=_settings,
    run=_run,
    needs=lambda options: missing(options.photographs),
)

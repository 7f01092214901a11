"""Finding: a larger weight of the KL uses more of the codebook, and copies better in the end."""

from __future__ import annotations

import dvae
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
from dalle1.findings.codecs import measure_codec, unseen_shapes
from dalle1.findings.training import run_settings, train_run
from dalle1.findings.workspace import Workspace
from dalle1.training.metrics_logger import read_metrics

CONFIG = "configs/shapes/dvae.yaml"


def _settings(arm: Arm, seed: int, options: Options) -> Settings:
    warm, relaxed = options.scaled(250), options.scaled(500)
    overrides = [
        f"steps={warm + relaxed}",
        f"dvae_training.warm_start_steps={warm}",
        f"dvae_training.temperature_steps={relaxed * 2 // 3}",
        f"dvae_training.kl_steps={relaxed // 5}",
        f"dvae_training.kl_weight={arm.settings['kl_weight']}",
        "dvae.codebook_size=256",
        "dvae.width=32",
        "log_every=25",
        "contact_sheet_every=null",
        f"save_every={max(200, warm + relaxed)}",
        f"reader.shapes_count={options.scaled(20_000, 2048)}",
    ]
    return {"train": run_settings(CONFIG, overrides, seed), "images": options.scaled(512, 16)}


def _run(settings: Settings, workspace: Workspace) -> Measurements:
    run = workspace.folder / "dvae"
    codec = dvae.load(train_run(settings["train"], run, workspace))
    side = settings["train"]["reader"]["image_size"]
    found = measure_codec(codec, unseen_shapes(settings["images"], side))
    lines = [line for line in read_metrics(run) if "reconstruction" in line]
    return Measurements(
        found.values,
        {name: [(line["step"], line[name]) for line in lines] for name in ("codes_used", "kl")},
    )


FINDING = Finding(
    name="kl-weight",
    claim="A larger weight of the KL leads to a codebook that is used more, and to a smaller "
    "reconstruction error in the end",
    section="section 2.1",
    paper="beta = 6.6 promotes the use of the codebook and in the end reconstructs better.",
    setting="A dVAE of 256 codes on shapes.",
    minutes=15,
    arms=tuple(
        Arm(f"beta {weight:g}", f"kl_weight {weight:g}", {"kl_weight": weight})
        for weight in (0.0, 1.0, 6.6)
    ),
    measures=(
        Measure("codes", "codes used"),
        Measure("perplexity", "perplexity of the codes"),
        Measure("psnr", "PSNR, dB"),
    ),
    curves=(
        Curve("codes_used", "codes used in training"),
        Curve("kl", "KL, nats a subpixel", log_y=True),
    ),
    predictions=(
        Prediction("codes", "beta 6.6", "beta 0"),
        Prediction("psnr", "beta 6.6", "beta 0"),
    ),
    settings=_settings,
    run=_run,
)

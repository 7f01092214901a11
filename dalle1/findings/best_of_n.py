"""Finding: the first of N by CLIP, and FID after a blur of both sides (figure 9)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dalle1.common.files import read_text
from dalle1.evaluation.benchmark import RESULT
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.run import prepare
from dalle1.evaluation.run import run as run_benchmark
from dalle1.evaluation.shapes_data import HELDOUT, UNSEEN
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
from dalle1.findings.shapes_parts import (
    CODES,
    clip_of,
    clip_settings,
    codec_of,
    codec_settings,
)
from dalle1.findings.training import run_settings, train_run
from dalle1.findings.workspace import Workspace
from dalle1.training.run_folder import EXPORTED

STEPS = 1600
COUNTS = (1, 2, 4, 8, 16, 32)
BLUR = (0, 1, 2, 4)


def _settings(arm: Arm, seed: int, options: Options) -> Settings:
    steps, clip = options.scaled(STEPS, 2), clip_settings(options)
    overrides = [
        f"steps={steps}",
        f"transformer.image_vocab={CODES}",
        f"transformer.text_vocab={clip['clip']['text_vocab'] - 2}",
        f"transformer.text_length={clip['clip']['text_length']}",
        f"optimizer.warmup_steps={min(60, steps // 2)}",
        f"reader.shapes_count={options.fewer(20_000, 256)}",
        "contact_sheet_every=null",
        "save_every=500",
    ]
    benchmark: dict[str, Any] = {
        "captions": options.fewer(96, 4),
        "heldout_captions": options.fewer(32, 4),
        "training_captions": options.fewer(20_000, 256),
        "candidates": max(COUNTS) if options.scale >= 1 else 2,
        "reference_images": options.fewer(1000, 16),
        "blur": list(BLUR),
        "inception_splits": 1,
        "seed": seed,
    }
    counts = [n for n in COUNTS if n <= benchmark["candidates"]]
    return {
        "shared": {
            "train": run_settings("shapes/dalle", overrides, seed),
            "codec": codec_settings(options),
            "clip": clip,
            "benchmark": benchmark,
        },
        "count": min(arm.settings["count"], counts[-1]),
        "counts": counts,
    }


def _run(settings: Settings, workspace: Workspace) -> Measurements:
    shared = settings["shared"]  # all that arms of one seed have in common: they read one benchmark

    def make(folder: Path) -> None:
        codec = codec_of(shared["codec"], workspace)
        clip = clip_of(shared["clip"], workspace)
        run = folder / "dalle"
        model = train_run(
            shared["train"], run, workspace, codec=codec, ranker=clip / EXPORTED, tokenizer=clip
        )
        places = {"model": str(model), "run": str(folder / "ranking"), "data": "shapes"}
        ranking = RankSettings.model_validate({**places, **shared["benchmark"]})
        run_benchmark(prepare(ranking), ranking)

    folder = workspace.shared("shapes-ranking", shared, make)
    groups = json.loads(read_text(folder / "ranking" / RESULT))["groups"]
    n = str(settings["count"])
    unseen, heldout = groups[UNSEEN], groups[HELDOUT]

    def mean(group: dict[str, Any], curve: str) -> float:
        return float(group["curves"][curve][n]["mean"])

    by_radius = {radius: unseen["pictures"][f"{radius:g}"][n] for radius in BLUR}
    return Measurements(
        {
            "accuracy": 100 * mean(unseen, "accuracy"),
            "oracle": 100 * mean(unseen, "oracle"),
            "heldout": 100 * mean(heldout, "accuracy"),
            "score": mean(unseen, "clip_score"),
            "fid": float(by_radius[0]["fid"]),
            "fid_blurred": float(by_radius[2]["fid"]),
        },
        {
            "fid_by_blur": [(float(r), float(point["fid"])) for r, point in by_radius.items()],
            "is_by_blur": [
                (float(r), float(point["inception_score"])) for r, point in by_radius.items()
            ],
        },
    )


FINDING = Finding(
    name="best-of-n",
    claim="The first of N candidates by CLIP shows its caption more often the larger N is, and the "
    "distance to true images falls when both sides are blurred",
    section="section 3, figures 6 and 9",
    paper="samples improve up to N = 32, with diminishing returns beyond; FID falls faster with "
    "blur than that of models without a dVAE, whose fine details it hides.",
    setting="A transformer of the built-in shapes and `dalle1 evaluate` on 96 unseen captions. A "
    "program checks the images; FID and Inception Score use CLIP's embeddings of 1,000 true ones.",
    minutes=28,
    arms=tuple(
        Arm(f"N = {n}", f"CLIP's first of {n}", {"count": n}) for n in COUNTS if n != 2 and n != 8
    ),
    measures=(
        Measure("accuracy", "unseen captions shown, %", 1),
        Measure("oracle", "shown by any of N, %", 1),
        Measure("heldout", "held-out pairs shown, %", 1),
        Measure("score", "CLIP's score"),
        Measure("fid", "FID", 3),
        Measure("fid_blurred", "FID, blur of 2 pixels", 3),
    ),
    curves=(
        Curve("fid_by_blur", "FID", x="blur radius, pixels"),
        Curve("is_by_blur", "Inception Score", x="blur radius, pixels"),
    ),
    predictions=(
        Prediction("accuracy", "N = 4", "N = 1"),
        Prediction("accuracy", "N = 32", "N = 1"),
        Prediction("accuracy", "N = 32", "N = 4"),
        Prediction("fid", "N = 1", "N = 32"),
    ),
    settings=_settings,
    run=_run,
)

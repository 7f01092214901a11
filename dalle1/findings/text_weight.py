"""Finding: what the weight of the text in the loss costs the image, and what it gives."""

from __future__ import annotations

from typing import cast

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
from dalle1.findings.flat_priors import data_settings
from dalle1.findings.flat_shapes import (
    CODEC,
    GRID,
    HELDOUT,
    SIDE,
    TEST,
    TEXT_LENGTH,
    TRAINING,
    FlatSettings,
    flat_shapes,
)
from dalle1.findings.prior_training import image_loss, text_loss
from dalle1.findings.training import run_settings, train_run
from dalle1.findings.workspace import Workspace
from dalle1.model import load
from dalle1.training.metrics_logger import read_metrics
from dalle1.transformer.model import Transformer

CONFIG = "shapes/dalle"


def _settings(arm: Arm, seed: int, options: Options) -> Settings:
    steps = options.scaled(800, 2)
    overrides = [
        f"steps={steps}",
        f"log_every={max(1, steps // 20)}",
        "contact_sheet_every=null",
        f"save_every={steps}",
        f"reader.image_size={SIDE}",
        f"transformer.grid={GRID}",
        f"transformer.text_length={TEXT_LENGTH}",
        f"transformer.text_loss_weight={arm.settings['weight']}",
    ]
    return {"data": data_settings(options), "train": run_settings(CONFIG, overrides, seed)}


def _run(settings: Settings, workspace: Workspace) -> Measurements:
    data = flat_shapes(FlatSettings(**settings["data"]), workspace)
    vocabularies = {"text_vocab": data.tokenizer.vocab_size, "image_vocab": data.codec.vocab_size}
    shape = settings["train"]["transformer"] | vocabularies
    run = workspace.folder / "dalle"
    model = load(
        train_run(
            settings["train"] | {"transformer": shape},
            run,
            workspace,
            data=data.folder / TRAINING,
            codec=data.folder / CODEC,
            tokenizer=data.folder,
        )
    )
    prior = cast(Transformer, model.prior)
    lines = [line for line in read_metrics(run) if "image" in line]
    return Measurements(
        {
            "image": image_loss(prior, data.sets[TEST]),
            "heldout": image_loss(prior, data.sets[HELDOUT]),
            "text": text_loss(prior, data.sets[TEST]),
        },
        {"training": [(line["step"], line["image"]) for line in lines]},
    )


FINDING = Finding(
    name="text-weight",
    claim="With 1/8 of the loss for the text and 7/8 for the image, the image is learned better "
    "than with more for the text",
    section="section 2.2",
    paper="the image's loss has the larger weight since images are what counts; the paper gives no "
    "comparison.",
    setting="The demo's transformer on flat shapes, 800 updates.",
    minutes=15,
    reference="1/8",
    arms=tuple(
        Arm(name, f"text {name}, image {rest}", {"weight": weight})
        for name, rest, weight in (
            ("0", "1", 0.0),
            ("1/8", "7/8", 1 / 8),
            ("1/2", "1/2", 1 / 2),
            ("7/8", "1/8", 7 / 8),
        )
    ),
    measures=(
        Measure("image", "image loss of unseen captions, nats a token", 4),
        Measure("heldout", "image loss of held-out pairs, nats a token", 4),
        Measure("text", "text loss of unseen captions, nats a token", 3),
    ),
    curves=(Curve("training", "image loss in training, nats a token", log_y=True),),
    predictions=(
        Prediction("image", "1/2", "1/8"),
        Prediction("image", "7/8", "1/8"),
        Prediction("text", "0", "1/8"),
    ),
    settings=_settings,
    run=_run,
)

"""What the findings about the transformer share: its shape, its training and its losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dalle1.findings.base import Curve, Measure, Measurements, Options, Settings
from dalle1.findings.flat_shapes import (
    GRID,
    HELDOUT,
    TERSE,
    TEST,
    TEXT_LENGTH,
    TRAINING,
    FlatSettings,
    flat_shapes,
)
from dalle1.findings.prior_training import Recipe, image_loss, train_prior
from dalle1.findings.workspace import Workspace
from dalle1.training.config import OptimizerSettings
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.model import Transformer

MEASURES = (
    Measure(TEST, "image loss of unseen captions, nats a token", 4),
    Measure(HELDOUT, "image loss of held-out pairs, nats a token", 4),
    Measure(TERSE, "image loss of terse captions, nats a token", 4),
)
CURVES = (Curve(TEST, "image loss of unseen captions, nats a token", log_y=True),)
POINTS = 6  # of a curve


def data_settings(options: Options) -> Settings:
    """How many samples there are."""
    data = FlatSettings(training=options.fewer(8000, 32), unseen=options.fewer(1024, 8))
    return data.model_dump(mode="json")


def prior_settings(options: Options, **transformer: Any) -> Settings:
    """All that a run depends on, in the recipe of configs/shapes/dalle.yaml at less width and time.

    Args:
        options: of the user.
        transformer: settings that differ from the paper's shape at this size.
    """
    recipe = Recipe(
        steps=options.scaled(1000, 2),
        batch_size=16,
        optimizer=OptimizerSettings(
            learning_rate=3e-3,
            weight_decay=4.5e-2,
            clip_norm=1.0,
            warmup_steps=options.scaled(60),
            schedule="cosine",
        ),
    )
    shape = {"width": 64, "layers": 4, "heads": 4, "head_size": 16, "init_std": 0.1}
    shape["conv_kernel"] = 3  # of a grid of 8, as the paper's 11 are of its 32
    return {
        "data": data_settings(options),
        "transformer": shape | transformer,
        "recipe": recipe.model_dump(mode="json"),
    }


def measure_prior(
    make: Callable[[TransformerConfig, int], Transformer], settings: Settings, workspace: Workspace
) -> Measurements:
    """Trains a prior that `make` gives of a shape and a seed: its `MEASURES` and `CURVES`."""
    data = flat_shapes(FlatSettings(**settings["data"]), workspace)
    recipe = Recipe(**settings["recipe"])
    shape = TransformerConfig(
        text_vocab=data.tokenizer.vocab_size,
        text_length=TEXT_LENGTH,
        image_vocab=data.codec.vocab_size,
        grid=GRID,
        **settings["transformer"],
    )
    prior = make(shape, settings["seed"])
    curve: list[tuple[float, float]] = []

    def follow(step: int) -> None:
        curve.append((step, image_loss(prior, data.sets[TEST])))

    at = {max(1, recipe.steps * i // POINTS) for i in range(1, POINTS + 1)}
    train_prior(prior, data.sets[TRAINING], recipe, settings["seed"], follow, at)
    losses = {name: image_loss(prior, data.sets[name]) for name in (TEST, HELDOUT, TERSE)}
    return Measurements(losses, {TEST: curve})


def paper_prior(shape: TransformerConfig, seed: int) -> Transformer:
    """The paper's transformer."""
    return Transformer(shape, seed=seed)

"""Finding: the lower half of an image is drawn as the upper one in another style (section 3.3)."""

from __future__ import annotations

from dalle1.findings.base import Arm, Finding, Measurements, Options, Prediction, Settings
from dalle1.findings.emoji_benchmark import (
    CURVES,
    HELD_OUT,
    MEASURES,
    SEEN,
    benchmark_settings,
    measure_emoji,
    missing,
)
from dalle1.findings.workspace import Workspace


def _settings(arm: Arm, seed: int, options: Options) -> Settings:
    return benchmark_settings(arm.settings["split"], True, seed, options)


def _run(settings: Settings, workspace: Workspace) -> Measurements:
    return measure_emoji(settings, workspace)


FINDING = Finding(
    name="completion",
    claim="Given the upper half of an image, a model draws the same thing below in the style that "
    "the caption asks for",
    section="section 3.3",
    paper='"the exact same cat on the top as a sketch on the bottom" works with some reliability; '
    "nobody had trained the model for it.",
    setting="A model of emoji that has seen one emoji in two styles, one above the other. It is "
    "given the upper half. The judge says whether the lower emoji is right, among all emoji.",
    minutes=12,
    arms=(
        Arm("seen", "training shows the emoji in the lower style", {"split": SEEN}),
        Arm("held out", "training never shows the emoji in that style", {"split": HELD_OUT}),
    ),
    measures=MEASURES,
    curves=CURVES,
    predictions=(Prediction("all", "seen", "held out"),),
    settings=_settings,
    run=_run,
    needs=missing,
)

"""Finding: an emoji in a style that training never shows it in, by the caption alone."""

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
    return benchmark_settings(arm.settings["split"], False, seed, options)


def _run(settings: Settings, workspace: Workspace) -> Measurements:
    return measure_emoji(settings, workspace)


FINDING = Finding(
    name="style-by-words",
    claim="A model draws a thing in a style that training never shows it in, by words alone",
    section="section 3.3",
    paper="captions change the style of what is drawn, for things and styles that were hardly ever "
    "together in training.",
    setting="A model of emoji. Captions name one emoji and a style; the judge compares the image "
    "with all emoji in all styles.",
    minutes=12,
    arms=(
        Arm("seen", "training shows the emoji in this style", {"split": SEEN}),
        Arm("held out", "training shows it in the other styles alone", {"split": HELD_OUT}),
    ),
    measures=MEASURES,
    curves=CURVES,
    predictions=(Prediction("all", "seen", "held out"),),
    settings=_settings,
    run=_run,
    needs=missing,
)

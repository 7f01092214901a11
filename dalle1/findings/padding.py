"""Finding: a learned padding for each text position against padding that nothing attends to."""

from __future__ import annotations

from dalle1.findings.base import Arm, Finding, Measurements, Options, Prediction, Settings
from dalle1.findings.flat_priors import CURVES, MEASURES, measure_prior, paper_prior, prior_settings
from dalle1.findings.transformers import MaskedPaddingTransformer
from dalle1.findings.workspace import Workspace

MASKED = "masked"


def _settings(arm: Arm, seed: int, options: Options) -> Settings:
    return {"padding": arm.settings["padding"], **prior_settings(options)}


def _run(settings: Settings, workspace: Workspace) -> Measurements:
    make = MaskedPaddingTransformer if settings["padding"] == MASKED else paper_prior
    return measure_prior(make, settings, workspace)


FINDING = Finding(
    name="padding",
    claim="A learned padding for each text position has a higher loss than masked padding, and a "
    "lower one on captions of another kind than training's",
    section="appendix B.1",
    paper="learned paddings had a higher validation loss on Conceptual Captions, and did better on "
    "captions out of the distribution.",
    setting="A transformer of 4 layers on flat shapes. Captions of 5 to 20 tokens stand in 32 "
    "positions. Terse captions say the same as unseen ones without the small words; held-out pairs "
    "are colors and shapes that training never shows together.",
    minutes=8,
    arms=(
        Arm("learned", "a learned padding for each position", {"padding": "learned"}),
        Arm(MASKED, "nothing attends to padding", {"padding": MASKED}),
    ),
    measures=MEASURES,
    curves=CURVES,
    predictions=(
        Prediction("test", "learned", MASKED),
        Prediction("terse", MASKED, "learned"),
        Prediction("heldout", MASKED, "learned"),
    ),
    settings=_settings,
    run=_run,
)

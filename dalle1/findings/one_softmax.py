"""Finding: one softmax for text and image keys, and the last layer's convolutional pattern."""

from __future__ import annotations

from collections.abc import Callable

from dalle1.findings.base import Arm, Finding, Measurements, Options, Prediction, Settings
from dalle1.findings.flat_priors import CURVES, MEASURES, measure_prior, paper_prior, prior_settings
from dalle1.findings.transformers import JointVocabularyTransformer, SeparateSoftmaxTransformer
from dalle1.findings.workspace import Workspace
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.model import Transformer

MODELS: dict[str, Callable[[TransformerConfig, int], Transformer]] = {
    "paper": paper_prior,
    "separate": SeparateSoftmaxTransformer,
    "joint": JointVocabularyTransformer,
}


def _settings(arm: Arm, seed: int, options: Options) -> Settings:
    last = arm.settings.get("last", "conv")
    patterns = {"patterns": ["row", "column", "row", last]}
    return {
        "model": arm.settings.get("model", "paper"),
        **prior_settings(options, variant=patterns),
    }


def _run(settings: Settings, workspace: Workspace) -> Measurements:
    return measure_prior(MODELS[settings["model"]], settings, workspace)


FINDING = Finding(
    name="one-softmax",
    claim="One softmax over the keys of text and image is better than one for each",
    section="appendix B.1",
    paper="one attention operation for text to text, image to text and image to image was better "
    "than several that are normalized on their own. The last layer is convolutional; the paper "
    "compares it with nothing, nor the two vocabularies with one.",
    setting="A transformer of 4 layers on flat shapes, whose last layer looks at 3 x 3 tokens.",
    minutes=18,
    arms=(
        Arm("paper", "one softmax over all keys, convolutional last layer"),
        Arm("two softmaxes", "one over text keys, one over image keys", {"model": "separate"}),
        Arm("one vocabulary", "logits of text and image in one softmax", {"model": "joint"}),
        Arm("last layer row", "a row layer in place of the convolutional one", {"last": "row"}),
        Arm("last layer full", "the last layer reads all before", {"last": "full"}),
    ),
    measures=MEASURES,
    curves=CURVES,
    predictions=(
        Prediction("test", "two softmaxes", "paper"),
        Prediction("test", "last layer row", "paper"),
    ),
    settings=_settings,
    run=_run,
)

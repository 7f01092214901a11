"""Finding: merges dropped at random, and the size of the text vocabulary, on unseen captions.

Dimensions: b captions, t text positions, m image positions.
"""

from __future__ import annotations

import torch

import dvae
from dalle1.common.images import to_tensor
from dalle1.data import shapes
from dalle1.findings.base import (
    Arm,
    Finding,
    Measure,
    Measurements,
    Options,
    Prediction,
    Settings,
)
from dalle1.findings.shapes_parts import CODES, codec_of, codec_settings
from dalle1.findings.training import run_settings, train_run
from dalle1.findings.workspace import Workspace
from dalle1.model import Model, load
from dalle1.transformer.model import Transformer

STEPS = 800
BATCH = 64
SPLITS = ("test", "heldout")  # unseen captions; those with pairs that never occur in training


def _settings(arm: Arm, seed: int, options: Options) -> Settings:
    steps = options.scaled(STEPS, 2)
    captions = options.fewer(500, 256)
    overrides = [
        f"steps={steps}",
        "transformer.width=64",
        "transformer.heads=4",
        "transformer.head_size=16",
        f"transformer.text_vocab={arm.settings['vocabulary']}",
        "transformer.text_length=80",
        f"transformer.image_vocab={CODES}",
        f"optimizer.warmup_steps={min(60, steps // 2)}",
        f"reader.shapes_count={captions}",
        "contact_sheet_every=null",
        "save_every=500",
    ]
    train = run_settings("shapes/dalle", overrides, seed)
    train["tokenizer"] = {"dropout": arm.settings["dropout"], "captions": captions}
    return {"train": train, "codec": codec_settings(options), "unseen": options.fewer(512, 16)}


def _run(settings: Settings, workspace: Workspace) -> Measurements:
    codec = codec_of(settings["codec"], workspace)
    model = load(train_run(settings["train"], workspace.folder / "dalle", workspace, codec=codec))
    values: dict[str, float] = {}
    for split in SPLITS:
        text, image = _nats(model, split, settings["unseen"])
        values |= {f"{split}_text": text, f"{split}_image": image}
    seen, _ = _nats(model, "train", settings["unseen"])
    return Measurements(values | {"train_text": seen})


@torch.no_grad()
def _nats(model: Model, split: str, count: int) -> tuple[float, float]:
    """- ln p of a caption, and of an image given its caption, means over a split in nats.

    Captions are encoded without dropout. A caption's nats are those of all its tokens and of its
    end, and so can be compared between vocabularies.
    """
    samples = [shapes.make(0, i, split, model.image_size) for i in range(count)]
    prior, codec = model.prior, model.codec
    assert isinstance(prior, Transformer) and isinstance(codec, dvae.DVAE)
    text_nats = image_nats = 0.0
    for first in range(0, count, BATCH):
        part = samples[first : first + BATCH]
        text = model.tokenizer.encode([sample.caption for sample in part])  # [b, t]
        images = torch.stack([to_tensor(sample.image) for sample in part])
        tokens = codec.encode(images).flatten(1)  # [b, m]
        losses = prior.loss(text, tokens)
        text_nats += losses.text.item() * prior.count_text_targets(text)
        image_nats += losses.image.item() * tokens.numel()
    return text_nats / count, image_nats / count


FINDING = Finding(
    name="bpe",
    claim="Merges of BPE that are dropped at random in training, and a large text vocabulary, do "
    "no harm to unseen captions",
    section="section 2.2",
    paper="16,384 byte-pair tokens and 10 % dropout are used, as is common in translation; their "
    "effect is not reported.",
    setting="A transformer of 4 layers and width 64 on 500 images of shapes, some 25 times each. "
    "Nats of a caption are those of all its tokens and its end, encoded without dropout.",
    minutes=20,
    arms=tuple(
        Arm(
            f"{vocabulary}, dropout {dropout:g}",
            f"{vocabulary} tokens, {100 * dropout:g} % of the merges dropped",
            {"vocabulary": vocabulary, "dropout": dropout},
        )
        for vocabulary in (272, 380)
        for dropout in (0.0, 0.1)
    ),
    measures=(
        Measure("train_text", "nats a seen caption"),
        Measure("test_text", "nats an unseen caption"),
        Measure("heldout_text", "nats a caption with held-out pairs"),
        Measure("test_image", "nats an unseen image"),
        Measure("heldout_image", "nats an image with held-out pairs"),
    ),
    predictions=(
        Prediction("test_text", "380, dropout 0", "380, dropout 0.1"),
        Prediction("heldout_text", "380, dropout 0", "380, dropout 0.1"),
        Prediction("heldout_image", "380, dropout 0", "380, dropout 0.1"),
    ),
    reference="380, dropout 0",
    settings=_settings,
    run=_run,
)

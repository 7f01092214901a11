"""Finding: where a model begins to draw pairs of a color and a shape that training never shows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

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
from dalle1.findings.glyphs import (
    SIDE,
    TEXT_LENGTH,
    GlyphSettings,
    draw_images,
    encode_captions,
    pairs_of,
    read_images,
)
from dalle1.findings.patches import PatchCodec
from dalle1.findings.prior_training import Pairs, Recipe, draw_one_each, train_prior
from dalle1.findings.workspace import Workspace
from dalle1.training.config import OptimizerSettings
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.model import Transformer

HEAD = 16  # width of an attention head
MIDWAY = 256  # captions drawn while training; at the end there are more

# What all arms share where they say nothing else.
BASE = {
    "colors": 8,
    "shapes": 32,
    "held_out": 1,
    "shades": 1,
    "code_side": 2,
    "images": 8000,
    "width": 64,
    "steps": 1500,
}


def _settings(arm: Arm, seed: int, options: Options) -> Settings:
    chosen = BASE | dict(arm.settings)
    recipe = Recipe(
        steps=options.scaled(chosen["steps"], 2),
        batch_size=32,
        optimizer=OptimizerSettings(
            learning_rate=3e-3,
            weight_decay=4.5e-2,
            clip_norm=1.0,
            warmup_steps=options.scaled(60),
            schedule="cosine",
        ),
    )
    glyphs = {name: chosen[name] for name in ("colors", "shapes", "held_out", "shades")}
    return {
        "glyphs": GlyphSettings(**glyphs).model_dump(mode="json"),
        "code_side": chosen["code_side"],
        "images": options.fewer(chosen["images"], 64),
        "drawn": options.fewer(1024, 8),
        "width": chosen["width"],
        "layers": 3,
        "recipe": recipe.model_dump(mode="json"),
    }


def _run(settings: Settings, workspace: Workspace) -> Measurements:
    glyphs, recipe = GlyphSettings(**settings["glyphs"]), Recipe(**settings["recipe"])
    seed = settings["seed"]
    rng = np.random.default_rng(seed)

    def some(held_out: bool, count: int) -> np.ndarray:
        pairs = pairs_of(glyphs, held_out)
        return pairs[rng.integers(len(pairs), size=count)]

    shown = some(False, settings["images"])
    images = draw_images(glyphs, shown, rng)
    codec = PatchCodec.of_images(images, settings["code_side"])
    training = Pairs(encode_captions(glyphs, shown), codec.encode(images).flatten(1))
    asked = {"seen": some(False, settings["drawn"]), "held_out": some(True, settings["drawn"])}
    covered = codec.knows(draw_images(glyphs, asked["held_out"], rng))

    prior = Transformer(_shape(settings, glyphs, codec), seed=seed)
    right: dict[str, list[tuple[float, float]]] = {"held_out": []}

    def draw(pairs: np.ndarray) -> np.ndarray:
        """Whether color and shape of a drawn image are right: bool [n, 2]."""
        tokens = draw_one_each(prior, encode_captions(glyphs, pairs), seed)
        grid = tokens.unflatten(1, (prior.config.grid, prior.config.grid))
        found: np.ndarray = read_images(glyphs, codec.decode(grid)) == pairs
        return found

    def follow(step: int) -> None:
        share = draw(asked["held_out"][:MIDWAY]).all(axis=1).mean()
        right["held_out"].append((step, 100 * float(share)))

    train_prior(prior, training, recipe, seed, follow, _milestones(recipe.steps))
    drawn = {name: draw(pairs) for name, pairs in asked.items()}
    color, shape = drawn["held_out"].mean(axis=0)
    shares = {
        "held_out": drawn["held_out"].all(axis=1).mean(),
        "color": color,
        "shape": shape,
        "seen": drawn["seen"].all(axis=1).mean(),
        "covered": covered.float().mean(),
    }
    return Measurements({name: 100 * float(share) for name, share in shares.items()}, right)


def _shape(settings: Settings, glyphs: GlyphSettings, codec: PatchCodec) -> TransformerConfig:
    return TransformerConfig(
        width=settings["width"],
        layers=settings["layers"],
        heads=settings["width"] // HEAD,
        head_size=HEAD,
        text_vocab=glyphs.text_vocab,
        text_length=TEXT_LENGTH,
        image_vocab=codec.vocab_size,
        grid=SIDE // settings["code_side"],
        init_std=1 / math.sqrt(settings["width"]),
    )


def _milestones(steps: int) -> list[int]:
    """Updates after which held-out pairs are drawn: each twice as many as before, to the end."""
    halvings = range(min(5, steps.bit_length()))
    return sorted({max(1, steps >> halving) for halving in halvings})


def _arm(name: str, change: str, **settings: Any) -> Arm:
    return Arm(name, change, settings)


FINDING = Finding(
    name="composition",
    claim="A model draws a color and a shape together that training never shows together",
    section="section 3.3",
    paper="the model composes unusual concepts, such as an accordion made of a tapir; how much of "
    "it depends on the data and on the size it does not say.",
    setting="A transformer of 3 layers on images of one colored glyph. Of each shape, one color "
    "(or half of them) is never shown. A caption's single draw is right when color and shape are.",
    minutes=40,
    reference="8 x 32",
    arms=(
        _arm("8 x 4", "8 colors, 4 shapes, as in the demo; codes of 2 x 2 pixels", shapes=4),
        _arm("8 x 4, 4 px", "codes of 4 x 4 pixels: a glyph is a code", shapes=4, code_side=4),
        _arm("8 x 4, 1 px", "codes of one pixel: a code is a color", shapes=4, code_side=1),
        _arm("4 x 4, 1 px", "the same with 4 colors", colors=4, shapes=4, code_side=1),
        _arm("8 x 8", "8 shapes", shapes=8),
        _arm("4 x 32", "4 colors, 32 shapes", colors=4),
        _arm("8 x 32", "32 shapes"),
        _arm("16 x 32", "16 colors, 32 shapes", colors=16),
        _arm("8 x 128", "128 shapes", shapes=128),
        _arm("half held out", "8 x 32, 4 of 8 colors of each shape are held out", held_out=4),
        _arm("two shades", "8 x 32, each pixel in one of two shades", shades=2),
        _arm("1,000 images", "8 x 32, 1,000 training images in place of 8,000", images=1000),
        _arm("width 128", "8 x 32, twice the width", width=128),
        _arm("4 x updates", "8 x 32, 6,000 updates", steps=6000),
    ),
    measures=(
        Measure("held_out", "held-out pairs right, %", 1),
        Measure("color", "their color right, %", 1),
        Measure("shape", "their shape right, %", 1),
        Measure("seen", "seen pairs right, %", 1),
        Measure("covered", "held-out images of known codes, %", 1),
    ),
    curves=(Curve("held_out", "held-out pairs right, %", log_x=True),),
    predictions=(
        Prediction("held_out", "8 x 4, 1 px", "8 x 4"),
        Prediction("held_out", "16 x 32", "4 x 32"),
        Prediction("held_out", "4 x updates", "8 x 32"),
        Prediction("held_out", "width 128", "8 x 32"),
    ),
    settings=_settings,
    run=_run,
)

"""The built-in shapes in a few flat colors at 16 x 16 pixels, as token shards of an exact codec.

Without soft edges the images have a few hundred distinct patches of 2 x 2 pixels, and those are the
codes: 8 x 8 tokens an image, as in the demo, and no dVAE to train. Scenes and captions are those of
`dalle1.data.shapes`.

Dimensions: n images, v codes, t text positions (32), m image positions (64).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dalle1 import registry
from dalle1.common.config import Section
from dalle1.common.weights import fingerprint
from dalle1.data.shapes.checker import ObjectClaim, parse
from dalle1.data.shapes.dataset import BACKGROUNDS, Scene, coverage, grid, make
from dalle1.data.shapes.palettes import COLORS
from dalle1.data.shards.token_shard import END, TokenSettings, TokenShard, write_token_shard
from dalle1.findings.patches import KIND, PatchCodec, save_codec
from dalle1.findings.prior_training import Pairs
from dalle1.findings.workspace import Workspace
from dalle1.tokenizer import TOKENIZER, Tokenizer

SIDE, CODE_SIDE = 16, 2
GRID = SIDE // CODE_SIDE
TEXT_VOCAB = 380  # whole words, as in configs/shapes
# Captions have at most 22 tokens. As in the paper there is room for more.
TEXT_LENGTH = 32
TRAINING, TEST, HELDOUT, TERSE = "training", "test", "heldout", "terse"
SETS = (TRAINING, TEST, HELDOUT, TERSE)
CODEC = "codec"


class FlatSettings(Section):
    """How many samples there are."""

    training: int = Field(8000, ge=32, description="samples that priors learn from")
    unseen: int = Field(1024, ge=8, description="samples of each other set")


@dataclass(frozen=True)
class FlatShapes:
    """What `flat_shapes` has made.

    folder: holds a folder of token shards for each set, the codec's, and the tokenizer's file.
    sets: by name. "training" is what priors learn from; "test" are other samples of the same kind;
        "heldout" show pairs of a color and a shape that training never shows; "terse" have the
        images of "test", under captions without the small words, shorter than training's.
    """

    folder: Path
    codec: PatchCodec
    tokenizer: Tokenizer
    sets: dict[str, Pairs]


def flat_shapes(settings: FlatSettings, workspace: Workspace) -> FlatShapes:
    """The data, made by the first run that needs them."""
    content = settings.model_dump(mode="json")
    folder = workspace.shared("flat-shapes", content, lambda folder: write(settings, folder))
    return read(folder)


def write(settings: FlatSettings, folder: Path) -> None:
    """Writes codec, tokenizer and token shards of all sets. The codec's codes are the patches of
    the training images; a patch of others that is none of them becomes the nearest."""
    counts = {TRAINING: settings.training, TEST: settings.unseen, HELDOUT: settings.unseen}
    splits = {TRAINING: "train", TEST: "test", HELDOUT: "heldout"}
    samples = {
        name: [make(0, i, splits[name], SIDE) for i in range(count)]
        for name, count in counts.items()
    }
    images = {name: render_flat([s.scene for s in of]) for name, of in samples.items()}
    captions = {name: [s.caption for s in of] for name, of in samples.items()}
    images[TERSE], captions[TERSE] = images[TEST], [terse(text) for text in captions[TEST]]
    tokenizer = Tokenizer.train(captions[TRAINING], TEXT_VOCAB, TEXT_LENGTH, dropout=0.0)
    tokenizer.save(folder / TOKENIZER)
    codec = PatchCodec.of_images(images[TRAINING], CODE_SIDE)
    save_codec(codec, folder / CODEC)
    made = TokenSettings(codec.vocab_size, GRID, 1, False, fingerprint(codec))
    for name in SETS:
        tokens = codec.encode(images[name]).flatten(1)[:, None].numpy()
        keys = [f"{name}-{i:06d}" for i in range(len(tokens))]
        path = folder / name / f"00000{END}"
        path.parent.mkdir(exist_ok=True)
        write_token_shard(path, keys, [[text] for text in captions[name]], tokens, made)


def read(folder: Path) -> FlatShapes:
    """What `write` has written."""
    registry.register(KIND)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    sets = {}
    for name in SETS:
        shard = TokenShard(folder / name / f"00000{END}")
        samples = shard.read(0, shard.count)
        text = tokenizer.encode([sample.captions[0] for sample in samples])
        image = torch.from_numpy(np.stack([sample.tokens[0] for sample in samples]).astype(int))
        sets[name] = Pairs(text, image)
    return FlatShapes(folder, registry.load("codec", folder / CODEC), tokenizer, sets)


def render_flat(scenes: list[Scene]) -> Tensor:
    """Scenes without soft edges: float32 [n, 3, 16, 16] in [0, 1]. A pixel belongs to a thing that
    covers at least half of it."""
    across, down = grid(SIDE)
    images = np.empty((len(scenes), SIDE, SIDE, 3), np.float32)
    for image, scene in zip(images, scenes, strict=True):
        image[:] = BACKGROUNDS[scene.background]
        for thing in scene.things:
            dx, dy = across - thing.x, down - thing.y
            inside = coverage(thing.shape, dx, dy, thing.radius, 1 / SIDE) >= 0.5
            image[inside] = COLORS[thing.color]
    return torch.from_numpy(images / 255).movedim(-1, 1).contiguous()


def terse(caption: str) -> str:
    """A caption without articles, openings and verbs: "small red circle left of blue square"."""
    claims = parse(caption)
    parts = [_name(claims.objects[0])]
    if claims.relation is not None:
        parts += [claims.relation, _name(claims.objects[1])]
    if claims.background is not None:
        parts.append(f"{claims.background} background")
    return " ".join(parts)


def _name(thing: ObjectClaim) -> str:
    return " ".join(word for word in (thing.size, thing.color, thing.shape) if word)

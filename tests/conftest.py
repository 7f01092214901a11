"""Tiny random models that every test of the library may build in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dalle1 import CLIP, CLIPConfig, Model, Tokenizer, Transformer, TransformerConfig
from dvae import DVAE, DVAEConfig

CAPTIONS = ["a red cat", "a blue dog", "a red dog on a mat", "the blue cat", "one small mat"]

TransformerMaker = Callable[..., Transformer]
ModelMaker = Callable[..., Model]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def randomize(module: nn.Module, seed: int, std: float = 0.3) -> None:
    """Weights far from the initial ones, so that a wrong key, mask or position shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(std * noise)  # gains stay around 1, biases around 0
            else:
                parameter.copy_(std * noise)


@pytest.fixture(scope="session")
def make_transformer() -> TransformerMaker:
    """Builds a random transformer in eval mode; keywords change its config."""

    def make(seed: int = 0, std: float = 0.3, **changes: Any) -> Transformer:
        config: dict[str, Any] = {
            "width": 16,
            "layers": 4,
            "heads": 2,
            "head_size": 8,
            "text_vocab": 11,
            "text_length": 6,
            "image_vocab": 9,
            "grid": 4,
            "conv_kernel": 3,
        }
        transformer = Transformer(TransformerConfig(**{**config, **changes}))
        randomize(transformer, seed, std)
        return transformer.eval()

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A tokenizer of ten text positions in which a word of CAPTIONS is about one token."""
    return Tokenizer.train(CAPTIONS, vocab_size=280, text_length=10)


@pytest.fixture(scope="session")
def make_model(make_transformer: TransformerMaker, tokenizer: Tokenizer) -> ModelMaker:
    """Builds a whole random model that draws 8x8 pictures of 4x4 tokens."""

    def make(clip: bool = True, seed: int = 0, grid: int = 4, codes: int = 5) -> Model:
        transformer = make_transformer(
            seed,
            layers=3,
            text_vocab=tokenizer.vocab_size,
            text_length=tokenizer.text_length,
            image_vocab=codes,
            grid=grid,
        )
        torch.manual_seed(seed)
        codec = DVAE(
            DVAEConfig(width=8, bottleneck=6, groups=2, blocks_per_group=1, codebook_size=codes)
        )
        ranker = CLIP(
            CLIPConfig(
                embedding=8,
                image_size=8,
                patch_size=4,
                vision_width=8,
                vision_layers=1,
                vision_heads=2,
                text_vocab=tokenizer.vocab_size + 2,
                text_length=10,
                text_width=8,
                text_layers=1,
                text_heads=2,
            )
        )
        return Model(tokenizer, transformer, codec, ranker if clip else None)

    return make


@pytest.fixture(scope="session")
def model(make_model: ModelMaker) -> Model:
    """One whole random model with CLIP; tests must not change it."""
    return make_model()


def reads_otherwise(path: Path) -> None:
    """Puts in a tokenizer of the same size whose ids mean other things."""
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["bpe"]["model"]
    a, b = list(model["vocab"])[-2:]
    model["vocab"][a], model["vocab"][b] = model["vocab"][b], model["vocab"][a]
    path.write_text(json.dumps(content), encoding="utf-8")

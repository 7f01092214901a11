"""Stage two with a transformer as published relatives have it: trained, resumed, opened, begun
from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dalle1
from dalle1.published import mindalle, rudalle
from dalle1.training.config import RunConfig
from dalle1.training.initialization import with_initial_parts
from dalle1.training.trainer import Trainer
from dalle1.transformer.variant import Variant

from .conftest import run_until, tiny
from .test_trainer import losses, tensors

VARIANTS = {
    "v3": rudalle.variant("v3", 48),
    "v2": rudalle.variant("v2", 48),
    "minDALL-E": mindalle.variant(padding=1),
}


def variant_config(
    variant: Variant, shards: str, run: Path, parts: Path, **settings: Any
) -> RunConfig:
    config = tiny("dalle", shards, run, parts)
    assert config.transformer is not None
    shape = {**config.transformer.model_dump(), "variant": variant.model_dump()}
    return tiny("dalle", shards, run, parts, transformer=shape, **settings)


@pytest.mark.parametrize("version", ["v3", "v2"])
def test_runs(version: str, tmp_path: Path, shards: str, parts: Path) -> None:
    """A variant that is lost in the run's config, its checkpoint or its exported folder; a run that
    does not resume to the bit."""
    v = VARIANTS[version]
    Trainer(variant_config(v, shards, tmp_path / "full", parts, steps=24)).run()
    config = variant_config(v, shards, tmp_path / "parts", parts, steps=24)
    run_until(config, 9)
    Trainer(config, resume=True).run()
    found = losses(tmp_path / "full")
    assert found == losses(tmp_path / "parts")
    assert sum(found[-4:]) < sum(found[:4])
    full, resumed = (tensors(tmp_path / run, 24) for run in ("full", "parts"))
    assert all(torch.equal(full[name], resumed[name]) for name in full)
    folder = tmp_path / "full" / "model"
    section = json.loads((folder / "config.json").read_text(encoding="utf-8"))["prior"]
    assert section["variant"]["start"] == v.start
    model = dalle1.load(folder)
    assert isinstance(model.prior, dalle1.Transformer) and model.prior.config.variant == v
    result = dalle1.sample("a red circle", model=model, candidates=2, keep=1, progress=False)
    assert result.tokens.shape == (1, 1, 4, 4)
    assert torch.isfinite(model.log_prob("a red circle", result.tokens[0, 0]))
    assert isinstance(model.complete_caption("a red"), str)


@pytest.mark.parametrize(
    "parallel",
    [{"precision": "fp16"}, {"precision": "bf16"}, {"zero_stage": 2}, {"zero_stage": 3}],
    ids=str,
)
def test_ways_of_training(
    parallel: dict[str, Any], tmp_path: Path, shards: str, parts: Path
) -> None:
    """Gradient scales, autocast or shards that a block with two norms, or a model without starts,
    does not have."""
    found = []
    for name, settings in (("plain", {}), ("other", {"parallel": parallel})):
        execution = {
            "attention": "sparse" if settings else "dense",
            "checkpointing": bool(settings),
        }
        config = variant_config(
            VARIANTS["v3"], shards, tmp_path / name, parts, steps=8, execution=execution, **settings
        )
        Trainer(config).run()
        found.append(losses(tmp_path / name))
    tolerance = 1e-4 if "zero_stage" in parallel else 0.02
    assert found[0] == pytest.approx(found[1], rel=tolerance)


def test_one_padding_token(tmp_path: Path, shards: str, parts: Path) -> None:
    """A tokenizer that pads by position, with a model of one padding: ids out of its table."""
    config = variant_config(VARIANTS["minDALL-E"], shards, tmp_path, parts, steps=2)
    with pytest.raises(ValueError, match=r"text_tokens: expected tokens in \[0, 299\]; got 3\d\d"):
        Trainer(config).run()


def test_a_run_from_a_variant(tmp_path: Path, shards: str, parts: Path) -> None:
    """Weights of one variant that are run as another, or a difference that is not named."""
    v = VARIANTS["v3"]
    Trainer(variant_config(v, shards, tmp_path / "first", parts, steps=2)).run()
    folder = str(tmp_path / "first" / "model")
    config = tiny("dalle", shards, tmp_path / "next", parts, init=folder, transformer=None, steps=3)
    config = config.model_copy(update={"tokenizer": None})
    begun = with_initial_parts(config)
    assert begun.transformer is not None and begun.transformer.variant == v
    free = v.model_copy(update={"embedding_gradient": 1.0})
    kept = variant_config(free, shards, tmp_path / "next", parts, init=folder)
    kept = kept.model_copy(update={"tokenizer": None})
    assert with_initial_parts(kept).transformer == kept.transformer
    papers = tiny("dalle", shards, tmp_path / "next", parts, init=folder)
    with pytest.raises(
        ValueError, match=r"transformer.variant.start is 'none' there and 'vectors'"
    ):
        with_initial_parts(papers)

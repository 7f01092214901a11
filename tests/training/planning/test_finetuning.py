"""The recipes of configs/finetune: settings that are read, names that the models have, and a GPU of
24 GB that holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dalle1.published import mindalle, rudalle
from dalle1.seq2seq.config import Seq2SeqConfig
from dalle1.training.config import RunConfig, load_config
from dalle1.training.planning.flops import build_module, parameter_count, trained_count
from dalle1.training.planning.network import ClusterSettings
from dalle1.training.planning.plan import plan
from dvae import VQGANConfig
from tests.seq2seq.sizes import MEGA

FOLDER = Path(__file__).parents[3] / "configs" / "finetune"
GPU = ClusterSettings(gpus=1, memory=24)
# Of each file: the section that `init` would give, of the published model, and how many parameters
# the model has (published.md).
MODELS: dict[str, tuple[str, Any, int]] = {
    "rudalle": ("transformer", rudalle.published_config(), 1_310_410_880),
    "mindalle": ("transformer", mindalle.published_config(padding=1), 1_291_081_728),
    "dalle_mini": ("seq2seq", Seq2SeqConfig(), 437_833_712),
    "dalle_mega": ("seq2seq", MEGA, 2_587_521_024),
    "vqgan": ("vqgan", VQGANConfig(), 76_073_859),
}


def recipe(name: str, *overrides: str) -> RunConfig:
    section, shape, _ = MODELS[name]
    config = load_config(FOLDER / f"{name}.yaml", overrides)
    return config.model_copy(update={section: shape})


def test_each_file_is_known() -> None:
    """A recipe that nobody reads, or one of a model that is gone."""
    ours = {"shapes", "shapes-dvae"}  # which run in the demo's minutes
    assert {path.stem for path in FOLDER.glob("*.yaml")} - ours == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_recipe(name: str) -> None:
    """A recipe of a setting or a module that there is not, that does not fit its GPU, or whose head
    line says another number."""
    config = recipe(name)
    assert config.init is not None and config.init.startswith("runs/published/")
    model = build_module(config)
    extra = parameter_count(model.discriminator) if hasattr(model, "discriminator") else 0
    assert parameter_count(model) - extra == MODELS[name][2]
    assert 0 < trained_count(model) <= parameter_count(model)
    made = plan(config, GPU)
    assert made.fits_well
    text = (FOLDER / f"{name}.yaml").read_text()
    assert f"counts {made.memory.total / 1e9:.1f} GB" in " ".join(text.replace("#", " ").split())


def test_what_is_frozen_has_no_moments() -> None:
    """A plan that asks for an 80 GB GPU to train a part of a model; gradients of frozen weights."""
    full, part = (
        plan(recipe("mindalle", f"train_only={names}"), GPU)
        for names in ("null", "[layers.40.attention]")
    )
    attention = 4 * 1536**2 + 4 * 1536 + 2 * 1536  # one layer's, with biases and its norm
    assert part.memory.gradients == 4 * attention and part.memory.moments == 8 * attention
    assert full.memory.gradients == 4 * MODELS["mindalle"][2]
    assert part.memory.weights == full.memory.weights == full.memory.gradients
    assert part.cpu == full.cpu  # the average is of all weights
    assert not full.fits and part.fits
    with pytest.raises(ValueError, match=r"train_only: the model has no module 'layers\.42'"):
        plan(recipe("mindalle", "train_only=[layers.42]"), GPU)
    two = ClusterSettings(gpus=2, gpus_per_node=1)
    sent = {
        t.name: t.gpu
        for t in plan(recipe("mindalle", "train_only=[layers.40.attention]"), two).transfers
    }
    assert sent["gradients, between replicas"] == 4 * attention

"""Settings: the files in configs/, overrides, mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dalle1 import Transformer, TransformerConfig
from dalle1.common.config import load_settings, save_settings
from dalle1.data.precompute.encode import TokenizeSettings
from dalle1.evaluation.config import CopySettings, Measure, RankSettings, RetrievalSettings
from dalle1.training.config import DVAESettings, EMASettings, OptimizerSettings, load_config
from dvae import DVAEConfig

CONFIGS = Path(__file__).parents[2] / "configs"
SHAPES = CONFIGS / "shapes"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_loads(path: Path) -> None:
    """A committed experiment with a setting that nothing reads."""
    if path.stem in ("rank", "coco", "cub", "completion"):
        candidates = load_settings(RankSettings, path).candidates
        assert candidates == (64 if path.parent.name == "emoji" else 512)
    elif path.stem in ("copies", "retrieval"):
        kind = CopySettings if path.stem == "copies" else RetrievalSettings
        assert load_settings(kind, path).measure == load_settings(Measure, path).measure
    elif path.stem == "tokens":
        assert load_settings(TokenizeSettings, path).views >= 1
    else:
        assert load_config(path).steps > 0


def test_overrides() -> None:
    """Overrides that are swallowed, typed wrongly or wipe their section."""
    config = load_config(
        SHAPES / "dvae.yaml",
        ["optimizer.learning_rate=1e-4", "data=a/{0..3}.tar", "steps=5000", "run=x y"],
    )
    assert config.optimizer.learning_rate == 1e-4 and config.optimizer.beta2 == 0.98
    assert (config.data, config.steps, config.run) == ("a/{0..3}.tar", 5000, "x y")


PAPER_SIZES = {"250m": 0.25, "1.2b": 1.2, "2.8b": 2.8, "5.6b": 5.6, "12b": 12.2}  # billions


@pytest.mark.parametrize(("name", "billions"), PAPER_SIZES.items())
def test_papers_transformers(name: str, billions: float) -> None:
    """A size of table 1 that is another, or the paper's settings changed on the way (B.2)."""
    config = load_config(CONFIGS / "paper" / f"{name}.yaml")
    assert config.transformer is not None and config.tokenizer is not None
    with torch.device("meta"):
        transformer = Transformer(config.transformer)
    count = sum(p.numel() for p in transformer.parameters()) / 1e9
    assert abs(count - billions) < 0.05 * billions
    widths = {"2.8b": 1920, "5.6b": 2688, "12b": 3968}
    if name in widths:
        assert (config.transformer.width, config.transformer.layers) == (widths[name], 64)
        assert config.batch_size == 1024
    if name == "12b":
        assert 12.0 < count < 12.4 and config.transformer == TransformerConfig()
    o, ema = config.optimizer, config.ema
    assert (o.learning_rate, o.beta1, o.beta2, o.epsilon) == (4.5e-4, 0.9, 0.96, 1e-8)
    assert (o.weight_decay, o.clip_norm, o.clip_variance) == (4.5e-2, 4, 5)
    assert (o.warmup_steps, o.schedule, config.steps) == (5000, "plateau", 430_000)
    assert (ema.decay, ema.every, config.tokenizer.dropout) == (0.99, 25, 0.1)


def test_defaults_are_the_transformers() -> None:
    """A default of another stage, or none, where the page says that it is of appendix B.2."""
    paper = load_config(CONFIGS / "paper" / "12b.yaml")
    assert OptimizerSettings() == paper.optimizer and EMASettings() == paper.ema


@pytest.mark.parametrize(
    ("path", "bound"),
    [
        ("paper/dvae.yaml", None),
        ("shapes/clip.yaml", None),
        ("shapes/dvae.yaml", None),
        ("finetune/shapes-dvae.yaml", None),
        ("finetune/shapes.yaml", 5),
        ("shapes/dalle.yaml", 5),
        ("paper/250m.yaml", 5),
    ],
)
def test_variance_bound_is_said_where_it_is_not_the_default(path: str, bound: float | None) -> None:
    """A config of another stage that trains otherwise since a default has changed."""
    assert load_config(CONFIGS / path).optimizer.clip_variance == bound


def test_papers_dvae() -> None:
    """A number of appendix A.2 that is another."""
    config = load_config(CONFIGS / "paper" / "dvae.yaml")
    assert config.dvae == DVAEConfig() and config.dvae_training == DVAESettings()
    s, o = config.dvae_training, config.optimizer
    assert s is not None
    assert (s.kl_weight, s.kl_steps) == (6.6, 5000)
    assert (s.temperature_start, s.temperature_end, s.temperature_steps) == (1, 1 / 16, 150_000)
    assert (s.grain, s.encoder_rate, s.warm_start_steps) == (0, 1, 0)
    assert (o.learning_rate, o.schedule, o.cosine_end) == (1e-4, "cosine", 1.25e-6)
    assert (o.cosine_steps, config.steps, config.batch_size) == (1_200_000, 3_000_000, 512)
    assert (o.beta1, o.beta2, o.epsilon, o.weight_decay) == (0.9, 0.999, 1e-8, 1e-4)
    assert (o.clip_norm, o.clip_variance, o.warmup_steps) == (None, None, 0)
    assert (config.ema.decay, config.ema.every, config.reader.image_size) == (0.999, 1, 256)


@pytest.mark.parametrize("path", ["shapes/dalle.yaml", "paper/dvae.yaml", "paper/12b.yaml"])
def test_saved_config_is_the_same(tmp_path: Path, path: str) -> None:
    """A resolved config that does not say what was run; a none that comes back as the default."""
    config = load_config(CONFIGS / path, ["steps=7"])
    save_settings(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.lerning_rate=1"], "optimizer.lerning_rate"),
        (["steps"], "key=value"),
        (["steps.a=3"], "no section"),
        (["steps=0"], "steps"),
        (["stage=gan"], "stage"),
        (["transformer.layers=2", "transformer.width=3968"], "not read by stage"),
        (["caption_dropout=0.1"], "caption_dropout"),
    ],
)
def test_mistakes_are_named(overrides: list[str], words: str) -> None:
    """A typing error that trains for hours with the default instead."""
    with pytest.raises(ValueError, match=words):
        load_config(SHAPES / "dvae.yaml", overrides)


def test_width_must_be_heads_times_head_size() -> None:
    """A width that splits into no whole heads, noticed only inside a layer."""
    with pytest.raises(ValueError, match="heads x head_size"):
        load_config(SHAPES / "dalle.yaml", ["transformer.width=100"])


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", ""])
def test_files_that_are_no_config(tmp_path: Path, text: str) -> None:
    """A traceback from inside the YAML reader."""
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"x\.yaml"):
        load_config(tmp_path / "x.yaml")


def test_missing_file(tmp_path: Path) -> None:
    """A traceback for a misspelled path."""
    with pytest.raises(ValueError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml")


def test_extends(tmp_path: Path) -> None:
    """A child file that replaces a section where it means to change one setting of it."""
    (tmp_path / "child.yaml").write_text(
        f"extends: {SHAPES / 'dvae.yaml'}\noptimizer:\n  learning_rate: 1.0e-5\n"
    )
    config = load_config(tmp_path / "child.yaml")
    assert config.optimizer.learning_rate == 1e-5 and config.optimizer.clip_norm == 0.1

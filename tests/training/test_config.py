"""Settings: the files in configs/, overrides, mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dalle1.training.config import load_config, save_config

CONFIGS = Path(__file__).parents[2] / "configs"
SHAPES = CONFIGS / "shapes"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_loads(path: Path) -> None:
    """A committed experiment with a setting that nothing reads."""
    assert load_config(path).steps > 0


def test_overrides() -> None:
    """Overrides that are swallowed, typed wrongly or wipe their section."""
    config = load_config(
        SHAPES / "dvae.yaml",
        ["optimiser.learning_rate=1e-4", "data=a/{0..3}.tar", "steps=5000", "run=x y"],
    )
    assert config.optimiser.learning_rate == 1e-4 and config.optimiser.beta2 == 0.98
    assert (config.data, config.steps, config.run) == ("a/{0..3}.tar", 5000, "x y")


def test_saved_config_is_the_same(tmp_path: Path) -> None:
    """A resolved config that does not say what was run."""
    config = load_config(SHAPES / "dalle.yaml", ["caption_dropout=0.1"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimiser.lerning_rate=1"], "optimiser.lerning_rate"),
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
    """A traceback for a misspelt path."""
    with pytest.raises(ValueError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml")


def test_extends(tmp_path: Path) -> None:
    """A child file that replaces a section where it means to change one setting of it."""
    (tmp_path / "child.yaml").write_text(
        f"extends: {SHAPES / 'dvae.yaml'}\noptimiser:\n  learning_rate: 1.0e-5\n"
    )
    config = load_config(tmp_path / "child.yaml")
    assert config.optimiser.learning_rate == 1e-5 and config.optimiser.clip_norm == 0.1

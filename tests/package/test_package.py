"""The wheel, built and installed elsewhere, as a user has it who has never seen the checkout."""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import dalle1
from dalle1 import Model, configs, models
from dalle1.training.distributed import free_port
from tests.conftest import CAPTIONS
from tests.package.installed import ROOT, Environment

TINY = (
    *("steps=20", "dvae_training.warm_start_steps=10", "dvae.codebook_size=16", "dvae.width=8"),
    *("reader.shapes_count=64", "contact_sheet_every=null", "batch_size=4"),
)


def test_what_the_wheel_holds(built: tuple[Path, Path]) -> None:
    """Settings, markers, models or the page's files that stay behind; tests, scripts or data that
    travel along."""
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        info = next(name for name in names if name.endswith("/METADATA"))
        text = wheel.read(info).decode()
    assert f"\nVersion: {dalle1.__version__}\n" in text
    info = info.partition("/")[0]
    assert {name.partition("/")[0] for name in names} == {"dalle1", "dvae", info}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("dalle1", "dvae")
        for pattern in ("*.py", "py.typed", "assets/*")  # the last: scripts and styles of the page
        for path in (ROOT / package).rglob(pattern)
    }
    shipped = {
        path.relative_to(ROOT).as_posix()
        for path in models.folder().rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    settings = {f"dalle1/configs/{name}.yaml" for name in configs.names()}
    assert {name for name in names if not name.startswith(info)} == sources | shipped | settings


def test_what_the_source_distribution_holds(built: tuple[Path, Path]) -> None:
    """A source distribution that cannot be tested, or whose pages are missing."""
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for pattern in ("configs/**/*.yaml", "launch/*.py", "tests/**/*.py", "docs/**/*.md"):
        found = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)}
        assert found and found <= names, found - names
    files = {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", "setup.py"}
    assert files <= names
    assert not any("__pycache__" in name or name.startswith(("runs", "data/")) for name in names)


def test_nothing_of_the_checkout_is_used(installed: Environment, tmp_path: Path) -> None:
    """An environment in which all tests of this file test the checkout."""
    code = "import dalle1, dvae, torch; print(dalle1.__file__, dvae.__file__)"
    printed = installed.run("python", "-c", code, cwd=tmp_path)
    for path in printed.split():
        assert Path(path).is_relative_to(installed.bin.parent), path
    installed.run("pip", "check", cwd=tmp_path)


def test_imports_are_light(installed: Environment, tmp_path: Path) -> None:
    """DeepSpeed, which is not there on every system, needed or imported without training."""
    code = """
import sys
sys.modules["deepspeed"] = None
from dalle1 import *
heavy = {"gradio", "matplotlib", "tensorboard", "transformers"}
print(load, sample, heavy & {*sys.modules})
"""
    assert "set()" in installed.run("python", "-c", code, cwd=tmp_path)


def test_help_and_settings(installed: Environment, tmp_path: Path) -> None:
    """A command that is not installed; files of settings that the wheel has not, or others."""
    assert "  data shard " in installed.run("dalle1", "--help", cwd=tmp_path)
    version = installed.run("dalle1", "--version", cwd=tmp_path)
    assert version == f"dalle1 {dalle1.__version__}\n"
    listed = installed.run("dalle1", "configs", cwd=tmp_path)
    assert re.findall(r"^(\S+)$", listed, re.M) == configs.names()
    assert installed.run("dalle1", "configs", "paper/1.2b", cwd=tmp_path) == configs.read(
        "paper/1.2b"
    )
    plan = installed.run("dalle1", "plan", "paper/12b", "--gpus", "1024", cwd=tmp_path)
    assert "1,024" in plan or "1024" in plan


def test_training_by_name(installed: Environment, tmp_path: Path) -> None:
    """`dalle1 train NAME` or `deepspeed --module dalle1.train NAME` that needs a checkout."""
    installed.run("dalle1", "train", "shapes/dvae", "run=one", *TINY, cwd=tmp_path)
    port = str(free_port())
    launcher = ("--num_accelerators", "1", "--master_port", port, "--module", "dalle1.train")
    installed.run("deepspeed", *launcher, "shapes/dvae", "run=two", *TINY, cwd=tmp_path)
    weights = [
        (tmp_path / run / "model" / "dvae.safetensors").read_bytes() for run in ("one", "two")
    ]
    assert weights[0] == weights[1]
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "data"}


def test_sampling(installed: Environment, model: Model, tmp_path: Path) -> None:
    """Images that need more than the wheel brings along, or that are others than the checkout's."""
    model.save(tmp_path / "model")
    few = ("--candidates", "4", "--keep", "2", "--model", "model")
    installed.run("dalle1", "sample", CAPTIONS[0], *few, cwd=tmp_path)
    expected = dalle1.sample(CAPTIONS[0], model, candidates=4, keep=2, progress=False)
    written = json.loads((tmp_path / "out" / "result.json").read_text())["results"][0]
    assert written["scores"] == pytest.approx(expected.scores[0].tolist(), abs=1e-5)
    for name, image in zip(written["files"], expected.images[0], strict=True):
        with Image.open(tmp_path / "out" / name) as found:
            assert found.tobytes() == image.tobytes()


def test_the_model_that_ships(installed: Environment, tmp_path: Path) -> None:
    """A model that the wheel has lost on the way, or an error of its own where there is none."""
    few = ("--candidates", "2", "--keep", "1")
    if models.DEFAULT in models.names():
        said = installed.run("dalle1", "sample", "a frog", *few, cwd=tmp_path)
        assert "model: emoji, which comes with dalle1." in said
        assert (tmp_path / "out" / "sheet.png").is_file()
    else:
        with pytest.raises(AssertionError, match="this installation has no model 'emoji'"):
            installed.run("dalle1", "sample", "a frog", *few, cwd=tmp_path)

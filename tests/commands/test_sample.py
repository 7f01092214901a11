"""`dalle1 sample` with the settings of an image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle1 import Model
from dalle1.commands.sample import main
from dalle1.common.png_settings import read_png_settings
from tests.conftest import ModelMaker

CAPTION = "a red cat"
DRAWN = ["--candidates", "6", "--keep", "3", "--seed", "4", "--temperature", "0.7", "--top-k", "4"]


@pytest.fixture
def folder(model: Model, tmp_path: Path) -> Path:
    """A model and images that it has drawn."""
    model.save(tmp_path / "model")
    assert draw(tmp_path, "out", CAPTION, *DRAWN) == 0
    return tmp_path


def draw(folder: Path, out: str, *arguments: str) -> int:
    return main([*arguments, "--model", str(folder / "model"), "--out", str(folder / out)])


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("0*.png"))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_like_draws_the_same(folder: Path) -> None:
    """A setting that is not written, or not read: other images, or other settings in them."""
    like = files(folder / "out")[1]
    assert draw(folder, "again", "--like", str(like)) == 0
    for before, after in zip(files(folder / "out"), files(folder / "again"), strict=True):
        assert before.name == after.name and before.read_bytes() == after.read_bytes()
    first, second = ((folder / name / "result.json").read_text() for name in ("out", "again"))
    assert first == second and json.loads(first)["settings"]["top_k"] == 4


def test_what_is_given_beside_like_counts(folder: Path) -> None:
    """Options that the file overrides, or that bring back the defaults of the others."""
    like = str(files(folder / "out")[0])
    assert draw(folder, "a", "--like", like, "a blue dog", "--seed", "0", "--keep", "2") == 0
    found = read_png_settings(files(folder / "a")[0])
    assert found is not None and found["caption"] == "a blue dog"
    names = ("seed", "keep", "candidates", "temperature", "top_k")
    assert [found[name] for name in names] == [0, 2, 6, 0.7, 4]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_redraw_draws_one_image_alone(folder: Path, place: int) -> None:
    """Another candidate than the file's, or all of them for the sake of one."""
    path = files(folder / "out")[place]
    assert draw(folder, "one", "--redraw", str(path)) == 0
    (again,) = files(folder / "one")
    assert np.abs(pixels(path) - pixels(again)).max() <= 1
    before, after = read_png_settings(path), read_png_settings(again)
    assert before is not None and after is not None
    assert after["candidates"] == after["keep"] == 1
    assert after["candidate"] == after["first_candidate"] == before["candidate"]
    assert after["score"] == pytest.approx(before["score"], abs=1e-5)


def test_another_model_is_told(
    folder: Path, make_model: ModelMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other images from another model without a word, or the same word for the same model."""
    like = str(files(folder / "out")[0])
    assert draw(folder, "a", "--like", like) == 0
    assert "drawn by another model" not in capsys.readouterr().err
    make_model(seed=1).save(folder / "model")
    assert draw(folder, "b", "--like", like) == 0
    assert "was drawn by another model" in capsys.readouterr().err


def test_a_completion_needs_its_image(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A completion drawn from nothing, as if it were the same."""
    image = files(folder / "out")[0]
    beginning = ["--image", str(image), "--rows", "2"]
    assert draw(folder, "whole", CAPTION, *DRAWN, *beginning) == 0
    like = files(folder / "whole")[0]
    settings = read_png_settings(like)
    assert settings is not None and settings["rows"] == 2 and settings["note"]
    capsys.readouterr()
    for option in ("--like", "--redraw"):
        assert draw(folder, "b", option, str(like)) == 2
        said = capsys.readouterr().err
        assert f"{option}: expected --image too" in said and "first 2 rows" in said
        assert draw(folder, "b", option, str(like), "--image", str(image)) == 0
    assert draw(folder, "c", "--like", str(like), "--rows", "0") == 0
    assert not (folder / "c" / "result.json.tmp").exists()


@pytest.mark.parametrize("option", ["--like", "--redraw"])
def test_files_without_settings(
    option: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Defaults drawn in place of settings that a file does not hold."""
    Image.new("RGB", (8, 8)).save(folder / "plain.png")
    (folder / "no.png").write_bytes(b"no image")
    for name, message in (
        ("plain.png", f"{option}: expected a PNG that dalle1 has saved"),
        ("no.png", "expected a PNG, got another kind"),
        ("gone.png", "cannot be read: No such file"),
    ):
        assert draw(folder, "a", option, str(folder / name)) == 2
        assert message in capsys.readouterr().err
    assert not (folder / "a").exists()
    assert draw(folder, "a") == 2
    assert "captions: expected at least one" in capsys.readouterr().err

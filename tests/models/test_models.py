"""Models that come with the library: a tiny one in their place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dalle1
from dalle1 import Model, models
from dalle1.commands import main as cli
from tests.conftest import CAPTIONS

FEW = {"candidates": 2, "keep": 1, "progress": False}


@pytest.fixture
def shipped(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation with one model; the working directory is an empty one."""
    folder = tmp_path / "installed"
    model.save(folder / models.DEFAULT)
    (folder / "__pycache__").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("DALLE1_MODEL", raising=False)
    monkeypatch.setattr(models, "folder", lambda: folder)
    return folder / models.DEFAULT


def test_the_default_model(
    shipped: Path, model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model than the one that comes along, or a user who is not told which; a line where a
    model was named."""
    expected = dalle1.sample(CAPTIONS[0], model, **FEW)
    assert capsys.readouterr().err == ""
    drawn = dalle1.sample(CAPTIONS[0], **FEW)
    assert torch.equal(drawn.tokens, expected.tokens)
    assert torch.equal(drawn.scores, expected.scores)
    told = "model: emoji, which comes with dalle1. Draws 8x8 images from captions of up to "
    told += "9 tokens.\n"
    assert capsys.readouterr().err == told
    dalle1.rank(CAPTIONS[0], drawn.images[0])
    assert capsys.readouterr().err == told
    dalle1.sample(CAPTIONS[0], "emoji", **FEW)
    monkeypatch.setenv("DALLE1_MODEL", "emoji")
    dalle1.sample(CAPTIONS[0], **FEW)
    assert capsys.readouterr().err == ""


def test_commands_take_it(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`dalle1 sample CAPTION` that asks for a folder; a name that is taken for a path."""
    few = ["--candidates", "2", "--keep", "1"]
    assert cli.main(["sample", CAPTIONS[0], *few]) == 0
    assert capsys.readouterr().err.startswith("model: emoji, which comes with dalle1. Draws ")
    assert cli.main(["sample", CAPTIONS[0], *few, "--model", "emoji"]) == 0
    assert cli.main(["rank", CAPTIONS[0], "out/sheet.png", "--model=emoji"]) == 0
    assert "which comes with" not in capsys.readouterr().err


def test_a_path_wins_over_a_name(shipped: Path, model: Model) -> None:
    """A user's own model that is passed over, or a folder of data that is taken for one."""
    assert models.find("emoji") == shipped and models.names() == ["emoji"]
    Path("emoji").mkdir()
    assert models.find("emoji") == shipped
    dalle1.load("emoji")
    model.save("emoji")
    assert models.find("emoji") == Path("emoji")
    for other in ("./emoji", "emoji/", "../emoji", "emojis", ""):
        assert models.find(other) == Path(other)
    with pytest.raises(ValueError, match="model: emojis is no folder, and no name of emoji; "):
        dalle1.load("emojis")


def test_without_a_model(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without models that fails with a path of its own."""
    monkeypatch.setattr(models, "folder", lambda: shipped)
    assert models.names() == []
    with pytest.raises(ValueError, match=r"^model: .* DALLE1_MODEL .* has no model 'emoji'"):
        dalle1.sample(CAPTIONS[0], **FEW)
    with pytest.raises(ValueError, match="model: emoji is no folder; training writes one"):
        dalle1.load("emoji")


@pytest.mark.parametrize(
    ("card", "sentence"),
    [
        ("# Title\n\nDraws emoji\nin color. And more.\n\nMore.", "Draws emoji in color."),
        ("---\nlicense: mit\n---\n\n# T\n\n![x](y.png)\n\nV1.5 draws.", "V1.5 draws."),
        ("# Title alone", ""),
    ],
)
def test_the_sentence_of_a_card(card: str, sentence: str, shipped: Path) -> None:
    """Metadata, a heading or a picture told in place of what the model is."""
    (shipped / "README.md").write_text(card, encoding="utf-8")
    assert models.about("emoji") == sentence

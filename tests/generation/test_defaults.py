"""What a model is drawn with where nobody says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dalle1
from dalle1 import Model
from dalle1.commands.sample import main
from dalle1.generation.defaults import SamplingDefaults, read_sampling
from dvae.storage import CONFIG
from tests.conftest import ModelMaker

CAPTION = "a red cat"
SETTINGS: dict[str, Any] = {"candidates": 6, "keep": 6, "seed": 2, "progress": False}
CALM = SamplingDefaults(temperature=0.5, guidance=2)


def drawn(model: Model, **settings: Any) -> list[list[int]]:
    """The tokens of the candidates, by their numbers."""
    result = dalle1.sample(CAPTION, model, **SETTINGS, **settings)
    order = result.candidate_numbers[0].argsort()
    return result.tokens[0][order].flatten(1).tolist()  # type: ignore[no-any-return]


@pytest.fixture
def model(make_model: ModelMaker) -> Model:
    """A model of its own, whose defaults may be changed."""
    return make_model()


def test_a_model_without_a_word_draws_as_the_paper(model: Model) -> None:
    """Images of every model that change with a new release."""
    plain = drawn(model)
    assert plain == drawn(model, temperature=1.0, guidance=1.0)
    assert plain != drawn(model, temperature=CALM.temperature, guidance=CALM.guidance)


def test_the_caller_wins(model: Model) -> None:
    """A model's own temperature that nobody can leave, or that takes the guidance along."""
    cases: list[dict[str, float]] = [
        {}, {"temperature": 1.0}, {"guidance": 1.0}, {"temperature": 0, "guidance": 0}
    ]  # fmt: skip
    expected = [drawn(model, **{**CALM.model_dump(), **case}) for case in cases]
    model.sampling = CALM
    assert [drawn(model, **case) for case in cases] == expected
    assert len({str(tokens) for tokens in expected}) == len(cases)
    assert drawn(model, temperature="own", guidance="own") == expected[0]
    with pytest.raises(ValueError, match="guidance: expected a number, got 'hot'"):
        drawn(model, guidance="hot")
    with pytest.raises(ValueError, match="temperature: expected a number >= 0, got -1"):
        dalle1.sample(CAPTION, "nowhere", temperature=-1)


def test_the_folder_keeps_them(model: Model, tmp_path: Path) -> None:
    """Defaults that are lost, or that stay behind when they are taken back."""
    model.sampling = CALM
    model.save(tmp_path)
    again = dalle1.load(tmp_path)
    assert again.sampling == CALM and drawn(again) == drawn(model)
    again.sampling = SamplingDefaults()
    again.save(tmp_path)
    assert "sampling" not in json.loads((tmp_path / CONFIG).read_text())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"temperature": -1}, r"sampling\.temperature: .*got -1"),
        ({"temperature": "hot"}, r"sampling\.temperature: .*got 'hot'"),
        ({"guidance": float("inf")}, r"sampling\.guidance: .*got inf"),
        ({"top_k": 3}, r"sampling\.top_k: .*got 3"),
        ([1], r"section 'sampling': expected an object, got \[1\]"),
    ],
)
def test_wrong_ones_are_told_of(
    model: Model, tmp_path: Path, section: object, message: str
) -> None:
    """A setting that nothing reads; a folder that fails in the middle of a drawing."""
    model.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "sampling": section}))
    with pytest.raises(ValueError, match=message):
        dalle1.load(tmp_path)


def test_folders_of_the_first_format(tmp_path: Path) -> None:
    """A section of no part that is given a kind, and refused for it."""
    (tmp_path / CONFIG).write_text('{"transformer": {}, "sampling": {"temperature": 0.5}}')
    assert read_sampling(tmp_path).temperature == 0.5


def test_the_command_and_its_files_have_them(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures of the command that are not those of `sample`; a file that says temperature 1."""
    model.sampling = CALM
    model.save(tmp_path / "model")
    asked = [CAPTION, "--model", str(tmp_path / "model"), "--candidates", "2", "--keep", "2"]
    assert main([*asked, "--out", str(tmp_path / "a"), "--device", "cpu"]) == 0
    (written,) = [json.loads((tmp_path / "a" / "result.json").read_text())]
    assert written["settings"]["temperature"] == 0.5 and written["settings"]["guidance"] == 2
    first = min((tmp_path / "a").rglob("*0*.png"))
    model.sampling = SamplingDefaults()
    model.save(tmp_path / "model")  # another default since then: the file's settings count
    again = ["--redraw", str(first), "--model", str(tmp_path / "model"), "--device", "cpu"]
    assert main([*again, "--out", str(tmp_path / "b")]) == 0
    (redrawn,) = (p for p in (tmp_path / "b").rglob("*.png") if p.name != "sheet.png")
    assert dalle1.rank(CAPTION, [first, redrawn], model).unique().numel() == 1

"""Warnings about captions that are cut: of the user's, once each, and of none of ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import dalle1
from dalle1 import Model
from dalle1.commands import main as cli
from dalle1.evaluation.candidates import model_fingerprint
from dalle1.evaluation.run import prepare, run
from dalle1.evaluation.shapes_report import sample_sheet
from tests.conftest import ModelMaker
from tests.evaluation.conftest import SettingsMaker

LONG = "a red dog on a mat " * 3
LONGER = "a blue dog on a mat " * 3


@contextmanager
def heard() -> Iterator[list[str]]:
    """All warnings of a block, those that Python would tell once too."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(w.message) for w in caught if "is cut" in str(w.message)]


def test_a_cut_caption_is_told_once(model: Model) -> None:
    """A warning for each time that a caption is encoded: to check it, to draw, to rank."""
    with heard() as messages:
        result = dalle1.sample([LONG, LONGER, "a cat"], model, 4, 2, batch_size=1, progress=False)
    assert len(messages) == 2 and "red" in messages[0] and "blue" in messages[1]
    with heard() as messages:
        dalle1.rank([LONG, "a cat"], result.images[0] + result.images[1], model)
    assert len(messages) == 1
    with heard() as messages:
        model.log_prob(LONG, result.tokens[0])
    assert len(messages) == 1
    with heard() as messages:  # and again where the user asks again
        dalle1.rank(LONG, torch.zeros(3, 3, 8, 8), model)
    assert len(messages) == 1


def test_a_text_that_is_refused_is_not_told_to_be_cut(model: Model) -> None:
    """A warning that says that a text is cut, and then an error that says that it is too long."""
    with heard() as messages, pytest.raises(ValueError, match="leave no room"):
        model.complete_caption(LONG)
    assert messages == []


def test_nothing_is_told_of_our_own_captions(
    make_model: ModelMaker, make_settings: SettingsMaker, tmp_path: Path
) -> None:
    """What a fingerprint, the demo's sheet or the built-in captions are cut to."""
    model = make_model(grid=16)  # 32 pixels, as the checker needs
    with heard() as messages:
        assert len(model.tokenizer.encode(["x" * 99])[0]) == 10
    assert len(messages) == 1  # they would be cut
    model.save(tmp_path / "shapes")
    settings = make_settings(
        data="shapes", captions=2, candidates=1, blur=[0], model=str(tmp_path / "shapes")
    )
    with heard() as messages:
        model_fingerprint(model)
        sample_sheet(model, [LONG, LONGER], candidates=2, keep=1)
        run(prepare(settings), settings)
    assert messages == []


def test_a_benchmark_tells_of_each_cut_caption_once(
    make_settings: SettingsMaker, tmp_path: Path
) -> None:
    """The same warning while captions are checked, drawn, scored and compared."""
    file = tmp_path / "list.txt"
    file.write_text(f"{LONG}\na cat\n{LONGER}\n", encoding="utf-8")
    settings = make_settings(data=str(file), candidates=2)
    with heard() as messages:
        prepared = prepare(settings)
    assert len(messages) == 2 and "red" in messages[0] and "blue" in messages[1]
    with heard() as messages:
        run(prepared, settings)
    assert messages == []


def test_a_command_tells_it_in_a_line(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line of our source under a warning that is meant for the user of a command."""
    model.save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        few = [f"--model={tmp_path}/model", "--candidates=2", "--keep=1", f"--out={tmp_path}/o"]
        assert cli.main(["sample", LONG, *few]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "is cut" in line]
    assert len(lines) == 1 and lines[0].startswith("warning: caption has ")

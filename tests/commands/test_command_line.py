"""What all commands share: exit statuses, warnings, help, the check for DeepSpeed."""

from __future__ import annotations

import errno
import sys
import warnings
from pathlib import Path

import pytest

from dalle1.commands import command_line, demo, evaluate, plan, train
from dalle1.commands.command_line import exit_status, make_parser

ROOT = Path(__file__).parents[2]


def raising(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("grid: expected 32, got 7"), 2, "error: grid: expected 32, got 7"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"),
            1,
            "error: [Errno 2] No such file or directory: 'a.txt'; try again",
        ),
        (OSError(errno.ENOSPC, "'runs' is full"), 1, "error: 'runs' is full; try again"),
        (KeyboardInterrupt(), 130, "stopped here"),
    ],
    ids=["mistake", "file", "full disk", "Ctrl-C"],
)
def test_exit_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback where one line says it, or a status that means something else to a script."""
    assert exit_status(lambda: raising(error), "stopped here", "; try again") == status
    assert capsys.readouterr().err == line + "\n"


def test_exit_status_of_the_command_itself() -> None:
    """A status that is lost, or a fault of the program that looks like a mistake of the user's."""
    assert exit_status(lambda: 75) == 75
    with pytest.raises(KeyError):
        exit_status(lambda: raising(KeyError("x")))


def test_renamed_setting_is_one_plain_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning with a line of our source in it, one that is swallowed, or one for all warnings."""
    config = tmp_path / "old.yaml"
    source = (ROOT / "configs" / "paper" / "12b.yaml").read_text()
    config.write_text(source.replace("optimizer:", "optimiser:"))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert plan.main([str(config), "--gpus", "128"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert set(said) == {
        "warning: setting 'optimiser' is called 'optimizer' now; the former name works for one "
        "more release"
    }
    usual = warnings.showwarning
    with pytest.warns(UserWarning, match="as usual"):
        exit_status(lambda: warnings.warn("as usual", stacklevel=1) or 0)
    assert warnings.showwarning is usual


@pytest.mark.parametrize("command", [train, evaluate, demo], ids=lambda module: module.__name__)
def test_without_deepspeed(
    command: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ModuleNotFoundError's traceback where DeepSpeed cannot be installed."""
    monkeypatch.setattr(command_line, "find_spec", lambda name: None)
    arguments = [] if command is demo else ["configs/shapes/dvae.yaml"]
    assert command.main(arguments) == 2  # type: ignore[attr-defined]
    said = capsys.readouterr().err
    assert said.startswith("error: deepspeed: expected to be installed") and "Linux" in said


def test_demo_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A demo that trains for a quarter of an hour and then cannot draw its report."""
    monkeypatch.setattr(demo, "run_together", lambda *arguments: pytest.fail("it began"))
    monkeypatch.setattr(demo, "with_built_in_data", lambda *arguments, **more: pytest.fail("data"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert demo.main(["--runs", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err == "error: plots need matplotlib: pip install 'dalle1[eval]'\n"


def test_help_shows_defaults_where_there_are_some(capsys: pytest.CaptureFixture[str]) -> None:
    """`(default: None)`, or a default of 0 that is left out."""
    parser = make_parser("verb", "What it does.\n\n    dalle1 verb FILE\n")
    parser.add_argument("file", help="read")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    parser.add_argument("--top-k", type=int, help="off where it is not given")
    parser.add_argument("--all", action="store_true", help="read all")
    parser.print_help()
    text = capsys.readouterr().out
    assert "of the random numbers (default: 0)" in text and text.count("default") == 1
    assert "What it does.\n\n    dalle1 verb FILE\n" in text

"""`dalle1 web`: what it listens on, and bad starts in one line."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from dalle1.commands import web
from tests.web.conftest import SECONDS


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line that a bad start ends with."""
    assert web.main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_the_address_is_one_of_this_machine() -> None:
    """An address that no browser opens, such as http://0.0.0.0."""
    pytest.importorskip("gradio")
    from dalle1.serving.api.server import bind
    from dalle1.web.server import address_of

    with bind("127.0.0.1", 0) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"
        assert address_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}/"
    with bind("0.0.0.0", 0) as bound:
        assert address_of(bound).startswith("http://127.0.0.1:")


def test_a_port_in_use(
    taken_port: int, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback after the models are loaded."""
    pytest.importorskip("gradio")
    line = complaint(capsys, "--model", str(model_folder), "--port", str(taken_port))
    assert "--port: " in line and str(taken_port) in line and "another" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "99999"], "--port"),
        (["--port", "-1"], "--port"),
        (["--host", "no such host"], "--host"),
        (["--host", "8.8.8.8"], "got 8.8.8.8"),
        (["--model", "/no/such/folder"], "is no folder"),
        (["--model", "=x"], "--model: expected NAME=FOLDER or FOLDER"),
        (["--batch-size", "0"], "--batch-size"),
        (["--max-pictures", "0"], "--max-pictures"),
    ],
)
def test_bad_starts_are_a_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback for a mistake of the user's."""
    pytest.importorskip("gradio")
    more = [] if "--port" in arguments else ["--port", "0"]
    line = complaint(capsys, *arguments, *more)
    assert line.startswith("error: ") and words in line


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback for a folder without a config."""
    pytest.importorskip("gradio")
    assert "config.json" in complaint(capsys, "--model", str(tmp_path), "--port", "0")


def test_two_models_of_one_name(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that another one hides."""
    pytest.importorskip("gradio")
    line = complaint(
        capsys, "--model", f"a={model_folder}", "--model", f"a={model_folder}", "--port", "0"
    )
    assert "'a' twice" in line and "NAME=FOLDER" in line


def test_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ModuleNotFoundError in front of somebody who has installed dalle1 alone."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = complaint(capsys, "--port", "0")
    assert "gradio" in line and "pip install 'dalle1[web]'" in line


def test_it_runs_until_ctrl_c(model_folder: Path) -> None:
    """A command that shows no address, ends at once, or does not end."""
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "dalle1", "web", "--port", "0", "--model", str(model_folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        line = run.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert found, line
        with urlopen(found[0], timeout=SECONDS) as answer:
            assert answer.status == 200
        run.send_signal(signal.SIGINT)
        assert run.wait(SECONDS) == 130
        assert run.stderr is not None and "Traceback" not in run.stderr.read()

"""`dalle1 serve` as a process: what it says when it starts badly, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from dalle1 import Model
from dalle1.commands import serve

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tiny" / "model"
    model.save(folder)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a bad start."""
    assert serve.main(list(arguments)) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and not told.out
    return told.err


def test_bad_starts(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    """A traceback, or a mistake that shows only after the models are read."""
    model = ("--model", str(folder), "--port", "0")
    assert "is no folder" in refused(capsys, "--port", "0", "--model", str(tmp_path / "none"))
    assert "config.json" in refused(capsys, "--port", "0", "--model", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port} (Address already in use)" in refused(
            capsys, "--model", str(tmp_path / "none"), "--port", port
        )
    assert "--host, --port: expected" in refused(capsys, *model, "--host", "no.such.host.invalid")
    assert "--port: expected 0 to 65535" in refused(capsys, *model, "--port", "99999")
    assert "'tiny' twice" in refused(capsys, *model, "--model", str(folder))
    assert "expected NAME=FOLDER" in refused(capsys, "--port", "0", "--model", "=x")
    assert "--key: expected a text" in refused(capsys, *model, "--key", " ")
    assert "--max-waiting" in refused(capsys, *model, "--max-waiting", "0")
    assert "--url-seconds" in refused(capsys, *model, "--url-seconds", "-1")


@pytest.mark.parametrize("package", serve.EXTRA)
def test_missing_packages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, package: str
) -> None:
    """A traceback for whoever has not installed the extra."""
    monkeypatch.setitem(sys.modules, package, None)
    told = refused(capsys, "--model", str(folder), "--port", "0")
    assert "pip install 'dalle1[serve]'" in told or "cannot be imported" in told


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_server_that_is_told_to_end(folder: Path, number: int, status: int) -> None:
    """A signal that leaves a process, a folder of images or a traceback behind."""
    command = [sys.executable, "-m", "dalle1.commands.serve", "--port", "0"]
    command += ["--model", f"mine={folder}", "--device", "cpu"]
    environment = {**os.environ, "DALLE1_KEY": "secret"}
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        line = process.stdout.readline()
        found = re.fullmatch(r"serving mine at (http://127\.0\.0\.1:\d+)/v1\n", line)
        assert found, (line, process.stderr.read() if process.poll() is not None else "")
        with urlopen(f"{found[1]}/health") as response:
            assert response.status == 200
        with pytest.raises(OSError, match="401"):  # the key of the environment counts
            urlopen(f"{found[1]}/v1/models")
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    assert "Traceback" not in err and out == ""

"""Processes side by side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dalle1.common.jobs import Job, run_together

# Runs until it is told to stop, and then saves.
PATIENT = """
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.5)
    pathlib.Path(sys.argv[2]).write_text("saved")
    sys.exit(int(sys.argv[3]))
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
pathlib.Path(sys.argv[1]).write_text("started")
time.sleep(600)
"""
FAILING = """
import pathlib, sys, time
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
print("why it failed")
sys.exit(3)
"""
PARENT = """
import pathlib, sys
from dalle1.common.jobs import Job, run_together
folder = pathlib.Path(sys.argv[1])
def job(name):
    files = [str(folder / f"{name}.{what}") for what in ("on", "off")]
    return Job(name, [sys.argv[2], *files, "0"])
try:
    run_together([job("a"), job("b")], {})
except KeyboardInterrupt:
    print([(folder / f"{name}.off").read_text() for name in "ab"])
"""


@pytest.fixture
def scripts(tmp_path: Path) -> dict[str, str]:
    found = {}
    for name, text in (("patient", PATIENT), ("failing", FAILING), ("parent", PARENT)):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        found[name] = str(tmp_path / f"{name}.py")
    return found


def test_jobs_have_logs_environments_and_times(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ranks that do not learn their number; two outputs in one; a time that is another's."""
    script = tmp_path / "say.py"
    script.write_text("import os; print('I am', os.environ['RANK'])", encoding="utf-8")
    logs = [tmp_path / "logs" / f"{i}.log" for i in range(2)]
    jobs = [Job(f"job {i}", [str(script)], logs[i], {"RANK": str(i)}) for i in range(2)]
    seconds: dict[str, float] = {}
    assert run_together(jobs, seconds) == 0
    assert set(seconds) == {"job 0", "job 1"} and min(seconds.values()) > 0
    assert logs[1].read_text(encoding="utf-8").strip() == "I am 1"
    printed = capfd.readouterr().out
    assert "I am 0" in printed and "I am 1" not in printed and str(logs[1]) in printed
    assert not logs[0].exists()  # the first one's output is here


def test_a_failure_stops_the_others(
    tmp_path: Path, scripts: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Minutes of a stage that nothing will read; a cause that lies in a log only; a stage that is
    killed before it has saved."""
    on, off = str(tmp_path / "on"), tmp_path / "off"
    jobs = [
        Job("patient", [scripts["patient"], on, str(off), "0"]),
        Job("failing", [scripts["failing"], on], tmp_path / "failing.log"),
    ]
    seconds: dict[str, float] = {}
    assert run_together(jobs, seconds) == 3
    assert set(seconds) == {"failing"} or seconds["failing"] < seconds["patient"]
    assert off.read_text(encoding="utf-8") == "saved"
    assert "why it failed" in capfd.readouterr().err


def test_a_job_that_is_killed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A status that no shell knows, and no word of a job that the kernel ended for its memory."""
    script = tmp_path / "killed.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", encoding="utf-8")
    assert run_together([Job("large", [str(script)])], {}) == 137
    assert "error: large was ended by SIGKILL" in capfd.readouterr().err


def test_a_job_that_cannot_start_stops_the_others(tmp_path: Path, scripts: dict[str, str]) -> None:
    """A stage that is left running, whose folder the next demo finds in use."""
    (tmp_path / "log").mkdir()  # a folder in the place of the second log
    on, off = tmp_path / "on", tmp_path / "off"
    first = Job("patient", [scripts["patient"], str(on), str(off), "0"])
    with pytest.raises(OSError):
        run_together([first, Job("second", [scripts["failing"], str(on)], tmp_path / "log")], {})
    # It may be ended before it has told how it wants to be.
    assert not on.exists() or off.exists()


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C reaches a group of processes on Unix")
def test_ctrl_c_waits_until_all_have_saved(tmp_path: Path, scripts: dict[str, str]) -> None:
    """A stage that is left running, or a prompt that is back before the checkpoint is there."""
    parent = subprocess.Popen(
        [sys.executable, scripts["parent"], str(tmp_path), scripts["patient"]],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    while not all((tmp_path / f"{name}.on").exists() for name in "ab"):
        assert parent.poll() is None
    os.killpg(parent.pid, signal.SIGINT)
    assert "['saved', 'saved']" in parent.communicate()[0]

"""The supervisor that starts a rank again, with programs of a few lines in the rank's place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dalle1.training import supervisor
from dalle1.training.supervisor import HEARTBEAT, Heartbeat, Supervisor

# From the file alone: the package around it brings torch, which takes seconds to import.
LOAD = f"import runpy; supervisor = runpy.run_path({supervisor.__file__!r})"
SUPERVISOR = f"""
import sys
{LOAD}
sys.exit(supervisor["Supervisor"]([sys.executable, *sys.argv[2:]], int(sys.argv[1])).run())
"""
# Notes each attempt's port and options, then ends with the next status of its list.
RANK = """
import os, sys
from pathlib import Path
log = Path(sys.argv[1])
lines = log.read_text().splitlines() if log.exists() else []
with log.open("a") as file:
    print(os.environ.get("MASTER_PORT"), *sys.argv[3:], file=file)
status = int(sys.argv[2].split(",")[len(lines)])
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def supervised(
    tmp_path: Path, statuses: str, times: int, port: str = "29600"
) -> tuple[int, list[str]]:
    rank, log = tmp_path / "rank.py", tmp_path / "log.txt"
    rank.write_text(RANK)
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISOR, str(times), str(rank), str(log), statuses],
        env={**os.environ, "MASTER_PORT": port},
        check=False,
    )
    return done.returncode, log.read_text().splitlines()


def test_starts_again_from_the_checkpoint(tmp_path: Path) -> None:
    """A run started from its beginning, or at a port where an old rank still listens."""
    status, attempts = supervised(tmp_path, "75,-9,0", 3)
    assert status == 0
    assert attempts == ["29600", "29601 --resume", "29602 --resume"]


@pytest.mark.parametrize(
    ("port", "later"),
    [("65534", ["65535", "1024"]), ("", ["", ""]), ("nonsense", ["nonsense", "nonsense"])],
)
def test_port_of_an_attempt(tmp_path: Path, port: str, later: list[str]) -> None:
    """A port above the last one, or a traceback for what a rank alone does not look at."""
    status, attempts = supervised(tmp_path, "75,75,0", 2, port)
    assert status == 0
    assert attempts == [port, *(f"{found} --resume" for found in later)]


@pytest.mark.parametrize(("statuses", "expected", "attempts"), [("2", 2, 1), ("75,1,1", 1, 3)])
def test_gives_up(tmp_path: Path, statuses: str, expected: int, attempts: int) -> None:
    """A mistake in the settings tried again and again; more restarts than were asked for."""
    status, found = supervised(tmp_path, statuses, 2)
    assert (status, len(found)) == (expected, attempts)


def test_hanging_rank_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stopped rank that its supervisor waits for without end."""
    program = f"{LOAD}; import time; supervisor['Heartbeat']().next_within(0.2); time.sleep(600)"
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    assert Supervisor([sys.executable, "-c", program], 0).run() == -signal.SIGKILL


def test_signal_reaches_the_rank_and_ends_it_all(tmp_path: Path) -> None:
    """A scheduler's warning that only the supervisor hears, or that is answered with a restart."""
    program = (
        "import signal, sys, time; from pathlib import Path;"
        "signal.signal(signal.SIGTERM, lambda *a: sys.exit(75));"
        f"Path({str(tmp_path / 'ready')!r}).touch(); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", SUPERVISOR, "3", "-c", program])
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 75


def test_no_supervisor_no_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without --restarts that writes into a stranger's file."""
    monkeypatch.delenv(HEARTBEAT, raising=False)
    Heartbeat().next_within(1)


def test_launcher_is_gone(tmp_path: Path) -> None:
    """A supervisor and a rank that outlive their launcher, and that nobody can stop."""
    rank = (
        "import signal, sys, time; from pathlib import Path;"
        "signal.signal(signal.SIGTERM, lambda *a: "
        f"(Path({str(tmp_path / 'stopped')!r}).touch(), sys.exit(0)));"
        f"Path({str(tmp_path / 'ready')!r}).touch(); time.sleep(600)"
    )
    launcher = (
        "import subprocess, sys, time;"
        f"subprocess.Popen([sys.executable, '-c', {SUPERVISOR!r}, '3', '-c', {rank!r}]);"
        "time.sleep(600)"
    )
    launched = subprocess.Popen([sys.executable, "-c", launcher])
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    launched.kill()
    launched.wait()
    while not (tmp_path / "stopped").exists():
        time.sleep(0.05)

"""Programs in Python as processes side by side, stopped together."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

POLL = 0.1  # seconds
LAST_LINES = 20  # of a log, shown when its job fails


@dataclass(frozen=True)
class Job:
    """A process to start."""

    name: str
    command: list[str]  # the arguments of Python: a script, or -m and a module, and theirs
    log: Path | None = None  # where its output goes; the first job's is shown
    environment: dict[str, str] = field(default_factory=dict)  # what it has besides ours


def run_together(jobs: list[Job], seconds: dict[str, float]) -> int:
    """Runs jobs at once, the first one's output here; the exit status of the first that failed.

    When one fails, the others are told to stop. Ctrl-C and SIGTERM reach all of them. However this
    ends, all are waited for, so that what they save is saved.

    Args:
        jobs: at least one.
        seconds: gets how long the last job of each name took.
    """
    start = time.monotonic()
    running: dict[subprocess.Popen[bytes], Job] = {}
    status = 0
    with _terminated_by_signal(running):
        try:
            for job in jobs:
                running[_start(job, job.log if running else None)] = job
            while running:
                time.sleep(POLL)
                for process in [p for p in running if p.poll() is not None]:
                    job = running.pop(process)
                    seconds[job.name] = time.monotonic() - start
                    if process.returncode and not status:
                        status = _failed(process.returncode, job, shown=job is jobs[0])
                        _terminate(running)
        except KeyboardInterrupt:
            raise  # it has reached them too
        except BaseException:
            _terminate(running)
            raise
        finally:
            _wait(running)
    return status


def _start(job: Job, log: Path | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, *job.command]
    to_log = f" > {shlex.quote(str(log))}" if log else ""
    print(f"\n$ python {shlex.join(job.command)}{to_log}", flush=True)
    environment = os.environ | job.environment
    if log is None:
        return subprocess.Popen(command, env=environment)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:  # the process keeps its own
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def _failed(returncode: int, job: Job, shown: bool) -> int:
    """The exit status of a job that failed, with the end of its output where it was not shown."""
    if not shown and job.log is not None:
        text = job.log.read_text(encoding="utf-8", errors="replace")
        lines = text.replace("\r", "\n").splitlines()
        print("\n".join(lines[-LAST_LINES:]), file=sys.stderr, flush=True)
    if returncode > 0:
        return returncode
    name = signal.Signals(-returncode).name  # such as of the kernel, when memory is short
    print(f"error: {job.name} was ended by {name}", file=sys.stderr, flush=True)
    return 128 - returncode


def _terminate(running: dict[subprocess.Popen[bytes], Job]) -> None:
    for process in running:
        process.terminate()


def _wait(running: dict[subprocess.Popen[bytes], Job]) -> None:
    """Until all have ended; a second Ctrl-C does not cut short what they save."""
    while running:
        try:
            next(iter(running)).wait()
            running.pop(next(iter(running)))
        except KeyboardInterrupt:
            continue


@contextmanager
def _terminated_by_signal(running: dict[subprocess.Popen[bytes], Job]) -> Iterator[None]:
    """In this block SIGTERM is handed on to the jobs, which save and end."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        _terminate(running)

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

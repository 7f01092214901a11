"""Commands of this checkout as processes side by side, stopped together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from dalle1.common.files import read_text

POLL = 0.1  # seconds
LAST_LINES = 20  # of a log, shown when its job fails


@dataclass(frozen=True)
class Job:
    """A process to start."""

    name: str
    command: list[str]  # a script and its arguments
    log: Path | None = None  # where its output goes when other jobs run beside it
    environment: dict[str, str] = field(default_factory=dict)  # what it has besides ours


def run_together(jobs: list[Job], seconds: dict[str, float]) -> int:
    """Runs jobs at once, the first one's output here; the exit status of the first that failed.

    When one fails, the others are told to stop. Ctrl-C reaches all of them, and all are waited
    for, so that what they save is saved.

    Args:
        jobs: at least one.
        seconds: gets how long each took, by its name.
    """
    start = time.monotonic()
    with ExitStack() as files:
        running: dict[subprocess.Popen[bytes], Job] = {}
        for i, job in enumerate(jobs):
            output = None
            print("\n$ python " + " ".join(job.command), end="", flush=True)
            if i and job.log is not None:
                job.log.parent.mkdir(parents=True, exist_ok=True)
                output = files.enter_context(job.log.open("wb"))
                print(f" > {job.log}", end="", flush=True)
            process = subprocess.Popen(
                [sys.executable, *job.command],
                env=os.environ | job.environment,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
            )
            running[process] = job
        print(flush=True)
        return _wait(running, start, seconds)


def _wait(
    running: dict[subprocess.Popen[bytes], Job], start: float, seconds: dict[str, float]
) -> int:
    """See `run_together`."""
    status = 0
    first = next(iter(running))
    try:
        while running:
            time.sleep(POLL)
            for process in [p for p in running if p.poll() is not None]:
                job = running.pop(process)
                seconds[job.name] = time.monotonic() - start
                if process.returncode and not status:
                    status = process.returncode
                    if process is not first and job.log is not None:
                        lines = read_text(job.log).replace("\r", "\n").splitlines()
                        print("\n".join(lines[-LAST_LINES:]), file=sys.stderr, flush=True)
                    for other in running:
                        other.terminate()
    except KeyboardInterrupt:
        for process in running:
            process.wait()
        raise
    return status

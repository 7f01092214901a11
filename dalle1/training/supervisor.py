"""Starts a failed rank again from its newest checkpoint, under any launcher.

The process that the launcher started is only a supervisor, and the rank is its child. When a rank
is lost, the others fail within the time-out, so all supervisors do the same: they start their rank
again with --resume. All count their attempts alike, and each attempt has a port of its own.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

HEARTBEAT = "DALLE1_HEARTBEAT"  # environment: file descriptor that a rank writes heartbeats to
ATTEMPT = "DALLE1_ATTEMPT"  # environment: how often the rank has been started before
FINAL = (0, 2, 130)  # trained or stopped by the scheduler; a mistake in the settings; Ctrl-C
POLL = 0.2  # seconds between two looks at the rank
LAST_PORT = 65535  # behind it come those from 1024 on, which any user may listen at
MARGIN = 1.5  # times what a rank announced, before it is taken to hang


def attempt() -> int:
    """How often a supervisor has started this rank before."""
    return int(os.environ.get(ATTEMPT, "0"))


def restarted() -> bool:
    """Whether a supervisor or torchrun has started this rank before."""
    return attempt() > 0 or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


class Heartbeat:
    """Tells the supervisor that this rank lives; does nothing where there is no supervisor."""

    def __init__(self) -> None:
        found = os.environ.get(HEARTBEAT)
        self._file = int(found) if found else None

    def next_within(self, seconds: float) -> None:
        """Sends a heartbeat, which promises the next one within so many seconds."""
        if self._file is not None:
            try:
                os.write(self._file, f"{seconds}\n".encode())
            except OSError:
                self._file = None  # the supervisor is gone, which `StopSignals` notices


class Supervisor:
    """Runs one rank, and runs it again at most `restarts` times."""

    def __init__(self, command: Sequence[str], restarts: int) -> None:
        """command: of the rank, with its options; --resume is added when it is started again."""
        self.command, self.restarts = list(command), restarts
        self._rank: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._launcher = os.getppid()

    def run(self) -> int:
        """Runs until the rank needs no other attempt, or none is left; the last exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._forward_signal)
        port = os.environ.get("MASTER_PORT", "")  # which a rank alone does not look at
        first = int(port) if port.isdecimal() else 0
        for attempt in range(self.restarts + 1):
            status = self._attempt(attempt, first)
            if status in FINAL or self._stopping or attempt == self.restarts:
                return status
            name = os.environ.get("RANK", "0")
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            print(
                f"rank {name} ended with {how}: restart {attempt + 1} of {self.restarts} from the "
                "newest checkpoint",
                file=sys.stderr,
            )
        raise AssertionError("the last attempt returns")

    def _attempt(self, attempt: int, first_port: int) -> int:
        reader, writer = os.pipe()
        environment = {**os.environ, HEARTBEAT: str(writer), ATTEMPT: str(attempt)}
        if first_port and attempt:
            port = first_port + attempt
            environment["MASTER_PORT"] = str(port if port <= LAST_PORT else port - LAST_PORT + 1023)
            environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # which is at the first port
        command = [*self.command, *(["--resume"] if attempt else [])]
        self._rank = subprocess.Popen(command, env=environment, pass_fds=[writer])
        os.close(writer)
        try:
            return self._wait(self._rank, reader)
        finally:
            os.close(reader)

    def _wait(self, rank: subprocess.Popen[bytes], reader: int) -> int:
        """The rank's exit status; kills it when its heartbeats do not come."""
        deadline = float("inf")
        while rank.poll() is None:
            if os.getppid() != self._launcher and not self._stopping:
                # The launcher is gone: nobody else would tell the rank to stop.
                self._forward_signal(signal.SIGTERM, None)
            ready, _, _ = select.select([reader], [], [], POLL)
            if ready:
                heartbeats = os.read(reader, 4096).split()
                if heartbeats:
                    deadline = time.monotonic() + MARGIN * float(heartbeats[-1])
                else:
                    time.sleep(POLL)  # the rank has closed its end, and is about to exit
            if time.monotonic() > deadline:
                print("the rank gives no sign of life and is killed", file=sys.stderr)
                rank.kill()
                deadline = float("inf")
        return rank.returncode

    def _forward_signal(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        if self._rank is not None and self._rank.poll() is None:
            self._rank.send_signal(number)

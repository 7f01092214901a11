"""Processes forked from a server that has imported everything, in place of cold ones.

A process that starts from nothing imports torch and DeepSpeed for seconds, longer than a tiny run
trains. The server imports them once for all tests of this process and forks for each job: what a
job does to the state of torch, DeepSpeed or the process ends with it. The server itself runs no
tensor operation and has one thread, so that its forks are sound.

Forked processes share the hash seed and the addresses of what was imported. A mistake that could
hide in these (an order of a set that decides what is drawn) needs one cold process in its test.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
NAMESPACES = ("net", "uts", "ipc")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "tests.training.worker",
        "dalle1.training.trainer",
        # What torch, DeepSpeed and the library import late, in about two seconds.
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "deepspeed.ops.op_builder.all_ops",
        "deepspeed.module_inject.auto_ep_presets.registry",
        "torch.utils.tensorboard",
        "PIL.PngImagePlugin",
        "PIL.JpegImagePlugin",
    ]
)


class Forked:
    """A function called in a process of its own, with the methods of a Popen.

    Its exit status is what the function returns (None: 0), as for the `main` of a command.
    """

    def __init__(
        self,
        function: Callable[..., int | None],
        *arguments: object,
        log: Path,
        environment: Mapping[str, str] | None = None,
        session: bool = False,
        host: int | None = None,
    ) -> None:
        """log: takes what it prints, behind what is there; session: makes it the first process of
        a process group, for `os.killpg`; host: a process whose network and name it
        takes as its own, but not its files and process numbers."""
        given = (dict(os.environ | (environment or {})), str(log), session, host)
        self._process = FORKS.Process(target=_begin, args=(function, arguments, *given))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _begin(
    function: Callable[..., int | None],
    arguments: Sequence[object],
    environment: Mapping[str, str],
    log: str,
    session: bool,
    host: int | None,
) -> None:
    if host is not None:
        _enter(host)
    multiprocessing.set_start_method(None, force=True)  # Python's default, for data workers
    if session:
        os.setsid()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    np.random.seed()  # as a cold process has it; Python's own generator does so by itself
    sys.exit(function(*arguments))


def _enter(host: int) -> None:
    """Takes the namespaces of a process; Linux and root only."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in NAMESPACES:
        with open(f"/proc/{host}/ns/{kind}", "rb") as space:
            if libc.setns(space.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"namespace {kind} of process {host}")

"""Processes that read data ahead say nothing of their own when their rank is stopped."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A rank that is stopped while it takes a tensor: it asks for the file descriptor, and hangs up.
HANGING_UP = """
import os, time
from multiprocessing.connection import Client
from multiprocessing.process import current_process
from multiprocessing.reduction import DupFd
from multiprocessing.resource_sharer import _resource_sharer
from dalle1.data.shards.workers import prepare_worker
prepare_worker(0)
shared = DupFd(os.open(os.devnull, os.O_RDONLY))
address, key = shared._id
taker = Client(address, authkey=bytes(current_process().authkey))
REQUEST
taker.close()
time.sleep(0.5)
"""


@pytest.mark.parametrize("request_", ["taker.send((key, os.getpid()))", ""])
def test_a_stopped_rank_leaves_no_traceback(request_: str) -> None:
    """Ctrl-C at a moment of some microseconds printed a worker's BrokenPipeError below the last
    line, which says how to go on."""
    program = HANGING_UP.replace("REQUEST", request_)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_other_errors_of_threads_are_told() -> None:
    """A hook that swallows every error would hide what is broken."""
    program = (
        "import threading\nfrom dalle1.data.shards.workers import prepare_worker\n"
        "prepare_worker(0)\n[][1]"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 1 and "IndexError" in run.stderr

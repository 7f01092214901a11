"""What a launcher tells this process through its environment: which rank it is, of how many.

Nothing of ours stays in `os.environ`, which the commands that this process starts inherit: what
DeepSpeed must find there is set for the time of a call.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MEETING = ("MASTER_ADDR", "MASTER_PORT")  # where ranks that exchange something meet
MAX_WORLD_SIZE = 1_000_000
ALONE = "unset RANK, WORLD_SIZE and LOCAL_RANK to run alone"
# Who starts several tasks without telling them what we read: the variables of their number and of
# a task's own. SLURM_NTASKS is the job's, whose batch script runs once all the same.
TASKS = (
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpiexec", "PMI_SIZE", "PMI_RANK"),
    ("mpiexec", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


@dataclass(frozen=True)
class Launch:
    """The place of this process among those of a run; that of a process alone by default."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among those of this machine
    address: str = ""  # where the ranks meet, with the port
    launched: bool = False  # by a launcher


def read_launch(meets: bool = True) -> Launch:
    """The place that a launcher gave to this process; a process alone where there was none.

    Args:
        meets: whether the ranks exchange something; else they need not say where they meet, nor
            their place on the machine.

    Raises:
        ValueError: some variables are missing, no numbers or do not fit one another, or several
            tasks were started without them.
    """
    deciding = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = [name for name in deciding if name in os.environ]
    if not found:
        _check_one_task()
        return Launch()
    needed = (*deciding, *MEETING) if meets else deciding[:2]
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: expected from a launcher, since {', '.join(found)} is set, got "
            f"none; start with `deepspeed` or `torchrun`, which set all, or {ALONE}"
        )
    world_size = _number("WORLD_SIZE", 1, MAX_WORLD_SIZE)
    rank = _number("RANK", 0, world_size - 1, f" below WORLD_SIZE={world_size}")
    local_rank = 0
    if "LOCAL_RANK" in os.environ:
        local_rank = _number("LOCAL_RANK", 0, world_size - 1, f" below WORLD_SIZE={world_size}")
    address = _address() if meets else ""
    return Launch(rank, world_size, local_rank, address, True)


def _address() -> str:
    """MASTER_ADDR with MASTER_PORT."""
    host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 1, 65535)
    # A port behind the name, or an address of the web, is looked up in vain for minutes.
    if not host or re.search(r"[\s/]|^[^:]*:\d+$", host):
        raise ValueError(
            f"MASTER_ADDR: expected the name or address of the first machine, got {host!r}; its "
            f"port is MASTER_PORT. Start with `deepspeed` or `torchrun`, or {ALONE}"
        )
    return f"{host}:{port}"


def _number(name: str, low: int, high: int, why: str = "") -> int:
    text = os.environ[name]
    number = _integer(text)
    if not low <= number <= high:
        raise ValueError(
            f"{name}: expected a number from {low} to {high}{why}, got {text!r}; start with "
            f"`deepspeed` or `torchrun`, which set it, or {ALONE}"
        )
    return number


def _integer(text: str) -> int:
    """The number that a text says; -1 where it says none that is sensible here."""
    return int(text) if re.fullmatch(r"\s*[0-9]{1,9}\s*", text) else -1


def _check_one_task() -> None:
    """Raises ValueError where others like this process were started and none has a rank."""
    for starter, size, own in TASKS:
        several = _integer(os.environ.get(size, "")) > 1
        if several or _integer(os.environ.get(own, "")) > 0:
            name = size if several else own
            raise ValueError(
                f"RANK: expected from a launcher, got none, though {starter} has started several "
                f"tasks ({name}={os.environ[name]}), each of which would run alone; start one "
                "task, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in each "
                "as launch/cluster/train.slurm does"
            )


@contextmanager
def environment(**variables: str | None) -> Iterator[None]:
    """Sets variables of this process, or unsets those given as None, for this block alone."""
    before = {name: os.environ.get(name) for name in variables}
    try:
        _set(variables)
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def deepspeed_environment() -> Iterator[None]:
    """In this block DeepSpeed finds the LOCAL_RANK that it asks for, in a process alone too, and
    not the one of mpirun, which it compares."""
    local_rank = os.environ.get("LOCAL_RANK", "0")
    with environment(LOCAL_RANK=local_rank, OMPI_COMM_WORLD_LOCAL_RANK=None):
        yield

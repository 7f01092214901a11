"""What the device is called, how fast it can be, and how much memory was used of it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import psutil
import torch

# FLOP/s of dense 16-bit matrix products, from the makers' data sheets, by a part of the device's
# name. Those that come in several forms are given as the SXM boards.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "V100": 125e12,
}


class _Cgroup(NamedTuple):
    """Names of a version of Linux's control groups: in the kernel's lists, and of its files."""

    controller: str  # in /proc/self/cgroup; version 2 has none
    filesystem: str  # in /proc/self/mountinfo
    mount: str  # where it is mounted, if not told otherwise
    limit: str
    usage: str
    inactive: str  # in memory.stat: files that the kernel drops when memory gets short


CGROUPS = (
    _Cgroup("", "cgroup2", "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    _Cgroup(
        "memory",
        "cgroup",
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)

DTypeName = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(DTypeName)}


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_count() -> int:
    """Cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


@contextmanager
def released_threads() -> Iterator[int]:
    """In this context the thread computes alone, so that the cores are another one's; gives how
    many threads it had.

    For a process whose models are drawn from by a thread of their own. Each thread that computes
    has OpenMP threads of its own. Where there are more of them than cores, also idle ones, OpenMP
    lets all of them sleep between two operations, and a step of a small model takes twice as long.
    Enter it before anything is computed: threads that are there stay.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, which is faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    found = torch.cpu.get_capabilities()
    return any(bool(found.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def largest_float(device: torch.device) -> torch.dtype:
    """float64 where the device has it, else float32: Apple's GPUs (mps) have none."""
    if device.type == "mps":
        return torch.float32
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return torch.float32
    return torch.float64


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def known_peak(device: torch.device) -> float | None:
    """FLOP/s of a GPU's dense 16-bit products; None where they are not known."""
    if device.type != "cuda":
        return None
    name = device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def peak_memory(device: torch.device, children: bool = False) -> int:
    """Bytes that were used at most since the start of the process.

    Of a GPU: what torch allocated there, since `torch.cuda.reset_peak_memory_stats` if that was
    called. Of the CPU: the resident memory of this process.

    Args:
        device: the device whose memory is meant.
        children: of the CPU, the largest of this process and of the children that have ended.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":  # which keeps no record of children
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # of Unix alone

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if children:
        usage = max(usage, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    return usage if sys.platform == "darwin" else 1024 * usage


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of the CPU's memory that this process can still take without swapping.

    What the machine has, or what the container's limit leaves if that is less. A container is
    stopped at its limit, however much the machine has.

    Args:
        root: where /proc and /sys lie.
    """
    return max(0, min([int(psutil.virtual_memory().available), *_below_limits(root)]))


def _below_limits(root: Path) -> Iterator[int]:
    """Bytes that each limit of a control group of this process leaves: its own group's and those
    of the groups around it, of which any may be the smallest."""
    for cgroup in CGROUPS:
        for group in _own_groups(root, cgroup):
            with suppress(OSError, ValueError):  # no limit, or none that is told
                limit = int(_read(group / cgroup.limit))  # "max": no number
                used = int(_read(group / cgroup.usage)) - _inactive(group, cgroup.inactive)
                yield limit - max(0, used)


def _inactive(group: Path, name: str) -> int:
    """Bytes of files that count as used, and are dropped for whoever needs the memory."""
    with suppress(OSError, ValueError):
        found = re.search(rf"^{name} (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0


def _own_groups(root: Path, cgroup: _Cgroup) -> Iterator[Path]:
    """Folders of this process's control group and of those around it, as far as they are seen."""
    path = Path(_own_path(root, cgroup.controller))
    top, mount = _mount(root, cgroup)
    # A container sees its own group alone, under the name that the machine has for it or as "/".
    inside = path.relative_to(top) if path.is_relative_to(top) else Path()
    if ".." in inside.parts:
        inside = Path()
    for part in (inside, *inside.parents):
        yield mount / part


def _own_path(root: Path, controller: str) -> str:
    """The path of this process's control group; "/" where it is not told."""
    with suppress(OSError):
        for line in _read(root / "proc/self/cgroup").splitlines():
            _, _, rest = line.partition(":")  # behind a number
            controllers, _, path = rest.partition(":")
            if path and controller in controllers.split(","):
                return path
    return "/"


def _mount(root: Path, cgroup: _Cgroup) -> tuple[str, Path]:
    """The control group that is mounted, and where."""
    with suppress(OSError):
        for line in _read(root / "proc/self/mountinfo").splitlines():
            # ID, parent's ID, device, root, mount point, options ... - type, source, options
            before, _, after = line.partition(" - ")
            fields, kind = before.split(), after.split()
            if len(fields) < 5 or not kind or kind[0] != cgroup.filesystem:
                continue
            if not cgroup.controller or cgroup.controller in kind[-1].split(","):
                # A blank in a name is written as \040.
                top, mount = (
                    re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
                    for field in fields[3:5]
                )
                return top, root / mount.lstrip("/")
    return "/", root / cgroup.mount.lstrip("/")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")

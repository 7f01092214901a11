"""Peaks by a device's name, names of types, peak memory, free memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dalle1.common import hardware
from dalle1.common.hardware import DTYPES, PEAKS, available_memory, known_peak, peak_memory
from dalle1.generation import batches

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_peak_of_a_gpu(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An MFU by another board's peak, or in TFLOP/s where FLOP/s are meant."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert known_peak(GPU) == peak
    assert known_peak(CPU) is None
    assert all(1e14 < value < 1e16 for value in PEAKS.values())


def test_types_by_name() -> None:
    """A name in settings that stands for another type."""
    assert {str(dtype) for dtype in DTYPES.values()} == {f"torch.{name}" for name in DTYPES}


def test_peak_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kilobytes taken for bytes on Linux, bytes for kilobytes on macOS."""
    used = peak_memory(CPU)
    assert used >= 50e6  # torch is loaded
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(hardware.sys, "platform", "darwin")
    assert peak_memory(CPU) >= largest and peak_memory(CPU) < used


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_bf16": False, "avx512_f": True}, False),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True}, False),
    ],
)
def test_bfloat16_in_hardware(
    capabilities: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 where torch emulates it, slower than float32; or none where there is an instruction
    for it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert hardware.has_bfloat16(CPU) is expected
    assert hardware.has_bfloat16(torch.device("meta")) is False
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert hardware.has_bfloat16(torch.device("cuda")) is False


def test_cores_that_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads for all cores of a machine, of which this process may use a few (`taskset`)."""
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert hardware.cpu_count() == 3


def test_peak_memory_of_children() -> None:
    """A demo whose stages, processes of their own, are left out of its memory."""
    code = (
        "import subprocess, sys, torch\n"
        "from dalle1.common.hardware import peak_memory\n"
        "device = torch.device('cpu')\n"
        "before = peak_memory(device)\n"
        "subprocess.run([sys.executable, '-c', 'x = bytes(range(256)) * 2**22'], check=True)\n"
        "print(before, peak_memory(device), peak_memory(device, children=True))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, alone, all_ = map(int, done.stdout.split())
    assert alone < before + 2**28 and all_ >= 2**30


GB = 10**9
HOST = 64 * GB  # what the machine has free
V2 = "34 24 0:30 {top} {mount} rw,nosuid shared:9 - cgroup2 cgroup rw,nsdelegate\n"
V1 = (
    "33 31 0:31 {top} /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "35 31 0:32 {top} {mount} rw,relatime - cgroup cgroup rw,memory\n"
)
NAMES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
MOUNTS = {2: "/sys/fs/cgroup", 1: "/sys/fs/cgroup/memory"}


class Machine:
    """Made-up /proc and /sys of a process in control groups."""

    def __init__(
        self, root: Path, version: int, own: str, top: str = "/", mount: str | None = None
    ) -> None:
        """own: the path in /proc/self/cgroup; top: of the group that is mounted."""
        self.root, self.names = root, NAMES[version]
        self.mount = mount or MOUNTS[version]
        lines = {2: f"0::{own}\n", 1: f"5:cpu,cpuacct:/other\n4:memory:{own}\n0::/\n"}
        self.write("proc/self/cgroup", lines[version])
        written = self.mount.replace(" ", "\\040")
        table = {2: V2, 1: V1}[version].format(top=top, mount=written)
        self.write("proc/self/mountinfo", "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + table)

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def group(self, path: str, limit: object, usage: object = None, inactive: int = 0) -> Machine:
        """A control group with these files, below the mount."""
        limits, usages, name = self.names
        place = f"{self.mount}/{path}".lstrip("/")
        self.write(f"{place}/{limits}", f"{limit}\n")
        if usage is not None:
            self.write(f"{place}/{usages}", f"{usage}\n")
            stat = f"anon 5\nfile 7\n{name}_dirty 9\n{name} {inactive}\nactive_file 11\n"
            self.write(f"{place}/memory.stat", stat)
        return self


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SimpleNamespace(available=HOST)
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: machine)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_container(version: int, tmp_path: Path) -> None:
    """Memory of a machine of hundreds of GB handed out in a container of 8, which is then killed;
    files that the kernel would drop counted as taken."""
    own = Machine(tmp_path / "a", version, "/")
    assert available_memory(own.group("", 8 * GB, 3 * GB).root) == 5 * GB
    assert available_memory(own.group("", 8 * GB, 3 * GB, 2 * GB).root) == 7 * GB
    assert available_memory(own.group("", 8 * GB, 9 * GB).root) == 0
    assert available_memory(own.group("", 8 * GB, 2 * GB, 3 * GB).root) == 8 * GB
    assert available_memory(own.group("", 100 * GB, 3 * GB).root) == HOST
    # The machine's name for the container, of which it sees its own group alone.
    named = Machine(tmp_path / "b", version, "/docker/4f2a", top="/docker/4f2a")
    assert available_memory(named.group("", 8 * GB, 3 * GB).root) == 5 * GB
    moved = Machine(tmp_path / "c", version, "/../../kubepods/pod1")
    assert available_memory(moved.group("", 8 * GB, 3 * GB).root) == 5 * GB
    elsewhere = Machine(tmp_path / "d", version, "/job_7", mount="/mnt/control groups")
    assert available_memory(elsewhere.group("job_7", 8 * GB, 3 * GB).root) == 5 * GB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("smallest", ["", "kubepods", "kubepods/pod1", "kubepods/pod1/c"])
def test_any_group_around_limits(version: int, smallest: str, tmp_path: Path) -> None:
    """The own group's limit alone, where the pod's or the job's is less."""
    machine = Machine(tmp_path, version, "/kubepods/pod1/c")
    for path in ("", "kubepods", "kubepods/pod1", "kubepods/pod1/c"):
        machine.group(path, (8 if path == smallest else 32) * GB, 3 * GB, GB)
    machine.group("kubepods/pod2", GB, GB)  # not ours
    assert available_memory(tmp_path) == 6 * GB


@pytest.mark.parametrize("version", [1, 2])
def test_limits_that_are_none(version: int, tmp_path: Path) -> None:
    """An error, or no memory at all, where there is no limit or its files are not to be read."""
    assert available_memory(tmp_path) == HOST  # no files, as on macOS
    own = Machine(tmp_path, version, "/a/b")
    assert available_memory(tmp_path) == HOST
    for limit in ("max", 2**63 - 4096, "", "-1 ?"):
        assert available_memory(own.group("a/b", limit, 3 * GB).root) == HOST
    assert available_memory(own.group("a", 8 * GB).root) == HOST  # usage is not told
    assert available_memory(own.group("a", 8 * GB, GB).root) == 7 * GB
    for name in ("proc/self/mountinfo", "proc/self/cgroup"):
        for text in ("", "4\n::\nx - \n7 - cgroup\n\udcff".encode("utf-8", "surrogateescape")):
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
            assert available_memory(tmp_path) in (HOST, 7 * GB)
    own.group("", 4 * GB, GB)  # all that is known without /proc
    (tmp_path / "proc/self/mountinfo").unlink()
    (tmp_path / "proc/self/cgroup").unlink()
    assert available_memory(tmp_path) == 3 * GB


def test_both_versions_at_once(tmp_path: Path) -> None:
    """A hybrid system, whose memory is still in version 1."""
    Machine(tmp_path, 2, "/", mount="/sys/fs/cgroup/unified")
    second = (tmp_path / "proc/self/mountinfo").read_text()
    one = Machine(tmp_path, 1, "/job").group("job", 8 * GB, 3 * GB)
    one.write("proc/self/mountinfo", second + (tmp_path / "proc/self/mountinfo").read_text())
    assert available_memory(tmp_path) == 5 * GB


def test_all_ask_for_the_containers_memory() -> None:
    """A reader of the machine's free memory, which a container does not have."""
    root = Path(hardware.__file__).parents[1]
    asking = [p.name for p in root.rglob("*.py") if "virtual_memory" in p.read_text("utf-8")]
    assert asking == ["hardware.py"]
    assert batches.free_memory(CPU) == available_memory() <= HOST

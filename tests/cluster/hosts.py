"""Several hosts on one Linux machine, for tests over more than one of them.

A host is a process with network, UTS, mount, PID and IPC namespaces of its own: an address, a name,
an sshd, a /dev/shm, and no sight of the processes of another. A bridge in a network namespace of
its own joins the hosts. It has no way out, so nothing leaves the machine, and two clusters may use
the same addresses. No namespace has a name: all are gone with the processes in them, which end
with the test's process, however that ends.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

ROOT = Path(__file__).parents[2]
TOOLS = ("ip", "tc", "nsenter", "unshare", "setpriv", "setsid", "ssh", "ssh-keygen", "sshd", "pdsh")

# All that a host needs of the kernel, tried in namespaces that end with it.
PROBE = """
mount -t proc proc /proc && mount -t sysfs sysfs /sys && mount -t tmpfs tmpfs /dev/shm &&
ip link add br0 type bridge && ip link add v0 type veth peer name v1 &&
tc qdisc add dev v0 root tbf rate 1mbit burst 256kb latency 100ms
"""

# PID 1 of a host. The private /run also hides the sockets by which names are looked up outside.
INIT = """
set -e
folder=$1 name=$2 sshd=$3
echo "$name" > /proc/sys/kernel/hostname
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/shadow" /etc/shadow
mount --bind "$folder/ssh_config" /etc/ssh/ssh_config
exec "$sshd" -D -e -f "$folder/sshd_config"
"""

# One key is the hosts' and the user's.
SSHD_CONFIG = """\
AddressFamily inet
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
UseDNS no
PidFile none
"""

# Patient keep-alives: shorter than the ranks' time-out, they end jobs that an outage would spare.
SSH_CONFIG = """\
Host *
    IdentityFile {folder}/key
    UserKnownHostsFile {folder}/known_hosts
    BatchMode yes
    ServerAliveInterval 5
    ServerAliveCountMax 6
"""


@functools.cache
def missing() -> str | None:
    """Why there can be no hosts on this machine; none: there can."""
    if sys.platform != "linux":
        return "hosts are made of Linux namespaces"
    if os.geteuid() != 0:
        return "hosts need root"
    for tool in TOOLS:
        if shutil.which(tool) is None:
            return f"{tool} is not installed (iproute2, util-linux, openssh-server, pdsh)"
    if os.path.exists("/dev/nvidia0"):
        return "ranks would take the GPU, and hosts cannot share it"
    kinds = ("--net", "--uts", "--mount", "--pid", "--ipc")
    probe = ["unshare", *kinds, "--fork", "--kill-child", "sh", "-c", PROBE]
    done = subprocess.run(probe, capture_output=True, text=True, encoding="utf-8", timeout=60)
    return f"namespaces are not permitted: {done.stderr.strip()}" if done.returncode else None


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> float:
    """Seconds until the condition held; TimeoutError when it does not in time."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            raise TimeoutError(f"no {what} within {seconds:g} s")
        time.sleep(0.02)
    return time.monotonic() - start


class _Namespaces:
    """A process, PID 1 of new namespaces that end with it."""

    def __init__(self, kinds: Sequence[str], command: Sequence[str], log: Path) -> None:
        unshare = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--pid", *kinds]
        self._log = log
        with log.open("w", encoding="utf-8") as file:
            self._unshare = subprocess.Popen(
                [*unshare, "--fork", "--kill-child", *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # out of reach of the terminal's Ctrl-C
            )
        self.pid = 0
        try:
            wait_for(self._born, 10, f"namespaces, see {log}")
        except BaseException:
            self._unshare.kill()
            self._unshare.wait()
            raise

    def _born(self) -> bool:
        if not self.alive():
            raise RuntimeError(
                f"namespaces ended at once: {self._log.read_text(encoding='utf-8')[-1000:]}"
            )
        for child in psutil.Process(self._unshare.pid).children():
            self.pid = child.pid
        return self.pid != 0

    def alive(self) -> bool:
        """Whether PID 1 is there."""
        return self._unshare.poll() is None

    def network(self, *command: str) -> None:
        """Runs a command of the machine's in this network namespace."""
        subprocess.run(["nsenter", "-t", str(self.pid), "-n", *command], check=True)

    def end(self) -> None:
        """Ends PID 1, and with it all in its namespaces, before it returns."""
        if self.alive():  # its number is not another process's yet
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._unshare.wait()


class Host(_Namespaces):
    """One host, joined to a bridge; `Cluster` makes them.

    `end` is the end of all its processes, whose connections are then closed in good order. A loss
    of power is not: `cut` first.
    """

    def __init__(
        self, number: int, switch: _Namespaces, folder: Path, environment: dict[str, str]
    ) -> None:
        self.name = f"h{number}"
        self.address = f"10.231.0.{number}"
        self._switch, self._port = switch, f"p{number}"
        self._environment = environment
        self._started: list[subprocess.Popen[str]] = []
        init = ["sh", "-c", INIT, "init", str(folder), self.name, shutil.which("sshd") or "sshd"]
        super().__init__(["--uts", "--mount", "--ipc"], init, folder / f"{self.name}.log")
        try:
            self._join()
        except BaseException:
            self.end()
            raise

    def _join(self) -> None:
        pair = ["ip", "link", "add", self._port, "type", "veth", "peer", "name", "eth0"]
        self._switch.network(*pair, "netns", str(self.pid))
        self._switch.network("ip", "link", "set", self._port, "master", "br0", "up")
        self.network("ip", "link", "set", "lo", "up")
        self.network("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        self.network("ip", "link", "set", "eth0", "up")

    def listens(self) -> bool:
        """Whether its sshd takes connections; RuntimeError when it has ended."""
        if not self.alive():
            raise RuntimeError(
                f"{self.name} has ended: {self._log.read_text(encoding='utf-8')[-1000:]}"
            )
        return "Server listening" in self._log.read_text(encoding="utf-8")

    def start(
        self, command: Sequence[str], cwd: Path, env: dict[str, str] | None, log: Path
    ) -> subprocess.Popen[str]:
        """Starts a command on this host, its output in a file.

        The process returned stands outside and ends as the command does; signals do not pass
        through it. To end the command, take `kill`, or `processes` and the number.
        """
        with log.open("w", encoding="utf-8") as file:
            return self._popen(command, cwd, env, file, subprocess.STDOUT)

    def run(
        self,
        command: Sequence[str],
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on this host; subprocess.TimeoutExpired when it is not done in time."""
        process = self._popen(command, cwd, env, subprocess.PIPE, subprocess.PIPE)
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            kill(process)
            process.communicate()
            raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def _popen(
        self,
        command: Sequence[str],
        cwd: Path,
        env: dict[str, str] | None,
        stdout: int | IO[str],
        stderr: int | IO[str],
    ) -> subprocess.Popen[str]:
        enter = ["nsenter", "-t", str(self.pid), "-n", "-u", "-m", "-p", "-i"]
        # The working directory is lost on the way in. A session of its own, for `kill`.
        change = ["setsid", "sh", "-c", 'cd "$0" && exec "$@"', str(cwd)]
        process = subprocess.Popen(
            [*enter, *change, *command],
            env=os.environ | self._environment | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def processes(self, pattern: str) -> list[int]:
        """Processes of this host, by their numbers outside of it, so that they can be signalled,
        whose command line contains the pattern."""
        own = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        found = []
        for pid in psutil.pids():
            with suppress(OSError):  # ended meanwhile
                if os.stat(f"/proc/{pid}/ns/pid").st_ino == own:
                    line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                    if line and pattern.encode() in line:  # a zombie's is empty
                        found.append(pid)
        return found

    def ranks(self) -> list[int]:
        """The ranks that a launcher started here, without what they fork."""
        found = self.processes("--local_rank=")  # in no command line but a rank's and its forks'
        ranks = []
        for pid in found:
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).ppid() not in found:
                    ranks.append(pid)
        return ranks

    def cut(self) -> None:
        """Takes the link down at the bridge: the host itself sees no more than a silence."""
        self._switch.network("ip", "link", "set", self._port, "down")

    def heal(self) -> None:
        """Takes the link up again."""
        self._switch.network("ip", "link", "set", self._port, "up")

    def limit(self, rate: str | None) -> None:
        """Limits what the link carries either way, to '200mbit' for instance; none: no limit."""
        for end, device in ((self, "eth0"), (self._switch, self._port)):
            # Deleting where nothing is set is an error, replacing is not.
            replace = ["tc", "qdisc", "replace", "dev", device, "root"]
            if rate is None:
                end.network(*replace, "pfifo")
            else:
                end.network(*replace, "tbf", "rate", rate, "burst", "256kb", "latency", "100ms")

    def sent_bytes(self) -> int:
        """What has gone out of eth0 so far, headers included."""
        counter = Path(f"/proc/{self.pid}/root/sys/class/net/eth0/statistics/tx_bytes")
        return int(counter.read_text(encoding="utf-8"))

    def end(self) -> None:
        """Ends PID 1, and with it all that runs on this host, before it returns."""
        # First: PID 1 goes when all in its namespace are reaped, these by a parent outside.
        for process in self._started:
            kill(process)
        super().end()


def kill(process: subprocess.Popen[str]) -> None:
    """Ends a command that `Host.start` started, with the children of its group, and waits for it.

    The process outside is left to reap the command: killed itself, it would leave that to the
    machine's PID 1, which in a container may reap nobody, and then no host could end.
    """
    while process.poll() is None:  # the command may not have begun
        for command in psutil.Process(process.pid).children():
            with suppress(ProcessLookupError):
                os.killpg(command.pid, signal.SIGKILL)
        process.send_signal(signal.SIGCONT)  # it stops when its command is stopped
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)


class Cluster:
    """A context manager: `count` hosts h1, h2, ... that reach each other by name and by ssh.

    Its files lie in a new folder that all hosts see, as they see the machine's file system, but for
    /dev/shm and /run.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder.resolve()
        self.count = count
        self.hosts: list[Host] = []
        self.environment = {
            # The virtual environment first, and its ninja for all: two take turns at rebuilding.
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "eth0",
            "TORCH_EXTENSIONS_DIR": str(_extensions()),
        }
        self._ports = itertools.count(29500)
        self._undo = ExitStack()

    def __enter__(self) -> Cluster:
        self.folder.mkdir()
        self._write_files()
        with ExitStack() as undo:
            switch = _Namespaces([], ["sleep", "infinity"], self.folder / "switch.log")
            undo.callback(switch.end)
            switch.network("ip", "link", "add", "br0", "type", "bridge")
            switch.network("ip", "link", "set", "br0", "up")
            for number in range(1, self.count + 1):
                self.hosts.append(Host(number, switch, self.folder, self.environment))
                undo.callback(self.hosts[-1].end)
            for host in self.hosts:
                wait_for(host.listens, 20, f"sshd on {host.name}")
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo.close()
        self.hosts.clear()

    def _write_files(self) -> None:
        key = self.folder / "key"
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        names = [f"10.231.0.{i} h{i}\n" for i in range(1, self.count + 1)]
        files = {
            "hosts": "127.0.0.1 localhost\n" + "".join(names),
            "shadow": "root:*:1:0:99999:7:::\n",  # a locked root, as of Ubuntu's, may not log in
            "known_hosts": "* " + key.with_suffix(".pub").read_text(encoding="utf-8"),
            "sshd_config": SSHD_CONFIG.format(folder=self.folder),
            "ssh_config": SSH_CONFIG.format(folder=self.folder),
            # What the launcher hands on to the other hosts; it does not bear an empty line.
            ".deepspeed_env": "".join(f"{k}={v}\n" for k, v in self.environment.items()),
        }
        for name, text in files.items():
            (self.folder / name).write_text(text, encoding="utf-8")
        self.hostfile()

    def hostfile(self, slots: int = 1) -> Path:
        """Writes the launcher's list of hosts, with so many ranks on each."""
        path = self.folder / "hostfile"
        path.write_text(
            "".join(f"h{i} slots={slots}\n" for i in range(1, self.count + 1)), encoding="utf-8"
        )
        return path

    def port(self) -> int:
        """A port of the first host, a new one each time: the last may not be free yet."""
        return next(self._ports)

    def deepspeed(
        self, arguments: Sequence[str], cwd: Path, nodes: int | None = None, *, log: Path
    ) -> subprocess.Popen[str]:
        """Starts `deepspeed ARGUMENTS` on the first host, over the first so many; none: all.

        Its exit status is the largest of the hosts', which the launcher waits for.
        """
        command = [f"{sys.prefix}/bin/deepspeed", "--hostfile", str(self.folder / "hostfile")]
        if nodes is not None:
            command += ["--num_nodes", str(nodes)]
        command += ["--master_addr", self.hosts[0].address]
        command += ["--master_port", str(self.port())]
        env = {"DS_ENV_FILE": str(self.folder / ".deepspeed_env")}
        return self.hosts[0].start([*command, *arguments], cwd, env, log)


def _extensions() -> Path:
    """Where DeepSpeed keeps what it compiles, in about a minute, from one run to the next."""
    folder = Path.home() / ".cache" / "dalle1-cluster-tests"
    folder.mkdir(parents=True, exist_ok=True)
    for lock in folder.rglob("lock"):  # of a run that was killed; the next would wait without end
        lock.unlink()
    return folder

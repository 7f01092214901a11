"""The hosts themselves, and one run over two of them."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dalle1.common.config import save_settings
from dalle1.training.metrics_logger import read_metrics
from dvae import DVAE
from tests.cluster import hosts
from tests.cluster.hosts import ROOT, Cluster, Host, wait_for
from tests.training.conftest import tiny

# Takes what comes, until the other side has no more.
TAKE = """
import socket
connection, _ = socket.create_server(("", 5000)).accept()
while connection.recv(2**20):
    pass
"""
# Sends so many bytes and prints the seconds until the other side had them all.
SEND = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 5000))
start = time.monotonic()
connection.sendall(bytes(int(sys.argv[2])))
connection.shutdown(socket.SHUT_WR)
connection.recv(1)
print(time.monotonic() - start)
"""


def seconds_to_send(source: Host, target: Host, count: int, log: Path) -> float:
    taker = target.start([sys.executable, "-c", TAKE], ROOT, None, log)
    listening = Path(f"/proc/{target.pid}/net/tcp")
    wait_for(lambda: ":1388 00000000:0000 0A" in listening.read_text(), 20, "port 5000")
    done = source.run([sys.executable, "-c", SEND, target.name, str(count)])
    assert done.returncode == 0, done.stderr
    assert taker.wait(10) == 0
    return float(done.stdout)


def test_hosts_reach_each_other(cluster: Cluster) -> None:
    """Names that lead to the wrong host or need a password, a host that shares /dev/shm."""
    for one in cluster.hosts:
        marker = Path("/dev/shm") / f"seen-by-{one.name}"
        assert one.run(["touch", str(marker)]).returncode == 0
        assert not marker.exists()
        for other in cluster.hosts:
            done = one.run(["ssh", other.name, "hostname; ls /dev/shm"])
            assert done.returncode == 0, done.stderr
            assert done.stdout.split()[0] == other.name
            assert (marker.name in done.stdout) == (one is other)


def test_nothing_leaves(cluster: Cluster) -> None:
    """A host with a way out of the machine."""
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
    done = cluster.hosts[0].run([sys.executable, "-c", code])
    assert "Network is unreachable" in done.stderr


def test_commands(cluster: Cluster, tmp_path: Path) -> None:
    """The wrong folder, variables, exit status, or a time-out that leaves the command running."""
    host = cluster.hosts[0]
    done = host.run(["sh", "-c", "pwd; echo $WORD $GLOO_SOCKET_IFNAME"], tmp_path, {"WORD": "hear"})
    assert done.stdout.split() == [str(tmp_path), "hear", "eth0"]
    log = tmp_path / "log"
    assert host.start(["sh", "-c", "echo out; exit 7"], tmp_path, None, log).wait(10) == 7
    assert log.read_text() == "out\n"
    with pytest.raises(subprocess.TimeoutExpired):
        host.run(["sh", "-c", "sleep 4321 & wait"], timeout=0.5)
    assert host.processes("sleep 4321") == []


def test_processes(cluster: Cluster, tmp_path: Path) -> None:
    """A fault test that kills what runs on another host, or outside of all."""
    one, two, _ = cluster.hosts
    outside = subprocess.Popen(["sleep", "5432"])
    inside = one.start(["sleep", "5432"], tmp_path, None, tmp_path / "log")
    try:
        wait_for(lambda: one.processes("sleep 5432"), 10, "process")
        (pid,) = one.processes("sleep 5432")
        assert pid not in (outside.pid, inside.pid) and two.processes("sleep 5432") == []
        os.kill(pid, signal.SIGKILL)
        assert inside.wait(10) == -signal.SIGKILL
        assert one.processes("sleep 5432") == [] and outside.poll() is None
    finally:
        outside.kill()
        outside.wait()


def test_cut_and_heal(cluster: Cluster) -> None:
    """A cut that cuts nothing, or more than one host, or does not heal."""
    one, two, three = cluster.hosts
    ask = ["ssh", "-o", "ConnectTimeout=2"]
    two.cut()
    assert one.run([*ask, two.name, "true"]).returncode == 255
    assert one.run([*ask, three.name, "true"]).returncode == 0
    two.heal()
    wait_for(lambda: one.run([*ask, two.name, "true"]).returncode == 0, 20, "healed link")


def test_limit_and_sent_bytes(cluster: Cluster, tmp_path: Path) -> None:
    """A limit that limits one direction or stays on, and bytes not counted."""
    one, two, _ = cluster.hosts
    count = 10_000_000
    before = one.sent_bytes(), two.sent_bytes()
    free = seconds_to_send(one, two, count, tmp_path / "log")
    sent = one.sent_bytes() - before[0]
    assert count < sent < 1.2 * count and two.sent_bytes() - before[1] < 0.2 * count
    one.limit("50mbit")  # 1.6 s
    assert seconds_to_send(one, two, count, tmp_path / "log") > 5 * free
    assert seconds_to_send(two, one, count, tmp_path / "log") > 5 * free
    one.limit(None)
    again = min(seconds_to_send(one, two, count, tmp_path / "log") for _ in range(2))
    assert again < 5 * free


def test_cluster_ends(tmp_path: Path) -> None:
    """Processes, stopped ones among them, that outlive their cluster and hold its namespaces."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with Cluster(tmp_path / "cluster", 2) as cluster:
        one, two = cluster.hosts
        one.start(["ssh", two.name, "sleep 6543"], tmp_path, None, tmp_path / "log")
        wait_for(lambda: two.processes("sleep 6543"), 10, "process")
        os.kill(one.processes("ssh h2")[0], signal.SIGSTOP)
    after = {child.pid for child in psutil.Process().children(recursive=True)}
    assert after <= before
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not any("sleep 6543" in " ".join(line) for line in lines)


def test_failed_setup_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first hosts left behind when a later one cannot be made."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    monkeypatch.setattr(hosts, "INIT", hosts.INIT.replace("set -e", '[ "$2" = h1 ] || exit 1'))
    with pytest.raises((RuntimeError, subprocess.CalledProcessError)):
        Cluster(tmp_path / "cluster", 2).__enter__()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.mark.slow
def test_train_on_two_hosts(cluster: Cluster, shards: str, tmp_path: Path) -> None:
    """A launch over two hosts that hangs, runs elsewhere, or trains two runs of one rank."""
    config = tiny("dvae", shards, tmp_path / "run", tmp_path, steps=6)
    save_settings(config, tmp_path / "config.yaml")
    log = tmp_path / "log"
    before = [host.sent_bytes() for host in cluster.hosts]
    command = ["launch/train.py", str(tmp_path / "config.yaml")]
    process = cluster.deepspeed(command, ROOT, nodes=2, log=log)
    ranks: list[set[int]] = [set() for _ in cluster.hosts]

    def ended() -> bool:
        for found, host in zip(ranks, cluster.hosts, strict=True):
            found.update(host.ranks())
        return process.poll() is not None

    wait_for(ended, 600, "end of the run")  # minutes where DeepSpeed compiles something first
    assert process.returncode == 0, log.read_text()[-4000:]
    assert [len(found) for found in ranks] == [1, 1, 0]
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 6 and all(math.isfinite(loss) for loss in losses)
    sent = [host.sent_bytes() - b for host, b in zip(cluster.hosts, before, strict=True)]
    gradients = 4 * sum(p.numel() for p in DVAE(config.dvae).parameters())
    assert all(s > 6 * gradients for s in sent[:2]) and sent[2] < gradients

"""A training run over the hosts of a cluster, watched from outside."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from dalle1.commands import train
from dalle1.common.config import save_settings
from dalle1.training.config import RunConfig
from dalle1.training.metrics_logger import METRICS
from tests.cluster.hosts import ROOT, Cluster, Host, wait_for
from tests.forks import Forked

START = 120.0  # seconds that a run may take until it trains; about 12 on two free cores
LOST = "lost another one"


class Forks:
    """Ranks without a launcher, as one process that ends with the last of them."""

    def __init__(self, ranks: Iterable[Forked]) -> None:
        self._ranks = list(ranks)

    def poll(self) -> int | None:
        """None while one of them runs, then a status other than 0 if there is one."""
        codes = [rank.poll() for rank in self._ranks]
        if None in codes:
            return None
        return next((code for code in codes if code), 0)

    returncode = property(poll)

    def kill(self) -> None:
        for rank in self._ranks:
            rank.kill()


class Run:
    """`deepspeed launch/train.py` over the first `nodes` hosts."""

    def __init__(self, cluster: Cluster, config: RunConfig, nodes: int = 2, slots: int = 1) -> None:
        self.cluster, self.config = cluster, config
        self.hosts, self.nodes, self.slots = cluster.hosts[:nodes], nodes, slots
        self.folder = Path(config.run)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._yaml = self.folder.with_suffix(".yaml")
        save_settings(config, self._yaml)
        cluster.hostfile(slots)
        self._starts = 0

    def start(self, *options: str) -> None:
        """Starts the launcher on the first host."""
        self._starts += 1
        self.log = self.folder.with_suffix(f".{self._starts}.log")
        command = ["launch/train.py", str(self._yaml), *options]
        self.process: subprocess.Popen[str] | Forks = self.cluster.deepspeed(
            command, ROOT, self.nodes, log=self.log
        )

    def fork(self) -> Forks:
        """Starts the ranks without a launcher, as forks of this machine's server (tests/forks.py)
        that enter the hosts; to be killed in the end, for they would outlive the hosts."""
        self._starts += 1
        self.log = self.folder.with_suffix(f".{self._starts}.log")
        world = {
            "WORLD_SIZE": str(self.nodes * self.slots),
            "MASTER_PORT": str(self.cluster.port()),
        }
        world |= {"MASTER_ADDR": self.hosts[0].address} | self.cluster.environment
        places = [(host, slot) for host in self.hosts for slot in range(self.slots)]
        forks = Forks(
            Forked(
                train.main,
                [str(self._yaml)],
                log=self.log,
                environment={**world, "RANK": str(rank), "LOCAL_RANK": str(slot)},
                host=host.pid,
            )
            for rank, (host, slot) in enumerate(places)
        )
        self.process = forks
        return forks

    def output(self) -> str:
        """What all ranks have printed since the last start, each line behind its host's name."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def says(self, *words: str) -> bool:
        """Whether one of its lines holds all the words."""
        return any(all(word in line for word in words) for line in self.output().splitlines())

    def text(self) -> str:
        """The metrics as they are."""
        with suppress(FileNotFoundError):
            return (self.folder / METRICS).read_text(encoding="utf-8")
        return ""

    def losses(self) -> list[tuple[int, float]]:
        """Update and loss, line by line, without a last line that is being written."""
        found = []
        for line in self.text().splitlines():
            with suppress(json.JSONDecodeError):
                values = json.loads(line)
                if "loss" in values:
                    found.append((values["step"], values["loss"]))
        return found

    def step(self) -> int:
        """The last update of the metrics."""
        steps = re.findall(r'^\{"step": (\d+), "loss"', self.text()[-4000:], re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def wait(self, condition: Callable[[], object], seconds: float, what: str) -> float:
        """As `wait_for`, but ends with the run, and with what it said last."""

        def held() -> bool:
            ended = self.process.poll() is not None
            if condition():
                return True
            if ended:
                raise RuntimeError(f"the run ended with {self.process.returncode}")
            return False

        try:
            return wait_for(held, seconds, what)
        except (RuntimeError, TimeoutError) as error:
            raise AssertionError(f"{what}: {error}\n{self.output()[-6000:]}") from error

    def reach(self, step: int, seconds: float = START) -> None:
        """Waits until so many updates are done."""
        self.wait(lambda: self.step() >= step, seconds, f"update {step}")

    def status(self, seconds: float) -> int:
        """The launcher's exit status, when it ends in time."""
        wait_for(lambda: self.process.poll() is not None, seconds, f"end\n{self.output()[-6000:]}")
        return int(self.process.returncode)

    def checkpoint(self) -> int:
        """Update of the newest finished checkpoint; 0: none."""
        found = (self.folder / "checkpoints").glob("step-*[0-9]/state.json")
        return max((int(path.parent.name[5:]) for path in found), default=0)


def rank_of(host: Host) -> int:
    """The process of the one rank on a host: its guard's child where it has a guard."""
    (started,) = host.ranks()
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(started).children():
            if "dalle1.commands.train" in child.cmdline():
                return child.pid
    return started

"""What a run over several hosts does when something fails: noticed when, lost what.

Each test prints a row of a table; DALLE1_FAULT_TABLE names a file to write it to.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dalle1.training.checkpoints import load, newest
from dalle1.training.config import RunConfig
from dalle1.training.metrics_logger import read_metrics
from tests.cluster.hosts import Cluster, wait_for
from tests.cluster.runs import LOST, START, Run, rank_of
from tests.training import worker
from tests.training.conftest import tiny

TIMEOUT = 8.0  # faults.timeout of all runs
SLACK = 30.0  # on top of a time-out, on a busy machine
STEPS, SAVE, AT = 130, 20, 45  # updates in all, between checkpoints, before the fault
HEADER = """\
| Fault | Noticed after | Training again after | Updates lost | Samples lost or repeated | End |
|---|---|---|---|---|---|
"""

pytestmark = pytest.mark.slow
Config = Callable[..., RunConfig]
Losses = Callable[[int], list[float]]


@pytest.fixture(scope="session")
def row() -> Iterator[Callable[..., None]]:
    """Takes the table's rows: fault, seconds, seconds, updates, samples, end."""
    rows: list[str] = []

    def add(
        fault: str, noticed: float | None, again: float | None, lost: int | None, end: str
    ) -> None:
        cells = [fault, *("-" if x is None else f"{x:.1f} s" for x in (noticed, again))]
        # Samples: all losses were those of a run without the fault, see `whole`.
        cells += ["-" if lost is None else str(lost), "-" if lost is None else "0", end]
        rows.append("| " + " | ".join(cells) + " |")
        print("\n" + rows[-1])

    yield add
    path = os.environ.get("DALLE1_FAULT_TABLE")
    if path:
        Path(path).write_text(HEADER + "".join(line + "\n" for line in rows))


@pytest.fixture(scope="session")
def config(shards: str, parts: Path) -> Config:
    """Makes the run that meets the faults, long enough to be hit in the middle."""

    def make(run: Path, **settings: Any) -> RunConfig:
        common: dict[str, Any] = {
            "batch_size": 6,
            "steps": STEPS,
            "save_every": SAVE,
            "contact_sheet_every": 10 * STEPS,
            "threads": 1,
            "parallel": {"zero_stage": 2},
            "faults": {"timeout": TIMEOUT, "start_timeout": 60.0, "save_timeout": 20.0},
        }
        return tiny("dalle", shards, run, parts, **(common | settings))

    return make


@pytest.fixture(scope="session")
def undisturbed(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Losses of the run without a fault, on so many ranks of one machine."""
    known: dict[int, list[float]] = {}

    def losses(ranks: int) -> list[float]:
        if ranks not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            worker.finish(worker.start(config(folder, save_every=STEPS), ranks, folder), folder)
            known[ranks] = [line["loss"] for line in read_metrics(folder) if "loss" in line]
        return known[ranks]

    return losses


def same(run: Run, losses: list[float]) -> None:
    """Every update once, each on the samples, captions and noise of the undisturbed run: other
    ones would give other losses."""
    found = run.losses()
    assert [step for step, _ in found] == list(range(1, len(found) + 1))
    assert [loss for _, loss in found] == pytest.approx(losses[: len(found)], abs=1e-6)


def recovers(run: Run, start: float) -> tuple[float, float, int]:
    """Seconds from `start` until a survivor says so and until the first new update, and the
    updates that were done twice; then the run trains to its end."""
    run.wait(lambda: run.says(LOST), 3 * TIMEOUT + SLACK, "lost rank noticed")
    noticed = time.monotonic() - start
    time.sleep(0.2)
    before, done, kept = run.text(), run.step(), run.checkpoint()
    run.wait(lambda: run.text() != before and run.step() > kept, START, "training again")
    again = time.monotonic() - start
    run.reach(STEPS)
    assert run.status(60) == 0, run.output()[-6000:]
    return noticed, again, done - kept


def test_killed_rank(
    cluster: Cluster, config: Config, undisturbed: Losses, tmp_path: Path, row: Any
) -> None:
    """A dead rank that the others wait for, a restart from the beginning or out of step."""
    run = Run(cluster, config(tmp_path / "run"), nodes=3)
    run.start("--restarts", "3")
    run.reach(AT)
    start = time.monotonic()
    os.kill(rank_of(run.hosts[-1]), signal.SIGKILL)
    noticed, again, lost = recovers(run, start)
    assert noticed < TIMEOUT + SLACK and 0 <= lost <= SAVE + 1
    assert run.says("signal 9: restart 1 of 3") and not run.says("restart 2")
    same(run, undisturbed(3))
    row("kill -9 of a rank (3 hosts)", noticed, again, lost, "trains to its end")


def test_cut_link(
    cluster: Cluster, config: Config, undisturbed: Losses, tmp_path: Path, row: Any
) -> None:
    """An outage longer than the time-out after which the two sides do not meet again."""
    run = Run(cluster, config(tmp_path / "run"))
    run.start("--restarts", "3")
    run.reach(AT)
    start = time.monotonic()
    run.hosts[1].cut()
    run.wait(lambda: run.says(LOST), TIMEOUT + SLACK, "cut link noticed")
    noticed = time.monotonic() - start
    time.sleep(max(0.0, 1.5 * TIMEOUT - noticed))
    outage = time.monotonic() - start
    run.hosts[1].heal()
    _, again, lost = recovers(run, start)
    assert noticed < TIMEOUT + SLACK and 0 <= lost <= SAVE + 1
    same(run, undisturbed(2))
    row(f"link cut for {outage:.0f} s", noticed, again, lost, "trains to its end")


def test_hung_rank(
    cluster: Cluster, config: Config, undisturbed: Losses, tmp_path: Path, row: Any
) -> None:
    """A rank that is there and does nothing: nobody ends it, or the others wait for it."""
    run = Run(cluster, config(tmp_path / "run"))
    run.start("--restarts", "3")
    run.reach(AT)
    start = time.monotonic()
    os.kill(rank_of(run.hosts[1]), signal.SIGSTOP)
    noticed, again, lost = recovers(run, start)
    assert noticed < TIMEOUT + SLACK and 0 <= lost <= SAVE + 1
    assert run.says("no sign of life")
    same(run, undisturbed(2))
    row("hung rank (SIGSTOP)", noticed, again, lost, "killed by its guard; trains to its end")


def test_terminated_then_damaged(
    cluster: Cluster, config: Config, undisturbed: Losses, tmp_path: Path, row: Any
) -> None:
    """A scheduler's warning answered with a restart, or heard by one rank alone; a checkpoint
    that lacks a rank's file and is loaded by half, or ends the run."""
    run = Run(cluster, config(tmp_path / "run"))
    run.start("--restarts", "3")
    run.reach(AT)
    start = time.monotonic()
    os.kill(run.hosts[1].ranks()[0], signal.SIGTERM)
    run.wait(lambda: run.says("a checkpoint is saved"), TIMEOUT + SLACK, "stop")
    noticed = time.monotonic() - start
    assert run.status(60) == 0, run.output()[-6000:]
    done = run.step()
    assert run.checkpoint() == done and not run.says("restart 1")
    row("SIGTERM to a rank", noticed, None, done - run.checkpoint(), "saved; exit status 0")

    damaged = run.folder / "checkpoints" / f"step-{done:07d}"
    next(damaged.glob("rank-00001-*")).unlink()
    start = time.monotonic()
    run.start("--restarts", "3", "--resume")
    run.wait(lambda: run.says("warning", "rank-00001", "resuming from"), START, "warning")
    noticed = time.monotonic() - start
    kept = (done - 1) // SAVE * SAVE
    assert run.says(f"resuming from step-{kept:07d}")
    run.wait(lambda: kept < run.step() != done, START, "training again")
    again = time.monotonic() - start
    run.reach(STEPS)
    assert run.status(60) == 0, run.output()[-6000:]
    same(run, undisturbed(2))
    row("file of a rank missing (--resume)", noticed, again, done - kept, "former checkpoint taken")


def test_interrupted(cluster: Cluster, config: Config, tmp_path: Path, row: Any) -> None:
    """Ctrl-C on one host that the others do not hear of, or that looks like success."""
    run = Run(cluster, config(tmp_path / "run", steps=10**6))
    run.start("--restarts", "3")
    run.reach(AT)
    start = time.monotonic()
    os.kill(rank_of(run.hosts[1]), signal.SIGINT)
    run.wait(lambda: run.says("a checkpoint is saved"), TIMEOUT + SLACK, "stop")
    noticed = time.monotonic() - start
    status = run.status(60)
    assert status == 130 and not run.says("restart 1"), run.output()[-6000:]
    assert run.checkpoint() == run.step()
    row("SIGINT to a rank", noticed, None, None, f"saved; exit status {status}")


def test_remote_launcher_killed(cluster: Cluster, config: Config, tmp_path: Path, row: Any) -> None:
    """Orphans, guard and rank, that train on where nobody can stop them."""
    run = Run(cluster, config(tmp_path / "run", steps=10**6))
    run.start("--restarts", "3")
    run.reach(AT)
    launcher = psutil.Process(run.hosts[1].ranks()[0]).ppid()
    start = time.monotonic()
    os.kill(launcher, signal.SIGKILL)
    run.wait(lambda: run.says("a checkpoint is saved"), TIMEOUT + SLACK, "stop of the orphan")
    noticed = time.monotonic() - start
    status = run.status(60)
    wait_for(lambda: not any(host.ranks() for host in run.hosts), 20, "end of all ranks")
    assert run.checkpoint() == run.step() and not run.says("restart 1")
    row("kill -9 of a host's launcher", noticed, None, None, f"saved; exit status {status}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB where the checkpoints of `tmp_path`/run go, room for about seven."""
    path = tmp_path / "run" / "checkpoints"
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_full_disk(
    small_disk: Path, config: Config, undisturbed: Losses, tmp_path: Path, row: Any
) -> None:
    """A checkpoint that cannot be written and ends the run, or takes the former one with it."""
    with Cluster(tmp_path / "cluster", 2) as cluster:  # after the mount, so that its hosts see it
        run = Run(cluster, config(tmp_path / "run"))
        run.start("--restarts", "3")
        run.reach(AT)
        ballast = small_disk / "ballast"
        start = time.monotonic()
        with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as file:
            while True:
                if not file.write(bytes(shutil.disk_usage(small_disk).free or 1)):
                    raise OSError("No space")
        run.wait(lambda: run.says("warning", "not saved"), START, "warning")
        noticed = time.monotonic() - start
        step = run.step()
        run.reach(step + 2 * SAVE)
        kept = newest(small_disk)
        assert kept is not None and int(kept.name[5:]) < step + 1
        assert len(load(kept).tensors) > 0
        ballast.unlink()
        run.wait(lambda: run.checkpoint() > step, START, "checkpoint on the freed disk")
        run.reach(STEPS)
        assert run.status(60) == 0, run.output()[-6000:]
    assert not run.says("restart 1")
    same(run, undisturbed(2))
    row("full disk", noticed, 0.0, 0, "warns, trains on, saves once there is room")


def test_loss_that_is_no_number(cluster: Cluster, config: Config, tmp_path: Path, row: Any) -> None:
    """NaN that is trained on, or met again after each restart."""
    run = Run(cluster, config(tmp_path / "run"))
    run.start("optimizer.learning_rate=1e30", "--restarts", "3")
    run.wait(lambda: run.says("error: update", "the loss is"), START, "stop")
    assert run.status(60) == 2, run.output()[-6000:]
    assert not run.says("restart 1") and run.step() < 20
    row("loss not finite", None, None, None, "named in the same update; exit status 2, no restart")


def test_host_out_of_reach(cluster: Cluster, config: Config, tmp_path: Path, row: Any) -> None:
    """A host that does not come and is waited for without end or word."""
    run = Run(cluster, config(tmp_path / "run"))
    run.hosts[1].cut()
    start = time.monotonic()
    run.start("faults.start_timeout=5")
    run.wait(lambda: run.says("error", "MASTER_ADDR", "start_timeout 5"), START, "refusal")
    noticed = time.monotonic() - start
    status = run.status(60)
    assert status != 0
    row("host out of reach (start_timeout 5)", noticed, None, None, f"exit status {status}")

"""The same run however many hosts it is spread over, and what it sends between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dalle1.training.checkpoints import load
from dalle1.training.config import RunConfig
from dalle1.training.metrics_logger import read_metrics
from dalle1.training.trainer import Trainer
from tests.cluster.hosts import Cluster
from tests.cluster.runs import START, Run
from tests.training.conftest import tiny

STEPS = 40
Config = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def config(shards: str, parts: Path) -> Config:
    """Makes a tiny second stage on the built-in data, which each run writes for itself."""

    def make(run: Path, **settings: Any) -> RunConfig:
        common = {
            "data": "shapes",
            "reader": {
                "image_size": 16,
                "shuffle_buffer": 20,
                "shapes_folder": str(run.with_suffix(".shapes")),
                "shapes_count": 96,
            },
            "batch_size": 12,
            "steps": STEPS,
            "threads": 1,
        }
        return tiny("dalle", shards, run, parts, **(common | settings))

    return make


@pytest.fixture(scope="session")
def alone(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], int]:
    """Losses of a single process, and the bytes of the weights."""
    run = tmp_path_factory.mktemp("alone") / "run"
    Trainer(config(run)).run()
    weights = load(run / "checkpoints" / f"step-{STEPS:07d}").tensors.under("weights/")
    losses = [line["loss"] for line in read_metrics(run) if "loss" in line]
    return losses, 4 * sum(weights[name].numel() for name in weights)


def spread(run: Run, weights: int, launcher: bool = False) -> tuple[list[float], float]:
    """Trains to the end; the losses, and what the busiest host sent per update, in weights.

    launcher: DeepSpeed's, which imports all on each host; without it, ranks are forked.
    """
    if launcher:
        run.start()
        return watched(run, weights)
    forks = run.fork()
    try:
        return watched(run, weights)
    finally:
        forks.kill()


def watched(run: Run, weights: int) -> tuple[list[float], float]:
    """The losses of a run to its end, and what the busiest host sent per update, in weights."""
    seen: list[tuple[int, list[int]]] = []

    def between() -> bool:
        step = run.step()
        if 10 <= step < STEPS - 2 and (not seen or step > seen[-1][0]):
            # By the time the counters are read, the next updates may have begun.
            seen.append((step, [host.sent_bytes() for host in run.hosts]))
        return step == STEPS

    run.wait(between, START, f"update {STEPS}")
    assert run.status(60) == 0, run.output()[-6000:]
    (first, before), (last, after) = seen[0], seen[-1]
    assert last - first >= 15, "too few looks at the counters"
    sent = [(b - a) / (last - first) for a, b in zip(before, after, strict=True)]
    ratio = max(sent) / weights
    spread_over = f"{run.nodes} hosts x {run.slots} | ZeRO {run.config.parallel.zero_stage}"
    print(f"\n| {spread_over} | {max(sent):,.0f} bytes | {ratio:.2f} x weights |")
    return [loss for _, loss in run.losses()], ratio


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("nodes", [2, 3])
def test_hosts_train_as_one_process(
    nodes: int,
    zero: int,
    cluster: Cluster,
    config: Config,
    alone: tuple[list[float], int],
    tmp_path: Path,
) -> None:
    """Batches cut or summed wrongly once ranks are on other hosts; a stage that sends more than
    it must: each of R ranks sends (R - 1)/R of the weights to gather them and twice that to
    average gradients, which gloo also does where ZeRO 3 asks for its shard alone."""
    losses, weights = alone
    run = Run(cluster, config(tmp_path / "run", parallel={"zero_stage": zero}), nodes)
    found, sent = spread(run, weights)
    assert found == pytest.approx(losses, abs=1e-5)
    gathered = 2 if zero == 3 else 1  # forwards and backwards, or after the update
    assert sent == pytest.approx((gathered + 2) * (nodes - 1) / nodes, rel=0.25)


@pytest.mark.slow
def test_shards_stay_within_a_host(
    cluster: Cluster, config: Config, alone: tuple[list[float], int], tmp_path: Path
) -> None:
    """Shard groups that straddle hosts, so that weights are gathered over the network: between
    two hosts there is but the average of each shard, the gradient once in all."""
    losses, weights = alone
    parallel = {"zero_stage": 3, "dp_shard": 2}
    run = Run(cluster, config(tmp_path / "run", parallel=parallel), nodes=2, slots=2)
    found, sent = spread(run, weights, launcher=True)  # which says what rank is on what host
    assert found == pytest.approx(losses, abs=1e-5)
    assert sent == pytest.approx(1.0, rel=0.25)


@pytest.mark.slow
def test_compressed_between_hosts(
    cluster: Cluster, config: Config, alone: tuple[list[float], int], tmp_path: Path
) -> None:
    """PowerSGD that is left out between the replicas of sharded weights, or spoils them."""
    losses, weights = alone
    parallel = {"zero_stage": 3, "dp_shard": 2}
    compressed = config(tmp_path / "run", parallel=parallel, compression={"rank": 4})
    found, sent = spread(Run(cluster, compressed, nodes=2, slots=2), weights)
    assert sent < 0.8
    assert found[-1] == pytest.approx(losses[-1], rel=0.02) and found != losses

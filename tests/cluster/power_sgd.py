"""PowerSGD over a slow network: two hosts on this machine, a transformer of ten million weights.

    python -m tests.cluster.power_sgd --rate 200mbit --updates 360 --out docs/power-sgd.png

Each of two runs, uncompressed and compressed, does its first updates over the slow network, where
they are timed and their bytes counted, and the others over a free one, which changes no loss.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dalle1.data import shapes
from dalle1.training.config import RunConfig
from dalle1.training.metrics_logger import read_metrics
from dalle1.training.trainer import Trainer
from tests.cluster.hosts import Cluster, missing
from tests.cluster.runs import Run
from tests.training.conftest import tiny

SETTLED = 3  # updates before the timed ones
SMOOTH = 50  # updates of a mean loss
TRANSFORMER = {
    "width": 320,
    "layers": 8,
    "heads": 8,
    "head_size": 40,
    "text_vocab": 360,
    "text_length": 32,
    "image_vocab": 32,
    "grid": 4,
}


@dataclass
class Measured:
    """One run: seconds and bytes of an update over the slow network, all losses."""

    name: str
    seconds: float
    sent: float
    losses: list[float]

    def final(self) -> float:
        return float(np.mean(self.losses[-SMOOTH:]))


def make_config(
    folder: Path, name: str, updates: int, batch: int, compression: dict[str, int] | None
) -> RunConfig:
    """A second stage on shapes of 16x16 pixels, large only where gradients are."""
    data = f"{folder}/data/train-{{00000..00001}}.tar"
    return RunConfig(
        stage="dalle",
        run=str(folder / name),
        data=data,
        steps=updates,
        batch_size=2 * batch,
        log_every=1,
        contact_sheet_every=10**6,
        save_every=10**6,
        threads=1,
        reader={"image_size": 16, "shuffle_buffer": 1000},
        optimizer={"learning_rate": 4.5e-4, "warmup_steps": 50, "schedule": "constant"},
        transformer=TRANSFORMER,
        tokenizer={"captions": 2000},
        codec=str(folder / "dvae" / "model"),
        compression=compression,
        faults={"timeout": 120.0},
    )


def prepare(folder: Path) -> None:
    """The data, and a dVAE whose tokens tell shapes from their background."""
    shapes.write_shards(folder / "data", "train", 2000, side=16)
    data = f"{folder}/data/train-{{00000..00001}}.tar"
    Trainer(tiny("dvae", data, folder / "dvae", folder, steps=300, contact_sheet_every=10**6)).run()


def measure(folder: Path, config: RunConfig, name: str, rate: str, slow: int) -> Measured:
    """Trains over two hosts, the first `slow` updates at the rate."""
    with Cluster(folder / f"cluster-{Path(config.run).name}", 2) as cluster:
        run = Run(cluster, config)
        for host in run.hosts:
            host.limit(rate)
        run.start()
        looks = []
        for step in (SETTLED, slow):
            run.reach(step, 240)
            looks.append((run.step(), [host.sent_bytes() for host in run.hosts]))
        for host in run.hosts:
            host.limit(None)
        run.reach(config.steps, 1200)
        if run.status(120):
            raise RuntimeError(run.output()[-4000:])
    (first, before), (last, after) = looks
    lines = [line for line in read_metrics(config.run) if "loss" in line]
    timed = [config.batch_size / line["images_per_second"] for line in lines[SETTLED:slow]]
    sent = max(b - a for a, b in zip(before, after, strict=True)) / (last - first)
    return Measured(name, statistics.median(timed), sent, [line["loss"] for line in lines])


def draw(runs: list[Measured], rate: str, path: Path) -> None:
    """Loss curves, and bars of the seconds and bytes of an update."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, times, sizes) = pyplot.subplots(
        1, 3, figsize=(11, 3.6), width_ratios=[2.4, 1, 1], dims="constrained"
    )
    colors, widths = ["silver", "tab:blue"], [5, 1.5]
    for run, color, width in zip(runs, colors, widths, strict=True):
        smooth = np.convolve(run.losses, np.ones(20) / 20, "valid")
        curves.plot(range(1, len(run.losses) + 1), run.losses, color=color, alpha=0.25, lw=0.8)
        label = f"{run.name}: {run.final():.3f} over the last {SMOOTH}"
        curves.plot(range(20, len(run.losses) + 1), smooth, color=color, lw=width, label=label)
    curves.set(xlabel="update", ylabel="loss (nats a token, weighted)")
    curves.legend(frameon=False)
    for axes, values, unit, title in (
        (
            times,
            [run.seconds for run in runs],
            "s",
            f"an update at {rate.replace('mbit', ' Mbit')}/s",
        ),
        (sizes, [run.sent / 1e6 for run in runs], "MB", "sent by a host per update"),
    ):
        bars = axes.bar([run.name.replace(" ", "\n", 1) for run in runs], values, color=colors)
        axes.bar_label(bars, [f"{value:.2f} {unit}" for value in values])
        axes.set_title(f"{title}\n{values[0] / values[1]:.1f} times less", fontsize=10)
        axes.set_ylabel(unit)
        axes.margins(y=0.15)
    for axes in (curves, times, sizes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", default="200mbit", help="of each host's link, in tc's words")
    parser.add_argument("--updates", type=int, default=360)
    parser.add_argument("--slow", type=int, default=15, help="of them at that rate")
    parser.add_argument("--batch", type=int, default=2, help="samples of a rank")
    parser.add_argument("--rank", type=int, default=16, help="compression.approximation_rank")
    parser.add_argument("--first-step", type=int, default=0, help="compression.first_step")
    parser.add_argument("--out", type=Path, help="figure")
    options = parser.parse_args()
    reason = missing()
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    compression: dict[str, Any] = {"rank": options.rank, "first_step": options.first_step}
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for label, settings in (
            ("uncompressed", None),
            (f"PowerSGD rank {options.rank}", compression),
        ):
            config = make_config(folder, label.split()[0], options.updates, options.batch, settings)
            runs.append(measure(folder, config, label, options.rate, options.slow))
            print(
                f"{label}: {runs[-1].seconds:.3f} s and {runs[-1].sent / 1e6:.2f} MB an update at "
                f"{options.rate}/s; loss {runs[-1].final():.4f} after {options.updates} updates",
                flush=True,
            )
    one, two = runs
    print(
        json.dumps(
            {
                "faster": round(one.seconds / two.seconds, 2),
                "fewer_bytes": round(one.sent / two.sent, 2),
                "loss_over_uncompressed": round(two.final() / one.final() - 1, 4),
            }
        )
    )
    if options.out:
        draw(runs, options.rate, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

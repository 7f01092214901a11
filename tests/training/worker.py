"""Ranks of a run as processes of this machine, forked or started by torchrun."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dalle1.common.config import save_settings
from dalle1.data.shards.loader import Batch
from dalle1.training import distributed
from dalle1.training.config import RunConfig
from tests.forks import Forked

ROOT = Path(__file__).parents[2]


def start(
    config: RunConfig,
    ranks: int,
    folder: Path,
    *options: str,
    function: Callable[[Sequence[str]], None] | None = None,
    **environment: str,
) -> list[Forked]:
    """Starts the ranks of a run on this machine; their output is in `folder`/rank-R.txt.

    function: what each rank calls with the config's path and the options; None: `main`.
    """
    path = _saved(config, folder)
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    common |= {"OMP_NUM_THREADS": "1", **environment}
    return [
        Forked(
            function or main,
            [str(path), *options],
            log=folder / f"rank-{rank}.txt",
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]


def finish(processes: Sequence[Forked], folder: Path, timeout: float = 300) -> None:
    """Waits until all ranks have ended well."""
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    output = "\n".join(
        p.read_text(encoding="utf-8")[-3000:] for p in sorted(folder.glob("rank-*.txt"))
    )
    assert codes == [0] * len(codes), output


def torchrun(config: RunConfig, ranks: int, folder: Path, *options: str) -> None:
    """Runs the ranks from nothing, each with a hash seed of its own, until they have ended well."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += [f"--master-port={free_port()}", "-m", "tests.training.worker"]
    done = subprocess.run(
        [*command, str(_saved(config, folder)), *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout[-6000:]


def free_port() -> str:
    """A port that nothing listens on, as a launcher's variable."""
    return str(distributed.free_port())


def _saved(config: RunConfig, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    save_settings(config, path)
    return path


def data_order(folder: Path) -> list[object]:
    """Captions and seeds of each update over all ranks, in the order of the global batch."""
    ranks = [
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(folder.glob("order-*.txt"))
    ]
    return [
        [
            lines[0][0],
            [c for line in lines for c in line[1]],
            [s for line in lines for s in line[2]],
        ]
        for lines in zip(*ranks, strict=True)
    ]


def keys_trained_on(folder: Path) -> list[str]:
    """Keys of all samples in the order of the global batches, of a run whose ranks were killed:
    of an update that was done again the last time counts, a line that was cut off does not."""
    last: dict[tuple[int, int], list[str]] = {}
    for rank, path in enumerate(sorted(folder.glob("order-*.txt"))):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("]]"):
                step, _, _, keys = json.loads(line)
                last[step, rank] = keys
    return [key for place in sorted(last) for key in last[place]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains one rank, noting each batch in order-RANK.txt next to the config."""
    import torch

    from dalle1.training.config import load_config
    from dalle1.training.signals import Interrupted
    from dalle1.training.trainer import Trainer

    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--stop-at", type=int)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    trainer = Trainer(load_config(options.config), options.resume)
    parts, before = trainer.stage.micro_batches, trainer.stage.replaces_weights
    order = Path(options.config).with_name(f"order-{trainer.rank}.txt")

    def noted(batch: Batch, size: int) -> Sequence[object]:
        with order.open("a", encoding="utf-8") as file:
            line = [trainer.step, batch.captions, batch.seeds, batch.keys]
            file.write(json.dumps(line) + "\n")
        return parts(batch, size)

    def stop_at(now: int) -> bool:
        if trainer.rank == 0 and now + 1 == options.stop_at:
            os.kill(os.getpid(), signal.SIGINT)  # one rank alone: the others must agree
        return before(now)

    trainer.stage.replaces_weights = stop_at  # type: ignore[method-assign]
    trainer.stage.micro_batches = noted  # type: ignore[method-assign]
    try:
        trainer.run()
    except Interrupted:
        assert options.stop_at


if __name__ == "__main__":
    main()

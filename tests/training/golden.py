"""Writes golden_losses.json anew: python -m tests.training.golden"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from dalle1.data import shapes
from dalle1.training.trainer import Trainer

from .conftest import tiny
from .test_trainer import GOLDEN, GOLDEN_RUNS, golden_losses


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes.write_shards(folder, "train", 96, side=16, samples_per_shard=48)
        data = str(folder / "train-{00000..00001}.tar")
        for stage in ("dvae", "clip"):
            Trainer(tiny(stage, data, folder / stage, folder, steps=6)).run()
        golden = {
            name: [
                round(loss, 5) for loss in golden_losses(name, folder / f"{name}-run", data, folder)
            ]
            for name in GOLDEN_RUNS
        }
    GOLDEN.write_text(json.dumps(golden, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

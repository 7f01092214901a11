"""Training runs of dVAEs in findings, measured at several checkpoints on unseen images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import dvae
from dalle1.findings.base import Options, Settings
from dalle1.findings.leaves import unseen_leaves, write_leaves
from dalle1.findings.training import run_settings, train_run
from dalle1.findings.workspace import Workspace
from dalle1.training import checkpoints
from dalle1.training.stages.table import MakeStage, make_stage

CONFIG = "findings/dvae"
POINTS = 6  # checkpoints at which a run is measured
# Data of `leaves`; a change of how they are drawn is another version.
LEAVES_VERSION = 1


def leaves_settings(
    overrides: Sequence[str], seed: int, options: Options, steps: int, kl_share: float = 0.2
) -> Settings:
    """Settings of a dVAE on dead leaves, with the paper's schedules in these shares of the updates.

    Args:
        overrides: what is special in an arm, as key=value.
        seed: of the run.
        options: the user's.
        steps: updates, before they are scaled.
        kl_share: share of the updates over which beta rises.
    """
    steps = options.scaled(steps, POINTS)
    schedules = [
        f"steps={steps}",
        f"dvae_training.kl_steps={round(steps * kl_share)}",
        f"dvae_training.temperature_steps={steps * 2 // 3}",
        f"optimizer.warmup_steps={min(50, steps // 4)}",
        *measured_at(steps),
    ]
    return {
        "train": run_settings(CONFIG, [*schedules, *overrides], seed),
        "leaves": {"count": options.fewer(8000, 64), "version": LEAVES_VERSION},
        "unseen": options.fewer(256, 16),
    }


def measured_at(steps: int) -> list[str]:
    """Settings that keep a checkpoint at each of POINTS equal parts of a run, all of them."""
    every = max(1, steps // POINTS)
    return [f"save_every={every}", f"keep_every={every}", f"log_every={every}"]


def train_on_leaves(
    settings: Settings, workspace: Workspace, stage: MakeStage = make_stage
) -> tuple[Path, Tensor]:
    """Trains what `leaves_settings` has told; the run's folder and unseen images."""
    side, made = settings["train"]["reader"]["image_size"], settings["leaves"]
    data = workspace.shared(
        "leaves", {**made, "side": side}, lambda folder: write_leaves(folder, made["count"], side)
    )
    run = workspace.folder / "dvae"
    train_run(settings["train"], run, workspace, stage, data=data)
    return run, unseen_leaves(settings["unseen"], side)


def codecs_of(
    run: Path, settings: Settings, make: Callable[[dvae.DVAEConfig], dvae.DVAE] = dvae.DVAE
) -> Iterator[tuple[int, dvae.DVAE]]:
    """The averaged dVAE of each checkpoint that a run has kept, with its number of updates.

    Args:
        run: its folder.
        settings: of the run.
        make: an empty model.
    """
    from dalle1.training.trainer import CHECKPOINTS, MODEL  # needs DeepSpeed

    every = settings["keep_every"]
    folders = sorted((run / CHECKPOINTS).glob("step-???????"))
    for folder in folders:
        checkpoint = checkpoints.load(folder)
        step = int(checkpoint.state["step"])
        if step % every:
            continue  # the run's last one, which `keep_every` does not name
        with torch.device("meta"):
            codec = make(dvae.DVAEConfig(**settings["dvae"]))
        average = dict(checkpoint.tensors.under(f"average/{MODEL}"))
        codec.load_state_dict(average, assign=True)
        yield step, codec.eval()

"""Training runs of findings, through the library's own trainer, as `dalle1 train` makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle1.findings.base import Settings
from dalle1.findings.workspace import Workspace
from dalle1.training.config import RunConfig, load_config
from dalle1.training.run_folder import EXPORTED
from dalle1.training.stages.table import MakeStage, make_stage

PLACES = ("run", "threads", "codec", "ranker", "tokenizer", "init")  # where, not what
# Settings that came when there were results, and that change nothing where they are null: left out,
# those results count.
LATER = ("drawings", "sampling")


def run_settings(config: str, overrides: Sequence[str], seed: int) -> Settings:
    """What a training run's result depends on: its full config as JSON, without places.

    Places are the run's folder, its threads, and the folders of other parts, whose own settings a
    finding adds.

    Args:
        config: a YAML file of this checkout.
        overrides: settings as key=value, after the file's.
        seed: of the run.
    """
    # With settings that are null: left out, they would come back as their defaults.
    full = load_config(config, [*overrides, f"seed={seed}"]).model_dump(mode="json")
    for name in PLACES:
        if name != "tokenizer" or isinstance(full.get(name), str):
            full.pop(name, None)
    for name in LATER:
        if full.get(name) is None:
            full.pop(name, None)
    full["reader"].pop("shapes_folder")
    return full


def train_run(
    settings: Settings,
    folder: Path,
    workspace: Workspace,
    stage: MakeStage = make_stage,
    **places: str | Path | None,
) -> Path:
    """Trains what `run_settings` has told, or what is left of it; the exported model's folder.

    Args:
        settings: of the run.
        folder: of the run.
        workspace: of the finding's run, which gives threads and the built-in data.
        stage: makes what is trained; a variant of the stage that the settings name.
        places: codec, ranker, tokenizer, init or data, where the stage reads them.

    Raises:
        ValueError: the run diverged, or the settings do not fit together.
        Interrupted: it was stopped, once a checkpoint is saved.
    """
    from dalle1.training.trainer import train  # needs DeepSpeed

    values: dict[str, Any] = dict(settings) | {"run": str(folder)}
    values |= {name: str(place) for name, place in places.items() if place is not None}
    values["threads"] = workspace.threads
    shapes = workspace.out / "shared" / "shapes"
    values["reader"] = dict(settings["reader"]) | {"shapes_folder": str(shapes)}
    train(RunConfig.model_validate(values), resume=True, stage=stage)
    return folder / EXPORTED

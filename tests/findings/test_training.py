"""Training runs of findings: what their settings hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dalle1.findings.training import run_settings, train_run
from dalle1.findings.workspace import Workspace
from dalle1.training import trainer
from dalle1.training.config import RunConfig, load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stage", ["dvae", "clip", "dalle"])
def test_a_run_is_trained_as_its_config_says(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A setting that is null and comes back as its default, such as a limit of the gradients; a
    place that is part of the settings, so that results of another folder are made again."""
    path = str(ROOT / "configs" / "shapes" / f"{stage}.yaml")
    overrides = ["steps=7", "optimizer.clip_norm=null", "contact_sheet_every=null"]
    settings = run_settings(path, overrides, seed=3)
    assert "runs/shapes" not in json.dumps(settings)
    trained: list[RunConfig] = []
    monkeypatch.setattr(trainer, "train", lambda config, **others: trained.append(config))
    workspace = Workspace(tmp_path / "work", tmp_path / "out", tmp_path / "pictures", threads=2)
    places = {"codec": "c", "ranker": "r", "tokenizer": "t"} if stage == "dalle" else {}
    train_run(json.loads(json.dumps(settings)), tmp_path / "run", workspace, **places)
    expected = load_config(
        path,
        [
            *overrides,
            "seed=3",
            "threads=2",
            f"run={tmp_path / 'run'}",
            f"reader.shapes_folder={tmp_path / 'out' / 'shared' / 'shapes'}",
            *(f"{name}={value}" for name, value in places.items()),
        ],
    )
    assert trained == [expected]

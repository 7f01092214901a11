"""Runs and models that an earlier release wrote, in tests/fixtures/format1: they resume and open.

Each of the three runs was stopped after 6 of 10 steps. expected.json holds the losses of all ten
and what the finished transformer's folder gave for one caption. The dVAE's last four are of today's
release, whose relaxed draw takes other random numbers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import dalle1
from dalle1.training.metrics_logger import read_metrics
from dalle1.training.trainer import Trainer

from .conftest import tiny

FORMER = Path(__file__).parents[1] / "fixtures" / "format1"
RUNS = ("dvae", "clip", "dalle")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FORMER / "expected.json").read_text())
    return found


@pytest.mark.parametrize("stage", RUNS)
def test_former_checkpoint_resumes(
    stage: str, tmp_path: Path, shards: str, expected: dict[str, Any]
) -> None:
    """A key of the state, a tensor or a setting renamed, so that a run that began under an
    earlier release is lost or resumes with other data, moments or schedules."""
    for name in RUNS:
        shutil.copytree(FORMER / name, tmp_path / name)
    config = tiny(
        stage,
        shards,
        tmp_path / stage,
        tmp_path,
        steps=10,
        contact_sheet_every=None,
        save_every=100,
    )
    trainer = Trainer(config, resume=True)
    assert trainer.step == 6
    trainer.run()
    lines = [line for line in read_metrics(tmp_path / stage) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 11))
    losses = [line["loss"] for line in lines]
    # To the bit on the machine that wrote the fixture; elsewhere sums may be rounded otherwise.
    assert losses == pytest.approx(expected[stage], abs=1e-6, rel=0)


def test_former_model_samples(expected: dict[str, Any]) -> None:
    """A model folder of an earlier release that opens no more, or draws or ranks otherwise."""
    model = dalle1.load(FORMER / "dalle" / "model")
    result = dalle1.sample("a red circle", model=model, candidates=4, keep=2, progress=False)
    wanted = expected["sample"]
    assert torch.equal(result.tokens, torch.tensor(wanted["tokens"]))
    assert result.scores is not None
    torch.testing.assert_close(result.scores, torch.tensor(wanted["scores"]), atol=1e-5, rtol=0)
    ranked = dalle1.rank("a blue square", result.images[0], model=model)
    torch.testing.assert_close(ranked, torch.tensor(expected["rank"]), atol=1e-5, rtol=0)

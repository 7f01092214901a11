"""What a run says of its captions."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from dalle1.training.config import RunConfig
from dalle1.training.trainer import Trainer

from .conftest import tiny


@pytest.mark.parametrize("stage", ["clip", "dalle"])
def test_a_run_says_nothing_of_cut_captions(
    stage: str, parts: Path, shards: str, tmp_path: Path
) -> None:
    """A warning for each long caption of a data set, in training, in validation, or of a contact
    sheet."""
    config = tiny(
        stage,
        shards,
        tmp_path / "run",
        parts,
        steps=2,
        contact_sheet_every=2,
        validation={"data": shards, "every": 1, "batches": 1},
    )
    part = "clip" if stage == "clip" else "transformer"
    content = config.model_dump()
    content[part]["text_length"] = 6
    content["ranker"] = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(RunConfig(**content)).run()
    assert [str(w.message) for w in caught if "is cut" in str(w.message)] == []
    assert (tmp_path / "run" / "sheets").is_dir()

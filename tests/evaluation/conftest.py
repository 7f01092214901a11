"""A benchmark of a tiny random model on images with captions that the test writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalle1 import Model
from dalle1.evaluation.config import RankSettings
from tests.conftest import CAPTIONS

SettingsMaker = Callable[..., RankSettings]


@pytest.fixture
def make_settings(model: Model, tmp_path: Path) -> SettingsMaker:
    """Settings of a benchmark on five captions with images; keywords change them."""
    model.save(tmp_path / "model")
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for i, caption in enumerate(CAPTIONS):
        pixels = np.random.default_rng(i).integers(0, 256, (10 + i, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pairs / f"{i}.png")
        (pairs / f"{i}.txt").write_text(caption, encoding="utf-8")

    def make(**changes: Any) -> RankSettings:
        settings = {
            "model": str(tmp_path / "model"),
            "run": str(tmp_path / "run"),
            "data": str(pairs),
            "candidates": 4,
            "blur": [0, 1],
            "inception_splits": 1,
            "bootstrap": 50,
        }
        return RankSettings(**{**settings, **changes})

    return make

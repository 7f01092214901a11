"""A random DALL-E mini of a few thousand weights, by our classes and restated."""

from __future__ import annotations

import pytest
import torch

from dalle1.published import dalle_mini
from dalle1.seq2seq.model import Seq2Seq
from tests.parity.dalle_mini import Restated, Shape, random_weights
from tests.published.dalle_mini_files import built, write_hub_folder

SHAPE = Shape()
# As mega has them: rows that no code uses, behind the start.
PADDED = Shape(rows=47, heads=2, encoder_layers=1, decoder_layers=2)


@pytest.fixture(scope="session", params=[SHAPE, PADDED], ids=["mini", "mega"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Seq2Seq, Restated]:
    """Ours and the restatement, of the same weights."""
    s: Shape = request.param
    weights = random_weights(s)
    folder = write_hub_folder(tmp_path_factory.mktemp("mini"), s, weights)
    return built(dalle_mini.read(folder).prior), Restated(s, weights, torch.float64)


@pytest.fixture(scope="session")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Seq2Seq:
    folder = write_hub_folder(tmp_path_factory.mktemp("mini"), SHAPE, random_weights(SHAPE))
    return built(dalle_mini.read(folder).prior)

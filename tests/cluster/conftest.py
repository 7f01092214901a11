"""Three hosts on this machine; only with DALLE1_CLUSTER=1, for the tests take minutes and root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dalle1.data import shapes
from dalle1.training.trainer import Trainer
from tests.cluster.hosts import Cluster, missing
from tests.training.conftest import tiny

collect_ignore_glob = [] if os.environ.get("DALLE1_CLUSTER") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _possible() -> None:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Three hosts h1, h2, h3, new for each test: they take a fifth of a second."""
    with Cluster(tmp_path / "cluster", 3) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two shards of 16x16 shapes."""
    folder: Path = tmp_path_factory.mktemp("shards")
    shapes.write_shards(folder, "train", 96, side=16, samples_per_shard=48)
    return str(folder / "train-{00000..00001}.tar")


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Path:
    """Folders `dvae` and `clip` of models trained for a few updates, for stage two."""
    folder = tmp_path_factory.mktemp("parts")
    for stage in ("dvae", "clip"):
        Trainer(tiny(stage, shards, folder / stage, folder, steps=6)).run()
    return folder

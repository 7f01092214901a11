"""Three hosts on this machine; only with DALLE1_CLUSTER=1, for the tests take minutes and root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Cluster, missing
from tests.training.conftest import parts, shards  # noqa: F401  # fixtures

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

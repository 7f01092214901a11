"""An installed wheel; only with DALLE1_PACKAGE=1, for it takes a minute and an index."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.package.installed import Environment, build

collect_ignore_glob = [] if os.environ.get("DALLE1_PACKAGE") == "1" else ["test_*.py"]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist."""
    return build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="session")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel, outside of the checkout."""
    return Environment(tmp_path_factory.mktemp("elsewhere") / "env", built[0])

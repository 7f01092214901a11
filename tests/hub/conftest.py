"""A Hub on this machine, and a cache that is empty."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dalle1 import Model
from tests.hub.server import Files, Hub

VARIABLES = ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "DALLE1_MODEL")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server that HF_ENDPOINT names; nobody is logged in, and a retry does not wait."""
    constants = pytest.importorskip("huggingface_hub.constants")
    downloads = pytest.importorskip("huggingface_hub.file_download")
    for name in (*VARIABLES, "HUGGINGFACE_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # other processes
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    waits = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr(downloads, "time", waits)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        # As if it had been set before the package was imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


@pytest.fixture(scope="session")
def saved(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of a model folder."""
    folder = tmp_path_factory.mktemp("saved")
    model.save(folder)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")}

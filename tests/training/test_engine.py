"""What the engine asks of torch.distributed, without a second process."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch

from dalle1.training import distributed


def test_barrier_waits_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that give up after half an hour, though another one draws for hours more."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **kwargs: asked.update(group=kwargs))
    monkeypatch.setattr(
        torch.distributed,
        "monitored_barrier",
        lambda group, timeout=None: asked.update(barrier=timeout),
    )
    wait = distributed.make_barrier()
    assert "barrier" not in asked
    wait()
    assert asked["group"]["backend"] == "gloo"
    assert asked["barrier"] == asked["group"]["timeout"] >= timedelta(days=7)

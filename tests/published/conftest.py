"""The fakes' kinds and their family, for the tests that ask for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dalle1 import registry
from dalle1.published import table
from tests.fakes import KINDS
from tests.published import fakes


@pytest.fixture
def fake_family(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a test with it, the table holds the fakes' family too, and their kinds are known."""
    for kind in KINDS:
        monkeypatch.setitem(registry.KINDS[kind.role], kind.name, kind)
    known = {**table.families(), fakes.FAMILY.name: fakes.FAMILY}
    monkeypatch.setattr(table, "families", lambda: known)
    yield

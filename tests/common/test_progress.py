"""Progress bars: how often they write."""

from __future__ import annotations

import sys
import types

import pytest

from dalle1.common.progress import progress_bar


def test_a_log_gets_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A log of a job with a line for each of thousands of steps."""
    assert list(progress_bar(range(5000), desc="counting")) == list(range(5000))
    shown = capsys.readouterr().err
    assert shown.count("\r") <= 4 and "counting: 100%" in shown and "5000/5000" in shown


def test_who_watches_sees_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar in a terminal or a notebook that stands still for 20 seconds."""
    assert progress_bar(total=1, disable=False).mininterval == 20
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert progress_bar(total=1).mininterval == 0.5
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    assert progress_bar(total=1).mininterval == 0.5

"""Figures as files: their panels, and what an error leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from dalle1.evaluation.plots import Figure


def test_a_row_that_is_not_full_has_no_empty_panels(tmp_path: Path) -> None:
    """Axes from 0 to 1 without a curve, where panels do not fill the last row."""
    with Figure(tmp_path / "four.png", 4, columns=3) as panels:
        shown = panels[0].figure.axes
        assert shown == panels and len(panels) == 4
    assert (tmp_path / "four.png").read_bytes()[:4] == b"\x89PNG"


def test_an_error_leaves_the_former_figure(tmp_path: Path) -> None:
    """Half of a figure in the place of a whole one."""
    path = tmp_path / "plot.png"
    path.write_bytes(b"former")
    with pytest.raises(RuntimeError, match="no data"), Figure(path, 1):
        raise RuntimeError("no data")
    assert path.read_bytes() == b"former" and list(tmp_path.iterdir()) == [path]

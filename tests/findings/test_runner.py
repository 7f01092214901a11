"""Runs, their results on disk, resuming and reports, with a finding that trains nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dalle1.findings.base import (
    Arm,
    Curve,
    Finding,
    Measure,
    Measurements,
    Options,
    Prediction,
    Settings,
)
from dalle1.findings.report import _color
from dalle1.findings.results import runs_of
from dalle1.findings.runner import run_findings
from dalle1.findings.workspace import Workspace
from dalle1.training.signals import Interrupted

Run = Callable[[Settings, Workspace], Measurements]
HEIGHTS = {"low": 1.0, "high": 3.0}


def measure(settings: Settings, workspace: Workspace) -> Measurements:
    height = HEIGHTS[settings["arm"]] * settings["factor"] + 0.1 * settings["seed"]
    return Measurements({"height": height}, {"line": [(0.0, 0.0), (1.0, height)]})


def finding(run: Run = measure, factor: float = 1.0) -> Finding:
    return Finding(
        name="heights",
        claim="High is higher than low",
        section="section 0",
        paper="It is.",
        setting="Nothing is trained.",
        minutes=0,
        arms=(Arm("low", "is low"), Arm("high", "is high")),
        measures=(Measure("height", "height, m"),),
        curves=(Curve("line", "height"),),
        predictions=(Prediction("height", "high", "low"),),
        settings=lambda arm, seed, options: {"arm": arm.name, "factor": factor * options.scale},
        run=run,
    )


def report_of(out: Path) -> dict[str, object]:
    return json.loads((out / "heights" / "report.json").read_text())  # type: ignore[no-any-return]


def test_report_compares_the_arms(tmp_path: Path) -> None:
    """A difference with the wrong sign, and a prediction that agrees whatever is measured."""
    assert run_findings([finding()], [0, 1, 2], Options(), tmp_path)
    found = report_of(tmp_path)
    assert found["arms"]["high"]["height"]["mean"] == pytest.approx(3.1)  # type: ignore[index]
    gap = found["arms"]["high"]["height"]["difference"]  # type: ignore[index]
    assert (gap["mean"], gap["low"]) == (pytest.approx(2), pytest.approx(2))
    assert found["predictions"][0]["outcome"] == "agrees"  # type: ignore[index]
    text = (tmp_path / "heights" / "report.md").read_text()
    assert "| high: is high | 3.10 ± 0.25 |" in text  # 4.303 x 0.1 / sqrt(3)
    assert "height, m +2.00 ± 0.00 (higher)" in text and "**agrees**" in text
    assert (tmp_path / "heights" / "heights.png").read_bytes()[:4] == b"\x89PNG"
    other = tmp_path / "other"
    assert run_findings([finding(factor=-1.0)], [0, 1, 2], Options(), other)
    assert report_of(other)["predictions"][0]["outcome"] == "contradicts"  # type: ignore[index]


@pytest.mark.parametrize("arms", [2, 14])
def test_each_arm_has_a_color_of_its_own(arms: int, tmp_path: Path) -> None:
    """The eleventh arm in the first one's color, which nobody can tell apart; a legend over the
    lines."""
    more = tuple(Arm(f"arm {i}", "is another") for i in range(arms - 2))
    many = replace(finding(), arms=(*finding().arms, *more))
    colors = [_color(many, place) for place in range(arms)]
    assert len(set(colors)) == arms
    assert colors[:2] == ["C0", "C1"] or arms > 10


def test_resumes_at_the_first_run_without_a_result(tmp_path: Path) -> None:
    """Hours of runs made again after a stop; a stop that is taken for the failure of one run."""
    calls: list[tuple[str, int]] = []

    def stopped(settings: Settings, workspace: Workspace) -> Measurements:
        calls.append((settings["arm"], settings["seed"]))
        (workspace.folder / "half").touch()
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(settings, workspace)

    with pytest.raises(KeyboardInterrupt):
        run_findings([finding(stopped)], [0, 1], Options(), tmp_path)
    (left,) = (tmp_path / "heights" / "work").iterdir()  # for the run to resume from
    assert (left / "half").exists() and left.name.startswith("high-seed0")
    assert run_findings([finding(stopped)], [0, 1], Options(), tmp_path)
    assert calls == [("low", 0), ("high", 0), ("high", 0), ("low", 1), ("high", 1)]
    assert not list((tmp_path / "heights" / "work").iterdir())


def test_other_settings_do_not_meet_old_results(tmp_path: Path) -> None:
    """A report that mixes a trial at small scale, or a former version, with the full runs."""
    run_findings([finding()], [0], Options(), tmp_path)
    run_findings([finding()], [0], Options(scale=0.5), tmp_path)
    trial = (tmp_path / "heights-scale-0.5" / "report.md").read_text()
    assert "a trial that says nothing" in trial and "| high: is high | 1.50 |" in trial
    assert "| high: is high | 3.00 |" in (tmp_path / "heights" / "report.md").read_text()
    newer = replace(finding(), version=2)
    old, new = (runs_of(f, [0], Options(), tmp_path) for f in (finding(), newer))
    assert [r.read() is not None for r in old] == [True, True]
    assert [r.read() for r in new] == [None, None]


@pytest.mark.parametrize("failure", [ValueError, TypeError, RuntimeError])
def test_a_run_that_fails_does_not_stop_the_others(
    failure: type[Exception], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A night that is lost to one run that diverged; a failure that is told as success."""

    def diverges(settings: Settings, workspace: Workspace) -> Measurements:
        if settings["arm"] == "low":
            raise failure("loss: expected a finite number, got nan")
        return measure(settings, workspace)

    assert not run_findings([finding(diverges)], [0, 1], Options(), tmp_path)
    assert "low-seed1" in capsys.readouterr().err
    found = report_of(tmp_path)
    assert found["arms"]["low"] == {} and found["arms"]["high"]["height"]["count"] == 2  # type: ignore[index]
    assert found["predictions"] == []
    assert run_findings([finding()], [0, 1], Options(), tmp_path)  # tried again
    assert report_of(tmp_path)["predictions"]


@pytest.mark.parametrize("stop", [OSError(28, "no space"), Interrupted("stopped", 2)])
def test_what_would_end_all_ends_all(stop: Exception, tmp_path: Path) -> None:
    """A full disk that is met by each of a hundred runs; a stop that goes on with the next run."""
    calls = []

    def stopped(settings: Settings, workspace: Workspace) -> Measurements:
        calls.append(settings["arm"])
        raise stop

    with pytest.raises(type(stop)):
        run_findings([finding(stopped)], [0, 1], Options(), tmp_path)
    assert calls == ["low"]


def test_undeclared_measures_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A measure that no report shows, or one whose lack is found after all runs."""

    def other(settings: Settings, workspace: Workspace) -> Measurements:
        return Measurements({"width": 1.0}, {"line": []})

    assert not run_findings([finding(other)], [0], Options(), tmp_path)
    assert "expected ['height'], got ['width']" in capsys.readouterr().err


def test_a_damaged_result_says_what_to_do(tmp_path: Path) -> None:
    """A traceback of JSON, or a damaged result that is counted as none and made over."""
    run_findings([finding()], [0], Options(), tmp_path)
    path = runs_of(finding(), [0], Options(), tmp_path)[0].path
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=r"result: expected the measures.*remove it"):
        run_findings([finding()], [0], Options(), tmp_path)


def test_what_is_missing_leaves_a_finding_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`all` that ends where one finding needs what the user has not named."""
    lacking = replace(finding(), name="lacking", needs=lambda options: "--photographs: name it")
    assert run_findings([lacking, finding()], [0], Options(), tmp_path)
    assert "lacking: left out; --photographs" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--photographs"):
        run_findings([lacking], [0], Options(), tmp_path)


def test_shared_folders_are_made_once_for_each_settings(tmp_path: Path) -> None:
    """A codec that each arm trains anew, one that is half made, or one of other settings."""
    made: list[bool] = []

    def make(folder: Path) -> None:
        made.append((folder / "begun").exists())
        (folder / "begun").touch()
        if len(made) == 1:
            raise KeyboardInterrupt

    workspace = Workspace(tmp_path / "work", tmp_path, tmp_path / "pictures")
    with pytest.raises(KeyboardInterrupt):
        workspace.shared("codec", {"width": 1, "depth": 2}, make)
    first = workspace.shared("codec", {"width": 1, "depth": 2}, make)
    assert made == [False, True]  # resumed in the same folder
    assert workspace.shared("codec", {"depth": 2, "width": 1}, make) == first
    assert made == [False, True]
    assert workspace.shared("codec", {"width": 2, "depth": 2}, make) != first


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_are_different(tmp_path: Path, seeds: list[int]) -> None:
    """An interval of the same run counted twice."""
    with pytest.raises(ValueError, match="--seeds"):
        run_findings([finding()], seeds, Options(), tmp_path)


def test_a_finding_names_its_own_arms() -> None:
    """A prediction of an arm that does not exist, which no report would show."""
    with pytest.raises(ValueError, match="predictions"):
        replace(finding(), predictions=(Prediction("height", "higher", "low"),))
    with pytest.raises(ValueError, match="reference"):
        replace(finding(), reference="middle")
    with pytest.raises(ValueError, match="arms"):
        replace(finding(), arms=(Arm("low", "a"), Arm("low", "b")), predictions=())

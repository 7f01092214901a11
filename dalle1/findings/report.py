"""The report of a finding: report.json, report.md and a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dalle1.common.files import write_text
from dalle1.evaluation.plots import Figure, pyplot
from dalle1.findings.base import Curve, Finding, Measure, Measurements, Options, Prediction
from dalle1.findings.statistics import Estimate, difference, estimate

COLORS = 10  # that matplotlib gives to lines one after the other
LEVEL = 36  # letters of the names of arms that stand side by side below a panel

Found = Mapping[tuple[str, int], Measurements]  # by arm and seed


def write_report(finding: Finding, found: Found, options: Options, folder: Path) -> str:
    """Writes NAME/report.json, NAME/report.md and NAME/NAME.png; the Markdown.

    Args:
        finding: what was measured.
        found: results so far; arms and seeds may be missing.
        options: what the user has set.
        folder: of the finding.
    """
    summary = summarize(finding, found)
    write_text(folder / "report.json", json.dumps(summary, indent=2) + "\n")
    text = markdown(finding, found, options)
    try:
        plot(finding, found, folder / f"{finding.name}.png")
    except ValueError as error:  # matplotlib is an extra
        text += f"\nNo figure: {error}\n"
    write_text(folder / "report.md", text)
    return text


def by_seed(found: Found, arm: str, measure: str) -> dict[int, float]:
    """A measure of an arm, by seed."""
    return {seed: m.values[measure] for (name, seed), m in found.items() if name == arm}


def summarize(finding: Finding, found: Found) -> dict[str, Any]:
    """The numbers of report.json: means, differences from the reference, predictions."""
    reference = finding.reference_arm.name
    arms: dict[str, Any] = {}
    for arm in finding.arms:
        numbers = {}
        for measure in finding.measures:
            values = by_seed(found, arm.name, measure.name)
            if values:
                gap = difference(values, by_seed(found, reference, measure.name))
                numbers[measure.name] = {
                    "by_seed": values,
                    **asdict(estimate(list(values.values()))),
                    "difference": None if gap is None or arm.name == reference else asdict(gap),
                }
        arms[arm.name] = numbers
    predictions = [
        asdict(p) | {"outcome": outcome(gap), "difference": asdict(gap)}
        for p in finding.predictions
        if (gap := _predicted(p, found))
    ]
    return {
        "finding": finding.name,
        "claim": finding.claim,
        "section": finding.section,
        "reference": reference,
        "arms": arms,
        "predictions": predictions,
    }


def _predicted(prediction: Prediction, found: Found) -> Estimate | None:
    """The difference that should be above 0; None where runs are missing."""
    return difference(
        by_seed(found, prediction.higher, prediction.measure),
        by_seed(found, prediction.lower, prediction.measure),
    )


def outcome(gap: Estimate) -> str:
    """What a difference that should be above 0 says of the prediction."""
    if gap.low is None:
        return "one seed: no interval"
    return {1: "agrees", -1: "contradicts", 0: "not decided"}[gap.sign]


def markdown(finding: Finding, found: Found, options: Options) -> str:
    """The report as Markdown."""
    seeds = sorted({seed for _, seed in found})
    reference = finding.reference_arm.name
    lines = [f"# {finding.name}", "", f"{finding.claim} ({finding.section})", ""]
    if options.scale < 1:
        lines += [f"**Scale {options.scale:g}: a trial that says nothing of the claim.**", ""]
    elif options.scale > 1:
        lines += [f"Scale {options.scale:g}: so many times the updates.", ""]
    lines += [f"{finding.setting} Seeds: {', '.join(map(str, seeds))}.", ""]
    lines += ["| arm | " + " | ".join(m.label for m in finding.measures) + " |"]
    lines += ["|---|" + "---|" * len(finding.measures)]
    for arm in finding.arms:
        cells = [_cell(by_seed(found, arm.name, m.name), m) for m in finding.measures]
        lines.append(f"| {arm.name}: {arm.change} | " + " | ".join(cells) + " |")
    lines += ["", f"Differences from {reference!r}, of the same seeds:", ""]
    for arm in finding.arms:
        if arm.name != reference:
            lines += [f"- {arm.name}: {_differences(finding, found, arm.name)}"]
    if finding.predictions:
        lines += ["", f"The paper: {finding.paper}", ""]
        lines += [_prediction(p, finding.measures, found) for p in finding.predictions]
    lines += ["", "± is half of the 95 % t-interval of the mean over seeds."]
    return "\n".join(lines) + "\n"


def _cell(values: Mapping[int, float], measure: Measure) -> str:
    return _text(estimate(list(values.values())), measure) if values else "-"


def _text(e: Estimate, measure: Measure, sign: str = "") -> str:
    text = f"{e.mean:{sign}.{measure.digits}f}"
    return text if e.half is None else f"{text} ± {e.half:.{measure.digits}f}"


def _differences(finding: Finding, found: Found, arm: str) -> str:
    reference, parts = finding.reference_arm.name, []
    for m in finding.measures:
        gap = difference(by_seed(found, arm, m.name), by_seed(found, reference, m.name))
        if gap is not None:
            verdict = {1: "higher", -1: "lower", 0: "no clear difference"}[gap.sign]
            verdict = verdict if gap.low is not None else "one seed"
            parts.append(f"{m.label} {_text(gap, m, '+')} ({verdict})")
    return "; ".join(parts) or "no results"


def _prediction(p: Prediction, measures: Sequence[Measure], found: Found) -> str:
    measure = next(m for m in measures if m.name == p.measure)
    gap = _predicted(p, found)
    told = "no results yet" if gap is None else f"{_text(gap, measure, '+')}: **{outcome(gap)}**"
    return f"- {measure.label} is higher for {p.higher!r} than for {p.lower!r}: {told}"


def plot(finding: Finding, found: Found, path: Path) -> None:
    """A panel for each measure, with a dot a seed, and one for each curve."""
    with Figure(path, len(finding.measures) + len(finding.curves), columns=3) as panels:
        for measure, axes in zip(finding.measures, panels, strict=False):
            _plot_measure(axes, finding, found, measure)
        for curve, axes in zip(finding.curves, panels[len(finding.measures) :], strict=True):
            _plot_curve(axes, finding, found, curve)


def _plot_measure(axes: Any, finding: Finding, found: Found, measure: Measure) -> None:
    for place, arm in enumerate(finding.arms):
        values = list(by_seed(found, arm.name, measure.name).values())
        if values:
            e, color = estimate(values), _color(finding, place)
            axes.errorbar(place, e.mean, e.half, fmt="_", color=color, capsize=6, markersize=14)
            axes.plot([place] * len(values), values, "o", color=color, alpha=0.5, markersize=4)
    names = [arm.name for arm in finding.arms]
    slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(
        range(len(names)), names, fontsize=8, **(slanted if sum(map(len, names)) > LEVEL else {})
    )
    axes.set(title=measure.label, xlim=(-0.5, len(names) - 0.5))
    axes.grid(axis="y", alpha=0.3)


def _plot_curve(axes: Any, finding: Finding, found: Found, curve: Curve) -> None:
    """The mean over seeds where all of them have a point, and their range as a band."""
    for place, arm in enumerate(finding.arms):
        lines = [dict(m.curves[curve.name]) for (name, _), m in found.items() if name == arm.name]
        if not lines:
            continue
        places = sorted(set.intersection(*(set(line) for line in lines)))
        values = [[line[x] for line in lines] for x in places]
        color = _color(finding, place)
        axes.plot(places, [sum(v) / len(v) for v in values], color=color, label=arm.name)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    if curve.log_x:
        axes.set_xscale("log")
    if curve.log_y:
        axes.set_yscale("log")
    axes.set(title=curve.label, xlabel=curve.x)
    axes.grid(alpha=0.3)
    if axes.lines:
        beside = len(finding.arms) > COLORS  # many names would cover the lines
        axes.legend(
            fontsize=7, **({"loc": "upper left", "bbox_to_anchor": (1, 1)} if beside else {})
        )


def _color(finding: Finding, place: int) -> Any:
    """The color of the arm at a place, another one for each arm."""
    if len(finding.arms) <= COLORS:
        return f"C{place}"
    return pyplot().get_cmap("turbo")(place / (len(finding.arms) - 1))

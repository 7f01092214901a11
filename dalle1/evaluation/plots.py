"""The plots of a ranking benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle1.common.files import replacing

Results = dict[str, Any]
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def plot_counts(results: Results, path: Path) -> None:
    """Figures of the ranker's first of N against N, with 95 % intervals.

    The paper's figure 9, right, shows quality against the sample size in the same way.
    """
    groups = results["groups"]
    checked = all("accuracy" in g["curves"] for g in groups.values())
    with Figure(path, 1 + checked * (1 + len(groups))) as panels:
        score, *rest = panels
        for (name, group), color in zip(groups.items(), COLORS, strict=False):
            _line(score, group["curves"]["clip_score"], name, color)
        _finish_counts(score, f"{results['names']['clip_score']} of the first", "score")
        if not checked:
            return
        accuracy, *by_group = rest
        for (name, group), color in zip(groups.items(), COLORS, strict=False):
            _line(accuracy, group["curves"]["accuracy"], f"{name}, the ranker's first", color, 100)
            if "oracle" in group["curves"]:
                _line(accuracy, group["curves"]["oracle"], f"{name}, any", color, 100, "--")
        _finish_counts(accuracy, "captions shown exactly", "%")
        for (name, group), axes in zip(groups.items(), by_group, strict=True):
            for attribute, curve in group["curves"]["attributes"].items():
                if curve:
                    _line(axes, curve, attribute, None, 100)
            _finish_counts(axes, f"the ranker's first, {name}", "% right")


def plot_blur(results: Results, path: Path) -> None:
    """FID, Inception Score and the ranker's score against blur, above, and against N, below.

    The paper's figure 9 shows the former two so. There is a column for each, and a line for each N
    or each radius. Of several groups only some N are shown.
    """
    keys = ("fid", "inception_score", "clip_score")
    with Figure(path, 2 * len(keys), columns=len(keys)) as panels:
        for i, key in enumerate(keys):
            by_radius, by_count = panels[i], panels[i + len(keys)]
            _plot_by_radius(by_radius, results, key)
            _plot_by_count(by_count, results, key)
            for axes in (by_radius, by_count):
                axes.set(title=results["names"][key])
                axes.grid(alpha=0.3)
                if axes.lines:
                    axes.legend(fontsize=6)


def _plot_by_radius(axes: Any, results: Results, key: str) -> None:
    """A line for each N; of several groups, for the first, middle and last N of each."""
    counts, radii, groups = results["counts"], results["blur"], results["groups"]
    if len(groups) > 1:
        counts = sorted({counts[0], counts[len(counts) // 2], counts[-1]})
    for g, (name, group) in enumerate(groups.items()):
        for i, n in enumerate(counts):
            points = [group["pictures"][f"{r:g}"][n] for r in radii]
            if len(groups) > 1:
                style, color = (":", "--", "-")[-len(counts) :][i], COLORS[g % len(COLORS)]
                _figures(axes, radii, points, key, f"{name}, N = {n}", style, color)
            else:
                _figures(axes, radii, points, key, f"N = {n}", "o-", _shade(i, len(counts)))
    axes.set(xlabel="blur radius, pixels")


def _plot_by_count(axes: Any, results: Results, key: str) -> None:
    """A line for each blur radius; of several groups, for the first and last of each."""
    counts, radii, groups = results["counts"], results["blur"], results["groups"]
    if len(groups) > 1:
        radii = sorted({radii[0], radii[-1]})
    for g, (name, group) in enumerate(groups.items()):
        for i, r in enumerate(radii):
            points = [group["pictures"][f"{r:g}"][n] for n in counts]
            if len(groups) > 1:
                style, color = ("-", ":")[i], COLORS[g % len(COLORS)]
                _figures(axes, counts, points, key, f"{name}, r = {r:g}", style, color)
            else:
                _figures(axes, counts, points, key, f"r = {r:g}", "o-", _shade(i, len(radii)))
    axes.set(xlabel="candidates N")
    _counts_axis(axes, counts)


def _figures(
    axes: Any,
    places: Sequence[float],
    points: Sequence[Results],
    key: str,
    label: str,
    style: str,
    color: Any,
) -> None:
    """A line of the figure `key`, and its standard deviation as a band; none where it is None."""
    means = [mean for point in points if (mean := _mean(point[key])) is not None]
    if len(means) < len(points):
        return
    axes.plot(places, means, style, color=color, label=label, markersize=3)
    found = [point.get(f"{key}_deviation") for point in points]
    deviations = [float(deviation) for deviation in found if deviation is not None]
    if len(deviations) == len(means):
        pairs = list(zip(means, deviations, strict=True))
        band = [m - d for m, d in pairs], [m + d for m, d in pairs]
        axes.fill_between(places, *band, color=color, alpha=0.08, linewidth=0)


def _shade(place: int, of: int) -> Any:
    """A color of an ordered series."""
    return pyplot().get_cmap("viridis")(0.9 * place / max(1, of - 1))


class Figure:
    """A context manager that gives the axes of a figure and writes it when the block ends.

    After an error the file is as before.
    """

    def __init__(self, path: Path, panels: int, columns: int = 4) -> None:
        columns = min(columns, panels)
        rows = -(-panels // columns)
        self.path = path
        self.plt = pyplot()
        self.figure, axes = self.plt.subplots(
            rows, columns, figsize=(4.2 * columns, 3.5 * rows), squeeze=False, layout="constrained"
        )
        self.panels = list(axes.flat[:panels])
        for unused in axes.flat[panels:]:  # of the last row
            unused.remove()

    def __enter__(self) -> list[Any]:
        return self.panels

    def __exit__(self, error: object, *details: object) -> None:
        if error is None:
            with replacing(self.path) as temporary:
                ending = self.path.suffix[1:].lower() or None
                self.figure.savefig(temporary, dpi=120, format=ending)
        self.plt.close(self.figure)


def _line(
    axes: Any, curve: Results, label: str, color: str | None, scale: float = 1, style: str = "o-"
) -> None:
    """A curve over N with its intervals as a band; color None: the next of the cycle."""
    counts = [int(n) for n in curve]
    means = [scale * point["mean"] for point in curve.values()]
    (line,) = axes.plot(counts, means, style, color=color, label=label, markersize=3)
    low, high = zip(*(point["interval"] for point in curve.values()), strict=True)
    band = [scale * x for x in low], [scale * x for x in high]
    axes.fill_between(counts, *band, color=line.get_color(), alpha=0.12, linewidth=0)


def _finish_counts(axes: Any, title: str, unit: str) -> None:
    """Title, labels, grid and legend of a panel over N."""
    axes.set(title=title, xlabel="candidates N", ylabel=unit)
    _counts_axis(axes, axes.lines[0].get_xdata())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _counts_axis(axes: Any, counts: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(int(n)) for n in counts], fontsize=8)


def _mean(value: Any) -> float | None:
    """A point's mean; FID and Inception Score are numbers alone, or None."""
    mean: float | None = value["mean"] if isinstance(value, dict) else value
    return mean


def check_ending(path: Path, name: str) -> None:
    """Raises ValueError where matplotlib cannot write files that end so. name: of the option."""
    known = pyplot().figure().canvas.get_supported_filetypes()
    pyplot().close()
    if path.suffix[1:].lower() not in known:
        raise ValueError(
            f"{name}: expected a name that ends in .{', .'.join(sorted(known))}, got {str(path)!r}"
        )


def pyplot() -> Any:
    """matplotlib, drawing to files; ValueError that says how to install it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'dalle1[eval]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt

"""The curves of a ranking benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Results = dict[str, Any]
TITLES = {"fid": "FID", "inception_score": "Inception Score", "clip_score": "CLIP score"}
COLORS = ("tab:blue", "tab:orange", "tab:green")


def plot_counts(results: Results, path: Path) -> None:
    """Figures of CLIP's first of N against N, with 95 % intervals (as the paper's figure 9, right:
    quality against the sample size)."""
    groups = results["groups"]
    judged = all("accuracy" in g["curves"] for g in groups.values())
    with Figure(path, 1 + judged * (1 + len(groups))) as panels:
        score, *rest = panels
        for (name, group), color in zip(groups.items(), COLORS, strict=False):
            _line(score, group["curves"]["clip_score"], name, color)
        _name(score, "CLIP score of the first", "cosine similarity")
        if not judged:
            return
        accuracy, *by_group = rest
        for (name, group), color in zip(groups.items(), COLORS, strict=False):
            _line(accuracy, group["curves"]["accuracy"], f"{name}, CLIP's first", color, 100)
            _line(accuracy, group["curves"]["oracle"], f"{name}, any", color, 100, "--")
        _name(accuracy, "captions shown exactly", "%")
        for (name, group), axes in zip(groups.items(), by_group, strict=True):
            for attribute, curve in group["curves"]["attributes"].items():
                if curve:
                    _line(axes, curve, attribute, None, 100)
            _name(axes, f"CLIP's first, {name}", "% right")


def plot_blur(results: Results, path: Path) -> None:
    """FID and Inception Score against the blur radius and against N (the paper's figure 9)."""
    groups = results["groups"]
    counts, radii = results["counts"], results["blur"]
    some = sorted({counts[0], counts[len(counts) // 2], counts[-1]})
    with Figure(path, 2 * len(TITLES), columns=len(TITLES)) as panels:
        for i, key in enumerate(TITLES):
            by_blur, by_count = panels[i], panels[i + len(TITLES)]
            for (name, group), color in zip(groups.items(), COLORS, strict=False):
                table = group["pictures"]
                for n, style in zip(some, (":", "--", "-")[-len(some) :], strict=True):
                    values = [_mean(table[f"{r:g}"][n][key]) for r in radii]
                    if None not in values:
                        by_blur.plot(radii, values, style, color=color, label=f"{name}, N = {n}")
                for r, style in zip((radii[0], radii[-1]), ("-", ":"), strict=True):
                    values = [_mean(table[f"{r:g}"][n][key]) for n in counts]
                    if None not in values:
                        by_count.plot(
                            counts, values, style, color=color, label=f"{name}, r = {r:g}"
                        )
            title = TITLES[key]
            by_blur.set(title=title, xlabel="blur radius, pixels")
            by_count.set(title=title, xlabel="candidates N")
            _counts_axis(by_count, counts)
            for axes in (by_blur, by_count):
                axes.grid(alpha=0.3)
                if axes.lines:
                    axes.legend(fontsize=6)


class Figure:
    """Panels of a figure that is written when the block ends."""

    def __init__(self, path: Path, panels: int, columns: int = 4) -> None:
        columns = min(columns, panels)
        rows = -(-panels // columns)
        self.path = path
        self.plt = pyplot()
        self.figure, axes = self.plt.subplots(
            rows, columns, figsize=(4.2 * columns, 3.5 * rows), squeeze=False, layout="constrained"
        )
        self.panels = list(axes.flat[:panels])

    def __enter__(self) -> list[Any]:
        return self.panels

    def __exit__(self, *error: object) -> None:
        self.figure.savefig(self.path, dpi=120)
        self.plt.close(self.figure)


def _line(
    axes: Any, curve: Results, label: str, color: str | None, scale: float = 1, style: str = "o-"
) -> None:
    counts = [int(n) for n in curve]
    means = [scale * point["mean"] for point in curve.values()]
    (drawn,) = axes.plot(counts, means, style, color=color, label=label, markersize=3)
    low, high = zip(*(point["interval"] for point in curve.values()), strict=True)
    band = [scale * x for x in low], [scale * x for x in high]
    axes.fill_between(counts, *band, color=drawn.get_color(), alpha=0.12, linewidth=0)


def _name(axes: Any, title: str, unit: str) -> None:
    axes.set(title=title, xlabel="candidates N", ylabel=unit)
    _counts_axis(axes, axes.lines[0].get_xdata())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _counts_axis(axes: Any, counts: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(int(n)) for n in counts], fontsize=8)


def _mean(value: Any) -> float | None:
    found: float | None = value["mean"] if isinstance(value, dict) else value
    return found


def pyplot() -> Any:
    """matplotlib, drawing to files; ValueError that says how to install it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'dalle1[curves]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt

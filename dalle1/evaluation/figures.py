"""The curves, the contact sheet and the page of a ranking benchmark."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dalle1.evaluation.benchmark import RESULT, Benchmark, sheet_rows
from dalle1.files import write_text
from dalle1.pictures import contact_sheet

Results = dict[str, Any]
TITLES = {"fid": "FID", "inception_score": "Inception Score", "clip_score": "CLIP score"}
COLOURS = ("tab:blue", "tab:orange", "tab:green")


def write_page(found: Benchmark, folder: Path) -> Path:
    """Writes the figures beside the results and a page that shows all; returns the page."""
    rows, captions, titles = sheet_rows(found)
    contact_sheet(rows, captions, titles).save(folder / "sheet.png")
    plot_counts(found.results, folder / "best_of_n.png")
    plot_blur(found.results, folder / "blur.png")
    page = folder / "index.html"
    write_text(page, _page(found.results))
    return page


def plot_counts(results: Results, path: Path) -> None:
    """Figures of CLIP's first of N against N, with 95 % intervals (as the paper's figure 9, right:
    quality against the sample size)."""
    groups = results["groups"]
    judged = all("accuracy" in g["curves"] for g in groups.values())
    with Figure(path, 1 + judged * (1 + len(groups))) as panels:
        score, *rest = panels
        for (name, group), colour in zip(groups.items(), COLOURS, strict=False):
            _line(score, group["curves"]["clip_score"], name, colour)
        _name(score, "CLIP score of the first", "cosine similarity")
        if not judged:
            return
        accuracy, *by_group = rest
        for (name, group), colour in zip(groups.items(), COLOURS, strict=False):
            _line(accuracy, group["curves"]["accuracy"], f"{name}, CLIP's first", colour, 100)
            _line(accuracy, group["curves"]["oracle"], f"{name}, any", colour, 100, "--")
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
            for (name, group), colour in zip(groups.items(), COLOURS, strict=False):
                table = group["pictures"]
                for n, style in zip(some, (":", "--", "-")[-len(some) :], strict=True):
                    values = [_mean(table[f"{r:g}"][n][key]) for r in radii]
                    if None not in values:
                        by_blur.plot(radii, values, style, color=colour, label=f"{name}, N = {n}")
                for r, style in zip((radii[0], radii[-1]), ("-", ":"), strict=True):
                    values = [_mean(table[f"{r:g}"][n][key]) for n in counts]
                    if None not in values:
                        by_count.plot(
                            counts, values, style, color=colour, label=f"{name}, r = {r:g}"
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
    axes: Any, curve: Results, label: str, colour: str | None, scale: float = 1, style: str = "o-"
) -> None:
    counts = [int(n) for n in curve]
    means = [scale * point["mean"] for point in curve.values()]
    (drawn,) = axes.plot(counts, means, style, color=colour, label=label, markersize=3)
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


def _page(results: Results) -> str:
    settings = results["settings"]
    parts = [
        "<!doctype html><meta charset=utf-8><title>Ranking benchmark</title>",
        "<style>body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;text-align:right;"
        "border-bottom:1px solid #ccc}img{max-width:100%}</style>",
        f"<h1>{html.escape(settings['model'])}</h1>",
        f"<p>{settings['candidates']} candidates a caption, temperature "
        f"{settings['temperature']:g}, guidance {settings['guidance']:g}, seed "
        f"{settings['seed']}. Intervals: 95 %, by resampling captions.</p>",
        "<h2>CLIP's first of N</h2><img src=best_of_n.png>",
    ]
    for name, group in results["groups"].items():
        curves = group["curves"]
        flat = curves["flat_from"]
        parts.append(
            f"<h3>{html.escape(name)}: {group['captions']} captions, "
            + (f"flat from N = {flat} on</h3>" if flat else "still rising at the last N</h3>")
        )
        parts.append(_table(curves))
    parts.append("<h2>Best of N</h2><img src=sheet.png>")
    parts.append("<h2>Against blur</h2>")
    parts.append(
        "<p>One picture a caption, CLIP's first of N; both sets blurred. Features: "
        f"{html.escape(settings['features'] or 'embeddings of the CLIP that ranks')}.</p>"
        "<img src=blur.png>"
    )
    for name, group in results["groups"].items():
        parts.append(f"<h3>{html.escape(name)}: FID by blur radius</h3>")
        parts.append(_grid(group["pictures"], results["counts"], _fid))
        parts.append(f"<h3>{html.escape(name)}: Inception Score by blur radius</h3>")
        parts.append(_grid(group["pictures"], results["counts"], _inception))
    parts.append(f"<p>All figures: <a href={RESULT}>{RESULT}</a></p>")
    return "\n".join(parts) + "\n"


def _table(curves: Results) -> str:
    """A row for each N, a column for each curve."""
    columns = {"CLIP score": (curves["clip_score"], 1.0)}
    if "accuracy" in curves:
        columns["shown exactly, %"] = (curves["accuracy"], 100.0)
        columns["any of N, %"] = (curves["oracle"], 100.0)
        columns |= {f"{k}, %": (c, 100.0) for k, c in curves["attributes"].items() if c}
    rows = ["<tr><th>N" + "".join(f"<th>{name}" for name in columns)]
    for n in curves["clip_score"]:
        cells = []
        for curve, scale in columns.values():
            mean, (low, high) = curve[n]["mean"], curve[n]["interval"]
            digits = 1 if scale > 1 else 3
            cells.append(
                f"<td title='{scale * low:.{digits}f} to {scale * high:.{digits}f}'>"
                f"{scale * mean:.{digits}f}"
            )
        rows.append(f"<tr><td>{n}" + "".join(cells))
    return "<table>" + "\n".join(rows) + "</table>"


def _grid(pictures: Results, counts: list[int], value: Callable[[Results], str]) -> str:
    """A row for each N, a column for each blur radius."""
    rows = ["<tr><th>N" + "".join(f"<th>r = {r}" for r in pictures)]
    for n in counts:
        rows.append(f"<tr><td>{n}" + "".join(f"<td>{value(pictures[r][n])}" for r in pictures))
    return "<table>" + "\n".join(rows) + "</table>"


def _fid(point: Results) -> str:
    return "-" if point["fid"] is None else f"{point['fid']:.3f}"


def _inception(point: Results) -> str:
    return "-" if point["inception_score"] is None else f"{point['inception_score']:.2f}"

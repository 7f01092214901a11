"""The page of a ranking benchmark."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path

from dalle1.common.files import write_text
from dalle1.common.images import contact_sheet
from dalle1.evaluation.benchmark import RESULT, Benchmark, sheet_rows
from dalle1.evaluation.plots import Results, plot_blur, plot_counts


def write_page(found: Benchmark, folder: Path) -> Path:
    """Writes the figures beside the results and a page that shows all; returns the page."""
    rows, captions, titles = sheet_rows(found)
    contact_sheet(rows, captions, titles).save(folder / "sheet.png")
    plot_counts(found.results, folder / "best_of_n.png")
    plot_blur(found.results, folder / "blur.png")
    page = folder / "index.html"
    write_text(page, _page(found.results))
    return page


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

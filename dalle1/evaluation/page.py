"""The web page of a ranking benchmark."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path

from dalle1.common.files import write_text
from dalle1.common.images import contact_sheet
from dalle1.evaluation.benchmark import RESULT, RankingBenchmark, contact_sheet_rows
from dalle1.evaluation.plots import Results, plot_blur, plot_counts

HEAD = (
    "<!doctype html><meta charset=utf-8><title>Ranking benchmark</title>\n"
    "<style>body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;text-align:right;"
    "border-bottom:1px solid #ccc}img{max-width:100%}</style>"
)


def write_page(benchmark: RankingBenchmark, folder: Path) -> Path:
    """Writes the contact sheet, the plots and a page that shows them; returns the page."""
    rows, captions, titles = contact_sheet_rows(benchmark)
    contact_sheet(rows, captions, titles).save(folder / "sheet.png")
    plot_counts(benchmark.results, folder / "best_of_n.png")
    plot_blur(benchmark.results, folder / "blur.png")
    page = folder / "index.html"
    write_text(page, _page(benchmark.results))
    return page


def _page(results: Results) -> str:
    parts = [
        HEAD,
        *_introduction(results),
        *_curves(results),
        "<h2>Best of N</h2><img src=sheet.png>",
        *_blur(results),
        f"<p>All figures: <a href={RESULT}>{RESULT}</a></p>",
    ]
    return "\n".join(parts) + "\n"


def _introduction(results: Results) -> list[str]:
    settings = results["settings"]
    judged = settings["judged_candidates"]
    return [
        f"<h1>{html.escape(settings['model'])}</h1>",
        f"<p>{settings['candidates']} candidates a caption, temperature "
        f"{settings['temperature']:g}, guidance {settings['guidance']:g}, seed "
        f"{settings['seed']}. Intervals: 95 %, by resampling captions.</p>",
        "<p>The upper half of each true image is given; the lower half is drawn and judged.</p>"
        if settings["completion"]
        else "",
        f"<p>Of each caption {judged} candidates are judged: half of them are the ranker's best, "
        "half any of the others, from which the rest is estimated.</p>"
        if judged and judged < settings["candidates"]
        else "",
        *(f"<p>{html.escape(note)}</p>" for note in results["notes"]),
    ]


def _curves(results: Results) -> list[str]:
    parts = ["<h2>The ranker's first of N</h2><img src=best_of_n.png>"]
    for name, group in results["groups"].items():
        flat = group["curves"]["flat_from"]
        rise = f"flat from N = {flat} on" if flat else "still rising at the last N"
        parts.append(f"<h3>{html.escape(name)}: {group['captions']} captions, {rise}</h3>")
        parts.append(_curves_table(group["curves"], results["names"]["clip_score"]))
        if "kinds" in group:
            parts.append(_kinds_table(group["kinds"]))
    return parts


def _blur(results: Results) -> list[str]:
    names, true, side = results["names"], results["true_images"], results["image_size"]
    against = f"against {true['images']:,} true images" if true["images"] else "without true ones"
    if true["unreadable"]:
        against += f" ({true['unreadable']:,} cannot be read)"
    parts = [
        "<h2>Against blur</h2>",
        f"<p>One image a caption, the ranker's first of N, {against}. Both are {side} x {side} "
        f"pixels and blurred alike. Features: {html.escape(names['features'])}. The Inception "
        f"Score is the mean over {results['settings']['inception_splits']} parts of the images, "
        "± its standard deviation.</p><img src=blur.png>",
    ]
    for name, group in results["groups"].items():
        for key, cell in (("fid", _fid), ("inception_score", _inception_score)):
            title = f"{html.escape(name)}: {html.escape(names[key])} by blur radius"
            parts.append(f"<h3>{title}</h3>")
            parts.append(_blur_table(group["pictures"], results["counts"], cell))
    return parts


def _curves_table(curves: Results, score: str) -> str:
    """A row for each N, a column for each curve; a cell's tooltip is its interval.

    score: what the ranker's score is called.
    """
    columns = {score: (curves["clip_score"], 1.0)}
    if "accuracy" in curves:
        columns["shown exactly, %"] = (curves["accuracy"], 100.0)
        if "oracle" in curves:
            columns["any of N, %"] = (curves["oracle"], 100.0)
        columns |= {f"{k}, %": (c, 100.0) for k, c in curves["attributes"].items() if c}
    rows = ["<tr><th>N" + "".join(f"<th>{name}" for name in columns)]
    for n in curves["clip_score"]:
        cells = [_point(curve[n], scale) for curve, scale in columns.values()]
        rows.append(f"<tr><td>{n}" + "".join(cells))
    return "<table>" + "\n".join(rows) + "</table>"


def _kinds_table(kinds: Results) -> str:
    """A row for each kind of scene: a single draw, and the ranker's first of all candidates."""
    names = list(dict.fromkeys(n for g in kinds.values() for n in g["curves"]["attributes"]))
    heads = "".join(f"<th>{name}, %" for name in ("shown exactly", *names))
    rows = [f"<tr><th>scene<th>captions<th>N{heads}"]
    for kind, group in kinds.items():
        curves = group["curves"]
        of_all = [curves["accuracy"], *(curves["attributes"][name] for name in names)]
        for n in dict.fromkeys((next(iter(of_all[0])), list(of_all[0])[-1])):
            cells = [_point(curve[n], 100) if curve else "<td>-" for curve in of_all]
            rows.append(
                f"<tr><td>{html.escape(kind)}<td>{group['captions']}<td>{n}" + "".join(cells)
            )
    return "<table>" + "\n".join(rows) + "</table>"


def _point(point: Results, scale: float) -> str:
    """A cell of a mean, whose tooltip is its interval."""
    mean, (low, high) = point["mean"], point["interval"]
    digits = 1 if scale > 1 else 3
    title = f"{scale * low:.{digits}f} to {scale * high:.{digits}f}"
    return f"<td title='{title}'>{scale * mean:.{digits}f}"


def _blur_table(by_radius: Results, counts: list[int], cell: Callable[[Results], str]) -> str:
    """A row for each N, a column for each blur radius."""
    rows = ["<tr><th>N" + "".join(f"<th>r = {radius}" for radius in by_radius)]
    for n in counts:
        cells = [f"<td>{cell(points[n])}" for points in by_radius.values()]
        rows.append(f"<tr><td>{n}" + "".join(cells))
    return "<table>" + "\n".join(rows) + "</table>"


def _fid(point: Results) -> str:
    return "-" if point["fid"] is None else f"{point['fid']:.3f}"


def _inception_score(point: Results) -> str:
    if point["inception_score"] is None:
        return "-"
    deviation = point["inception_score_deviation"]
    return f"{point['inception_score']:.2f}" + (f" ± {deviation:.2f}" if deviation else "")

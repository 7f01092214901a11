"""Figures by group and by kind of scene, as JSON and as lines of text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle1.common.config import Section, save_settings
from dalle1.common.files import write_text
from dalle1.evaluation.judged import NOT_CLAIMED, Prompt
from dalle1.evaluation.metrics import Point, mean_and_interval


def by_group_and_kind(
    prompts: Sequence[Prompt], figures: Callable[[Sequence[int]], dict[str, Any]]
) -> dict[str, Any]:
    """Figures of each group, and in its `kinds` those of each kind, where there are several.

    figures: of prompts that are given by their numbers.
    """
    groups: dict[str, Any] = {}
    for group in dict.fromkeys(p.group for p in prompts):
        of_group = [i for i, p in enumerate(prompts) if p.group == group]
        groups[group] = figures(of_group)
        kinds = sorted({kind for i in of_group if (kind := prompts[i].kind) is not None})
        if kinds:
            groups[group]["kinds"] = {
                kind: figures([i for i in of_group if prompts[i].kind == kind]) for kind in kinds
            }
    return groups


def judged_shares(
    checks: Sequence[Sequence[int]], attributes: Sequence[str], resamples: int
) -> dict[str, Point]:
    """The share of images that are right in all, and in each attribute where it is claimed.

    checks: what `JudgedData.check` says of each image.
    """
    shares = {"all right": mean_and_interval([float(all(c)) for c in checks], resamples)}
    for a, name in enumerate(attributes):
        claimed = [float(c[a]) for c in checks if c[a] != NOT_CLAIMED]
        if claimed:
            shares[name] = mean_and_interval(claimed, resamples)
    return shares


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """So many prompts, of all groups in turn, in the order of the groups."""
    groups = list(dict.fromkeys(p.group for p in prompts))
    seen: Counter[str] = Counter()
    numbered = []
    for i, prompt in enumerate(prompts):
        numbered.append((seen[prompt.group], groups.index(prompt.group), i))
        seen[prompt.group] += 1
    chosen = sorted(numbered)[:count]
    return [prompts[i] for i in sorted(i for _, _, i in chosen)]


def save_results(settings: Section, results: dict[str, Any], path: Path) -> None:
    """Writes the results as JSON, and the settings beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_settings(settings, path.parent / "config.yaml")
    write_text(path, json.dumps(results, indent=1) + "\n")


def lines_of(groups: Mapping[str, Any], key: str, size: str) -> Iterator[str]:
    """A table of shares in percent: a line for each group and kind.

    Args:
        groups: see `by_group_and_kind`.
        key: of the shares in a group's figures.
        size: key of the number of images or captions.
    """
    rows = []
    for group, figures in groups.items():
        rows.append((group, figures))
        rows += [(f"{group}, {kind}", f) for kind, f in figures.get("kinds", {}).items()]
    names = list(dict.fromkeys(name for _, figures in rows for name in figures[key]))
    decibels = key == "copies" and any(figures["psnr"] for _, figures in rows)
    width = max(len(title) for title, _ in rows)
    heads = [f"{'PSNR, dB':>10}"] if decibels else []
    widths = [max(len(name) + 2, 10) for name in names]
    heads += [f"{name:>{w}}" for name, w in zip(names, widths, strict=True)]
    yield f"{key:{width}}{size:>10}" + "".join(heads)
    for title, figures in rows:
        cells = [f"{title:{width}}{figures[size]:10}"]
        if decibels:
            found = figures["psnr"]
            cells.append(f"{found['mean']:10.2f}" if found else f"{'-':>10}")
        for name, w in zip(names, widths, strict=True):
            point = figures[key].get(name)
            cells.append(f"{100 * point['mean']:{w - 1}.1f}%" if point else f"{'-':>{w}}")
        yield "".join(cells)


def ranking_lines(results: Mapping[str, Any]) -> Iterator[str]:
    """Tables of the figures of a ranking benchmark: of single draws, and of the ranker's first of
    all candidates; nothing where there is no judge.

    results: as `benchmark.measure` gives them, or as they are read back.
    """
    groups = results["groups"]
    if not all("accuracy" in group["curves"] for group in groups.values()):
        return
    first, last = results["counts"][0], results["counts"][-1]
    for n, title in {first: "single draws", last: f"first of {last}"}.items():
        yield from lines_of(_at(groups, n, title), title, "captions")


def _at(groups: Mapping[str, Any], n: int, title: str) -> dict[str, Any]:
    """The shares of groups and kinds at one N, under a title."""
    found: dict[str, Any] = {}
    for name, group in groups.items():
        curves = {"all right": group["curves"]["accuracy"], **group["curves"]["attributes"]}
        # Keys of JSON are text.
        points = {k: {str(count): point for count, point in c.items()} for k, c in curves.items()}
        found[name] = {
            "captions": group["captions"],
            title: {k: c[str(n)] for k, c in points.items() if c},
            "kinds": _at(group.get("kinds", {}), n, title),
        }
    return found

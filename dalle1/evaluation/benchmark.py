"""What ranking gains: every figure as a function of the number of candidates and of the blur.

Dimensions: q captions, b candidates, f features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dalle1.common.config import SHAPES
from dalle1.common.files import write_text
from dalle1.common.images import to_pil
from dalle1.evaluation import best_of_n as ranking
from dalle1.evaluation.candidates import ATTRIBUTES, NOT_CLAIMED, Draws, read_draws, verdict
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.metrics import (
    BATCH,
    Comparison,
    Network,
    batches,
    blurred,
    interval,
    named_network,
    no_features,
    ranker_network,
)
from dalle1.evaluation.prompts import Prompt, true_pictures
from dalle1.generation.images import decode
from dalle1.model import Model
from dalle1.protocols import EmbeddingRanker

FLAT = 0.02  # a curve is called flat from where it is within this share of its rise
RESULT = "ranking.json"


@dataclass
class Benchmark:
    """All that was found, and the pictures that show it."""

    results: dict[str, Any]
    prompts: list[Prompt]  # those shown
    best: list[list[Tensor]] = field(default_factory=list)  # [shown][counts] of pixels [3, H, W]


def measure(
    model: Model, prompts: Sequence[Prompt], settings: RankSettings, network: Network
) -> Benchmark:
    """Figures of what `draw_all` has drawn; network: see `network_of`."""
    counts = ranking.counts(settings.candidates)
    groups: dict[str, Any] = {}
    for group in dict.fromkeys(p.group for p in prompts):
        of_group = [p for p in prompts if p.group == group]
        # Without the tokens, which of thousands of captions fill the memory.
        own = [d.without_tokens() for d in read_draws(of_group, settings)]
        groups[group] = {"captions": len(own), "curves": curves(own, counts, settings.bootstrap)}
    comparisons, best = compare(model, prompts, counts, settings, network)
    for group, values in comparisons.items():
        groups[group]["pictures"] = values
    results = {
        "settings": settings.model_dump(),
        "counts": counts,
        "blur": settings.blur,
        "groups": groups,
    }
    return Benchmark(results, list(prompts[: settings.shown]), best)


def curves(draws: Sequence[Draws], counts: Sequence[int], resamples: int) -> dict[str, Any]:
    """Expected figures of CLIP's first of N candidates, exact over all choices of N of those drawn:
    the score and, where there is a checker, the share that it passes, in all and by attribute.

    Each point has a mean over the captions and its 95 % interval.
    """
    found: dict[str, Any] = {"clip_score": {}}
    judged = draws[0].verdicts.shape[1] > 0
    if judged:
        found |= {"accuracy": {}, "oracle": {}, "attributes": {name: {} for name in ATTRIBUTES}}
    for n in counts:

        def best(
            values: Sequence[tuple[Draws, Tensor]], n: int = n
        ) -> dict[str, float | list[float]]:
            points = [ranking.best_of_n(d.scores, v, n) for d, v in values]
            return _point(points, resamples)

        found["clip_score"][n] = best([(d, d.scores) for d in draws])
        if not judged:
            continue
        found["accuracy"][n] = best([(d, d.correct.float()) for d in draws])
        oracle = [ranking.oracle_of_n(d.correct, n) for d in draws]
        found["oracle"][n] = _point(oracle, resamples)
        for i, name in enumerate(ATTRIBUTES):
            claimed = [d for d in draws if int(d.verdicts[0, i]) != NOT_CLAIMED]
            if claimed:
                values = [(d, d.verdicts[:, i].float()) for d in claimed]
                found["attributes"][name][n] = best(values)
    name = "accuracy" if judged else "clip_score"
    found["flat_from"] = flat_from({n: point["mean"] for n, point in found[name].items()})
    return found


def flat_from(curve: dict[int, float]) -> int | None:
    """The first N at which a curve has all but a fiftieth of its rise over N = 1; None where that
    is the last: it still rises."""
    points = list(curve.items())
    start, top = points[0][1], max(curve.values())
    first = next(n for n, value in points if value >= top - FLAT * (top - start))
    return None if first == points[-1][0] and len(points) > 1 else first


def _point(values: Sequence[float], resamples: int) -> dict[str, float | list[float]]:
    mean = sum(values) / len(values)
    return {"mean": mean, "interval": list(interval(values, resamples))}


def compare(
    model: Model,
    prompts: Sequence[Prompt],
    counts: Sequence[int],
    settings: RankSettings,
    network: Network,
) -> tuple[dict[str, dict[str, Any]], list[list[Tensor]]]:
    """Of each group, blur radius and N the figures of one picture a caption, CLIP's first of
    candidates 0 ... N - 1; and those pictures of the captions that are shown."""
    true = _true(model, network, settings)
    groups = list(dict.fromkeys(p.group for p in prompts))
    drawn = {
        (g, r, n): _Chosen(true[r], settings) for g in groups for r in settings.blur for n in counts
    }
    shown: list[list[Tensor]] = []
    bar = tqdm(prompts, desc="measuring", unit="caption", mininterval=5)
    for prompt, d in zip(bar, read_draws(prompts, settings), strict=True):
        chosen = [int(d.scores[:n].argmax()) for n in counts]
        different = sorted(set(chosen))
        images = decode(model.codec, d.tokens[different], model.prior.grid)
        if len(shown) < settings.shown:
            shown.append([images[different.index(i)] for i in chosen])
        for r in settings.blur:
            soft = blurred(images, r)
            found = _figures(model, network, prompt.caption, soft, settings)
            for i, n in zip(chosen, counts, strict=True):
                drawn[prompt.group, r, n].add(found, different.index(i))
    bar.close()
    return {
        g: {
            f"{r:g}": {n: drawn[g, r, n].values(settings.bootstrap) for n in counts}
            for r in settings.blur
        }
        for g in groups
    }, shown


@dataclass
class _Found:
    """Figures of some pictures of one caption."""

    features: Tensor  # [n, f]
    logits: Tensor | None  # [n, k]
    scores: Tensor  # [n]
    correct: list[bool] | None


def _figures(
    model: Model, network: Network, caption: str, images: Tensor, settings: RankSettings
) -> _Found:
    assert model.ranker is not None
    features, logits = network(images)
    scores = model.ranker.score([caption], images)[0]
    correct = None
    if settings.data == SHAPES:
        correct = [all(verdict(p, caption)) for p in images]  # NOT_CLAIMED counts as right
    return _Found(features, logits, scores, correct)


class _Chosen:
    """One picture of each caption, chosen among the first N."""

    def __init__(self, true: Comparison, settings: RankSettings) -> None:
        self.comparison = Comparison(true.features, settings.inception_splits)
        self.comparison.add_true(true)
        self.waiting: list[tuple[Tensor, Tensor | None]] = []
        self.scores: list[float] = []
        self.correct: list[float] = []

    def _compare(self) -> None:
        if self.waiting:
            features, logits = zip(*self.waiting, strict=True)
            known = None if logits[0] is None else torch.stack(logits)
            self.comparison.add(torch.stack(features), known, real=False)
            self.waiting.clear()

    def add(self, found: _Found, i: int) -> None:
        logits = None if found.logits is None else found.logits[i]
        self.waiting.append((found.features[i], logits))
        if len(self.waiting) == BATCH:
            self._compare()
        self.scores.append(float(found.scores[i]))
        if found.correct is not None:
            self.correct.append(float(found.correct[i]))

    def values(self, resamples: int) -> dict[str, Any]:
        self._compare()
        result: dict[str, Any] = {**self.comparison.values()}
        result["clip_score"] = _point(self.scores, resamples)
        if self.correct:
            result["accuracy"] = _point(self.correct, resamples)
        return result


def network_of(model: Model, captions: Sequence[str], settings: RankSettings) -> Network:
    """What FID and Inception Score see images by, tried on one; ValueError if it cannot.

    Where the settings name none it is the ranker, and nothing where that compares no embeddings:
    both figures are then left out.
    """
    if settings.features is None:
        if isinstance(model.ranker, EmbeddingRanker):
            return ranker_network(model.ranker, captions)
        return no_features
    network = named_network(settings.features)
    network(torch.zeros(1, 3, model.image_size, model.image_size))
    return network


def _true(model: Model, network: Network, settings: RankSettings) -> dict[float, Comparison]:
    """The true pictures at each blur radius; without any, nothing to compare with."""
    side = model.image_size
    features, _ = network(torch.zeros(1, 3, side, side))
    found = {r: Comparison(features.shape[1], settings.inception_splits) for r in settings.blur}
    pictures = true_pictures(settings, side)
    for images in batches(pictures) if pictures is not None else ():
        for r, comparison in found.items():
            comparison.add(*network(blurred(images, r)), real=True)
    return found


def save(found: Benchmark, folder: Path) -> None:
    """Writes the figures as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULT, json.dumps(found.results, indent=1) + "\n")


def sheet_rows(found: Benchmark) -> tuple[list[list[Any]], list[str], list[str]]:
    """For a contact sheet: CLIP's first of N of every caption shown, N = 1, 8, 64 ... and all."""
    counts = found.results["counts"]
    columns = [i for i in range(len(counts)) if i % 3 == 0 or i == len(counts) - 1]
    rows = [[to_pil(row[i]) for i in columns] for row in found.best]
    return rows, [p.caption for p in found.prompts], [f"N = {counts[i]}" for i in columns]

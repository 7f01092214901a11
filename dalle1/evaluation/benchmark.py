"""What ranking gains: each figure against the number of candidates N and against the blur.

`curves` takes scores and checks of all candidates. `compare` decodes one image a caption for each
N, the ranker's first, and compares these images with true ones.

Dimensions: b candidates, n images, f features, k classes, H W image height and width.
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
from dalle1.evaluation.best_of_n import best_of_n, candidate_counts, oracle_of_n
from dalle1.evaluation.candidates import (
    ATTRIBUTES,
    NOT_CLAIMED,
    CaptionCandidates,
    check_image,
    read_candidates,
)
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.metrics import (
    BATCH,
    Comparison,
    FeatureNetwork,
    batches,
    blurred,
    interval,
    named_network,
    no_features,
    ranker_network,
)
from dalle1.evaluation.prompts import Prompt, true_images
from dalle1.generation.images import decode
from dalle1.model import Model
from dalle1.protocols import EmbeddingRanker

FLAT = 0.02  # a curve is called flat from where it is within this share of its rise
RESULT = "ranking.json"

Point = dict[str, float | list[float]]  # {"mean": ..., "interval": [low, high]}


@dataclass
class RankingBenchmark:
    """All figures, and the images of the contact sheet."""

    results: dict[str, Any]  # the content of ranking.json
    sheet_prompts: list[Prompt]
    sheet_images: list[list[Tensor]] = field(default_factory=list)  # [prompts][counts] [3, H, W]


def measure(
    model: Model, prompts: Sequence[Prompt], settings: RankSettings, network: FeatureNetwork
) -> RankingBenchmark:
    """All figures of the candidates that `draw_candidates` has kept.

    Args:
        network: what FID and Inception Score are computed with, see `feature_network`.
    """
    counts = candidate_counts(settings.candidates)
    groups: dict[str, Any] = {}
    for group in dict.fromkeys(p.group for p in prompts):
        of_group = [p for p in prompts if p.group == group]
        # The tokens of thousands of captions would fill the memory.
        candidates = [c.without_tokens() for c in read_candidates(of_group, settings)]
        groups[group] = {
            "captions": len(candidates),
            "curves": curves(candidates, counts, settings.bootstrap),
        }
    image_figures, sheet_images = compare(model, prompts, counts, settings, network)
    for group, figures in image_figures.items():
        groups[group]["pictures"] = figures
    results = {
        "settings": settings.model_dump(),
        "counts": counts,
        "blur": settings.blur,
        "groups": groups,
    }
    return RankingBenchmark(results, list(prompts[: settings.sheet_captions]), sheet_images)


def curves(
    candidates: Sequence[CaptionCandidates], counts: Sequence[int], resamples: int
) -> dict[str, Any]:
    """Expected figures of the ranker's first of N candidates, one curve over N each.

    They are exact over all choices of N of each caption's candidates. Each point has the mean over
    the captions and its 95 % interval.

    Returns:
        `clip_score`; `flat_from`, see the function. With a checker also `accuracy`, the share of
        captions that the first shows exactly; `oracle`, the share that at least one of N shows;
        and `attributes`, the accuracy of each attribute over the captions that claim it.
    """
    result: dict[str, Any] = {
        "clip_score": _best_of_n_curve(
            [(c.scores, c.scores) for c in candidates], counts, resamples
        )
    }
    checked = candidates[0].checks.shape[1] > 0
    if checked:
        correct = [(c.scores, c.correct.float()) for c in candidates]
        result["accuracy"] = _best_of_n_curve(correct, counts, resamples)
        result["oracle"] = {
            n: _mean_and_interval([oracle_of_n(c.correct, n) for c in candidates], resamples)
            for n in counts
        }
        result["attributes"] = {}
        for i, name in enumerate(ATTRIBUTES):
            claiming = [c for c in candidates if int(c.checks[0, i]) != NOT_CLAIMED]
            values = [(c.scores, c.checks[:, i].float()) for c in claiming]
            curve = _best_of_n_curve(values, counts, resamples) if claiming else {}
            result["attributes"][name] = curve
    main = result["accuracy" if checked else "clip_score"]
    result["flat_from"] = flat_from({n: point["mean"] for n, point in main.items()})
    return result


def _best_of_n_curve(
    captions: Sequence[tuple[Tensor, Tensor]], counts: Sequence[int], resamples: int
) -> dict[int, Point]:
    """The mean value of the best-scored of N, over N.

    captions: scores [b] and values [b] of each caption.
    """
    return {
        n: _mean_and_interval([best_of_n(scores, v, n) for scores, v in captions], resamples)
        for n in counts
    }


def flat_from(curve: dict[int, float]) -> int | None:
    """The first N at which a curve has reached all but a fiftieth of its rise over N = 1.

    None where that is the last N: the curve still rises.
    """
    points = list(curve.items())
    start, top = points[0][1], max(curve.values())
    first = next(n for n, value in points if value >= top - FLAT * (top - start))
    return None if first == points[-1][0] and len(points) > 1 else first


def _mean_and_interval(values: Sequence[float], resamples: int) -> Point:
    return {"mean": sum(values) / len(values), "interval": list(interval(values, resamples))}


def compare(
    model: Model,
    prompts: Sequence[Prompt],
    counts: Sequence[int],
    settings: RankSettings,
    network: FeatureNetwork,
) -> tuple[dict[str, dict[str, Any]], list[list[Tensor]]]:
    """Figures of one image a caption, the ranker's first of candidates 0 ... N - 1 (figure 9).

    Returns:
        The figures by group, blur radius and N, and the images [captions][counts] of the captions
        on the contact sheet.
    """
    true = _true_images(model, network, settings)
    groups = list(dict.fromkeys(p.group for p in prompts))
    chosen = {
        (group, radius, n): _ChosenImages(true[radius], settings)
        for group in groups
        for radius in settings.blur
        for n in counts
    }
    sheet_images: list[list[Tensor]] = []
    bar = tqdm(prompts, desc="measuring", unit="caption", mininterval=5)
    for prompt, candidates in zip(bar, read_candidates(prompts, settings), strict=True):
        images, chosen_rows = _chosen_images(model, candidates, counts)
        if len(sheet_images) < settings.sheet_captions:
            sheet_images.append([images[row] for row in chosen_rows])
        for radius in settings.blur:
            figures = _figures(model, network, prompt.caption, blurred(images, radius), settings)
            for row, n in zip(chosen_rows, counts, strict=True):
                chosen[prompt.group, radius, n].add(figures, row)
    bar.close()
    return {
        group: {
            f"{radius:g}": {n: chosen[group, radius, n].values(settings.bootstrap) for n in counts}
            for radius in settings.blur
        }
        for group in groups
    }, sheet_images


def _chosen_images(
    model: Model, candidates: CaptionCandidates, counts: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """The ranker's first of candidates 0 ... N - 1 for each N, each decoded once.

    Returns:
        Images [n, 3, H, W], all different, and the row of each N's image among them.
    """
    best = [int(candidates.scores[:n].argmax()) for n in counts]
    different = sorted(set(best))
    images = decode(model.codec, candidates.tokens[different], model.prior.grid)
    return images, [different.index(i) for i in best]


@dataclass
class _ImageFigures:
    """Figures of n images of one caption."""

    features: Tensor  # [n, f]
    logits: Tensor | None  # [n, k]
    scores: Tensor  # [n]
    correct: list[bool] | None  # n; None without a checker


def _figures(
    model: Model, network: FeatureNetwork, caption: str, images: Tensor, settings: RankSettings
) -> _ImageFigures:
    """Figures of images [n, 3, H, W] of one caption."""
    assert model.ranker is not None
    features, logits = network(images)
    scores = model.ranker.score([caption], images)[0]
    correct = None
    if settings.data == SHAPES:
        # NOT_CLAIMED is true: what a caption does not claim cannot be wrong.
        correct = [all(check_image(image, caption)) for image in images]
    return _ImageFigures(features, logits, scores, correct)


class _ChosenImages:
    """Figures of a set of images, one of each caption, added one by one."""

    def __init__(self, true: Comparison, settings: RankSettings) -> None:
        self.comparison = Comparison(true.features, settings.inception_splits)
        self.comparison.add_true(true)
        self.pending: list[tuple[Tensor, Tensor | None]] = []  # features and logits of an image
        self.scores: list[float] = []
        self.correct: list[float] = []

    def add(self, figures: _ImageFigures, row: int) -> None:
        """Adds one of a caption's images."""
        logits = None if figures.logits is None else figures.logits[row]
        self.pending.append((figures.features[row], logits))
        if len(self.pending) == BATCH:
            self._compare_pending()
        self.scores.append(float(figures.scores[row]))
        if figures.correct is not None:
            self.correct.append(float(figures.correct[row]))

    def _compare_pending(self) -> None:
        if self.pending:
            features, logits = zip(*self.pending, strict=True)
            stacked = None if logits[0] is None else torch.stack(logits)
            self.comparison.add(torch.stack(features), stacked, real=False)
            self.pending.clear()

    def values(self, resamples: int) -> dict[str, Any]:
        """`fid`, `inception_score`, `clip_score` and, with a checker, `accuracy`."""
        self._compare_pending()
        result: dict[str, Any] = {**self.comparison.values()}
        result["clip_score"] = _mean_and_interval(self.scores, resamples)
        if self.correct:
            result["accuracy"] = _mean_and_interval(self.correct, resamples)
        return result


def feature_network(
    model: Model, captions: Sequence[str], settings: RankSettings
) -> FeatureNetwork:
    """The network that FID and Inception Score are computed with.

    Where the settings name none it is the ranker. A ranker without embeddings gives no features,
    and both figures are left out.

    Raises:
        ValueError: the named network cannot be imported, or fails on a black image.
    """
    if settings.features is None:
        if isinstance(model.ranker, EmbeddingRanker):
            return ranker_network(model.ranker, captions)
        return no_features
    network = named_network(settings.features)
    network(torch.zeros(1, 3, model.image_size, model.image_size))
    return network


def _true_images(
    model: Model, network: FeatureNetwork, settings: RankSettings
) -> dict[float, Comparison]:
    """Features of the true images at each blur radius; none where the data has no images."""
    side = model.image_size
    features, _ = network(torch.zeros(1, 3, side, side))
    by_radius = {r: Comparison(features.shape[1], settings.inception_splits) for r in settings.blur}
    images = true_images(settings, side)
    for batch in batches(images) if images is not None else ():
        for radius, comparison in by_radius.items():
            comparison.add(*network(blurred(batch, radius)), real=True)
    return by_radius


def save(benchmark: RankingBenchmark, folder: Path) -> None:
    """Writes the figures as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULT, json.dumps(benchmark.results, indent=1) + "\n")


def contact_sheet_rows(
    benchmark: RankingBenchmark,
) -> tuple[list[list[Any]], list[str], list[str]]:
    """Rows of PIL images, their captions and the columns' titles, for `contact_sheet`.

    Each row has the ranker's first of N for N = 1, 8, 64 ... and for all candidates.
    """
    counts = benchmark.results["counts"]
    columns = [i for i in range(len(counts)) if i % 3 == 0 or i == len(counts) - 1]
    rows = [[to_pil(images[i]) for i in columns] for images in benchmark.sheet_images]
    captions = [p.caption for p in benchmark.sheet_prompts]
    return rows, captions, [f"N = {counts[i]}" for i in columns]

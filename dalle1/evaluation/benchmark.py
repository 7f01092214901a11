"""What ranking gains: each figure against the number of candidates N and against the blur.

`curves` takes scores and checks of all candidates. `compare` takes one image a caption for each N,
the ranker's first, and compares these images with true ones. The memory does not depend on the
number of images.

Dimensions: b candidates, n images, H W image height and width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle1.common.files import write_text
from dalle1.common.images import to_pil
from dalle1.common.progress import progress_bar
from dalle1.evaluation.best_of_n import (
    best_of_n,
    choose_judged,
    estimate_best_of_n,
    oracle_of_n,
)
from dalle1.evaluation.candidates import CaptionCandidates, read_candidates
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.features import (
    ChosenFeatures,
    FeatureFolder,
    chosen_images,
    read_chosen,
    read_true,
)
from dalle1.evaluation.judged import NOT_CLAIMED, Prompt
from dalle1.evaluation.metrics import (
    FeatureNetwork,
    FrechetDistance,
    InceptionScore,
    Moments,
    Point,
    inception_network,
    mean_and_interval,
    named_network,
    no_features,
    ranker_network,
)
from dalle1.evaluation.tables import by_group_and_kind, spread
from dalle1.generation.ranking import likelihood_weight
from dalle1.model import Model
from dalle1.protocols import EmbeddingRanker

FLAT = 0.02  # a curve is called flat from where it is within this share of its rise
RESULT = "ranking.json"
ROWS = 512  # images whose features are added at once; a product of fewer takes longer for each


@dataclass
class RankingBenchmark:
    """All figures, and the images of the contact sheet."""

    results: dict[str, Any]  # the content of ranking.json
    sheet_prompts: list[Prompt]
    sheet_images: list[list[Tensor]] = field(default_factory=list)  # [prompts][counts] [3, H, W]
    sheet_true: list[Tensor] = field(default_factory=list)  # [prompts] [3, H, W], of judged data


def measure(folder: FeatureFolder, prompts: Sequence[Prompt]) -> RankingBenchmark:
    """All figures of candidates and features that `draw_candidates`, `measure_chosen` and
    `measure_true` have kept."""
    model, settings, counts = folder.model, folder.settings, folder.counts
    candidates = list(read_candidates(prompts, settings, tokens=False))
    attributes = folder.judged.attributes if folder.judged else ()

    def figures_of(numbers: Sequence[int]) -> dict[str, Any]:
        chosen = [candidates[i] for i in numbers]
        limit = settings.judged_candidates
        found = curves(chosen, counts, settings.bootstrap, attributes, limit)
        return {"captions": len(chosen), "curves": found}

    groups = by_group_and_kind(prompts, figures_of)
    image_figures, true_images = compare(folder, prompts)
    for group, figures in image_figures.items():
        groups[group]["pictures"] = figures
    results = {
        "settings": settings.model_dump(),
        "counts": counts,
        "blur": settings.blur,
        "image_size": folder.side,
        "names": network_names(model, settings),
        "true_images": true_images,
        "notes": folder.judged.notes() if folder.judged else [],
        "groups": groups,
    }
    shown = spread(prompts, settings.sheet_captions)
    images = []
    for candidates_of_one in read_candidates(shown, settings):
        different, rows = chosen_images(model, candidates_of_one, counts)
        images.append([different[row] for row in rows])
    true = [folder.judged.image(p, model.image_size) for p in shown] if folder.judged else []
    return RankingBenchmark(results, shown, images, true)


def curves(
    candidates: Sequence[CaptionCandidates],
    counts: Sequence[int],
    resamples: int,
    attributes: Sequence[str] = (),
    judged_candidates: int | None = None,
) -> dict[str, Any]:
    """Expected figures of the ranker's first of N candidates, one curve over N each.

    They are exact over all choices of N of each caption's candidates, or estimated from those that
    were judged. Each point has the mean over the captions and its 95 % interval.

    Args:
        candidates: of each caption.
        counts: the N.
        resamples: of the intervals.
        attributes: that the judge tells apart.
        judged_candidates: the setting.

    Returns:
        `clip_score`; `flat_from`, see the function. With a judge also `accuracy`, the share of
        captions that the first shows exactly; `oracle`, the share that at least one of N shows,
        where all are judged; and `attributes`, the accuracy of each attribute over the captions
        that claim it.
    """
    result: dict[str, Any] = {
        "clip_score": _best_of_n_curve(
            [(c.scores, c.scores) for c in candidates], counts, resamples
        )
    }
    checked = candidates[0].checks.shape[1] > 0
    if checked:
        judged = [choose_judged(c.scores, judged_candidates) for c in candidates]

        def curve(values: Sequence[tuple[int, Tensor]]) -> dict[int, Point]:
            """values: [b] of some captions, with their numbers."""
            return {
                n: mean_and_interval(
                    [estimate_best_of_n(candidates[i].scores, v, n, judged[i]) for i, v in values],
                    resamples,
                )
                for n in counts
                if values
            }

        result["accuracy"] = curve([(i, c.correct) for i, c in enumerate(candidates)])
        if all(bool(c.judged.all()) for c in candidates):
            result["oracle"] = {
                n: mean_and_interval([oracle_of_n(c.correct, n) for c in candidates], resamples)
                for n in counts
            }
        result["attributes"] = {
            name: curve(
                [
                    (i, c.checks[:, a])
                    for i, c in enumerate(candidates)
                    if int(c.checks[judged[i].best[0], a]) != NOT_CLAIMED
                ]
            )
            for a, name in enumerate(attributes)
        }
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
        n: mean_and_interval([best_of_n(scores, v, n) for scores, v in captions], resamples)
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


def compare(
    folder: FeatureFolder, prompts: Sequence[Prompt]
) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Figures of one image a caption, the ranker's first of candidates 0 ... N - 1 (figure 9).

    Returns:
        The figures by group, blur radius and N; and how many true images there are, and how many
        samples have none.
    """
    settings = folder.settings
    groups = list(dict.fromkeys(p.group for p in prompts))
    figures: dict[str, dict[str, Any]] = {group: {} for group in groups}
    true_counts = {"images": 0, "unreadable": 0}
    for i, radius in enumerate(progress_bar(settings.blur, desc="comparing", unit="radius")):
        true, samples = _true_moments(folder, i)
        images = 0 if true is None else true.count
        true_counts = {"images": images, "unreadable": samples - images}
        chosen = {group: [_ChosenImages(settings) for _ in folder.counts] for group in groups}
        for prompt in prompts:
            found = read_chosen(folder, prompt.caption, i)
            for images_of_n, row in zip(chosen[prompt.group], found.rows.tolist(), strict=True):
                images_of_n.add(found, row)
        distance = None if true is None else FrechetDistance(true)
        for group, by_count in chosen.items():
            figures[group][f"{radius:g}"] = {
                n: images_of_n.values(distance, settings.bootstrap)
                for n, images_of_n in zip(folder.counts, by_count, strict=True)
            }
    return figures, true_counts


def _true_moments(folder: FeatureFolder, radius: int) -> tuple[Moments | None, int]:
    """Of the true images at a blur radius, given by its number, and of how many samples.

    None where there are no images.
    """
    moments, samples = None, 0
    for part in read_true(folder, radius):
        samples += part.samples
        if len(part.features):
            moments = moments or Moments(part.features.shape[1])
            moments.add(part.features, "true images")
    return moments, samples


class _ChosenImages:
    """Figures of a set of images, one of each caption, added one by one."""

    def __init__(self, settings: RankSettings) -> None:
        self.moments: Moments | None = None
        self.inception = InceptionScore(settings.inception_splits)
        self.pending: list[tuple[Tensor, Tensor]] = []  # features and logits of an image
        self.scores: list[float] = []
        self.correct: list[float] = []

    def add(self, found: ChosenFeatures, row: int) -> None:
        """Adds one of a caption's images."""
        self.pending.append((found.features[row], found.logits[row]))
        if len(self.pending) == ROWS:
            self._add_pending()
        self.scores.append(float(found.scores[row]))
        if len(found.correct):
            self.correct.append(float(found.correct[row]))

    def _add_pending(self) -> None:
        if not self.pending:
            return
        features, logits = (torch.stack(rows) for rows in zip(*self.pending, strict=True))
        self.pending.clear()
        self.moments = self.moments or Moments(features.shape[1])
        self.moments.add(features, "generated images")
        if logits.shape[1]:
            self.inception.add(logits)

    def values(self, distance: FrechetDistance | None, resamples: int) -> dict[str, Any]:
        """`fid` (None without true images, or with fewer than two of either kind),
        `inception_score` and its standard deviation over the parts (None without classes),
        `clip_score` and, with a checker, `accuracy`."""
        self._add_pending()
        score, deviation = self.inception.values()
        fid = None
        if distance is not None and self.moments is not None:
            fid = distance.to(self.moments)
        result: dict[str, Any] = {
            "fid": fid,
            "inception_score": score,
            "inception_score_deviation": deviation,
            "clip_score": mean_and_interval(self.scores, resamples),
        }
        if self.correct:
            result["accuracy"] = mean_and_interval(self.correct, resamples)
        return result


def feature_network(
    model: Model, captions: Sequence[str], settings: RankSettings
) -> FeatureNetwork:
    """The network that FID and Inception Score are computed with.

    Where the settings name none it is the ranker. A ranker without embeddings gives no features,
    and both figures are left out.

    Raises:
        ValueError: the file of the named network cannot be read, or its function not be imported
            or called on a black image.
    """
    if settings.inception is not None:
        return inception_network(settings.inception, model.device)
    if settings.features is None:
        if isinstance(model.ranker, EmbeddingRanker):
            return ranker_network(model.ranker, captions)
        return no_features
    network = named_network(settings.features)
    side = settings.image_size or model.image_size
    network(torch.zeros(1, 3, side, side))
    return network


def network_names(model: Model, settings: RankSettings) -> dict[str, str]:
    """What the features are, and what the figures are called.

    FID and Inception Score of the ranker's embeddings get names of their own: they are smaller by
    far than those of the Inception network, and compare runs with the same ranker alone. Only the
    score of a ranker with embeddings, to which no likelihood is added, is a CLIP score.
    """
    embeds, weight = isinstance(model.ranker, EmbeddingRanker), likelihood_weight(model.ranker)
    features, fid, inception_score = "none", "FID", "Inception Score"
    if settings.inception is not None:
        features = "Inception network of 2015"
    elif settings.features is not None:
        features = settings.features
        fid, inception_score = f"FID of {features}", f"IS of {features}"
    elif embeds:
        features = "embeddings of the CLIP that ranks; its classes are the captions"
        fid, inception_score = "CLIP-FID", "CLIP-IS"
    return {
        "features": features,
        "fid": fid,
        "inception_score": inception_score,
        "clip_score": "CLIP score" if embeds and not weight else "ranker's score",
    }


def save(benchmark: RankingBenchmark, folder: Path) -> None:
    """Writes the figures as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULT, json.dumps(benchmark.results, indent=1) + "\n")


def contact_sheet_rows(
    benchmark: RankingBenchmark,
) -> tuple[list[list[Any]], list[str], list[str]]:
    """Rows of PIL images, their captions and the columns' titles, for `contact_sheet`.

    Each row has the ranker's first of N for N = 1, 8, 64 ... and for all candidates, and in front
    of them the true image of data that are judged.
    """
    counts = benchmark.results["counts"]
    columns = [i for i in range(len(counts)) if i % 3 == 0 or i == len(counts) - 1]
    rows = [[to_pil(images[i]) for i in columns] for images in benchmark.sheet_images]
    captions = [p.caption for p in benchmark.sheet_prompts]
    titles = [f"N = {counts[i]}" for i in columns]
    if benchmark.sheet_true:
        rows = [[to_pil(t), *row] for t, row in zip(benchmark.sheet_true, rows, strict=True)]
        titles = ["true", *titles]
    return rows, captions, titles

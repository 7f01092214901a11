"""Measures a model trained on the built-in shapes, and draws what it found.

The judge is `dalle1.data.shapes_checker`: it reads a picture and says whether it shows what the
caption says. Captions of the test split that occur in training are left out; the held-out split,
whose (colour, shape) pairs never occur in training, is reported apart.

Dimensions: q captions, m candidates of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dalle1 import ranking
from dalle1.batching import draw_captions
from dalle1.data import shapes
from dalle1.data.shapes_checker import check
from dalle1.model import Model
from dalle1.pictures import contact_sheet
from dalle1.sampling import clip_ids, decode, sample, to_pil, to_tensor

TEST_SEED = 1
SHOWN = 4  # unranked draws beside the best


@dataclass
class Draws:
    """Judged candidates of one split's captions."""

    captions: list[str]
    scores: Tensor  # float32 [q, m], CLIP's
    correct: Tensor  # bool [q, m], the checker's

    def curve(self) -> dict[int, dict[str, float]]:
        """For n = 1, 2, 4 ... m: the share of captions shown exactly, if CLIP (or an oracle)
        picks the best of n draws."""
        most = self.scores.shape[1]
        counts = [2**i for i in range(most.bit_length()) if 2**i <= most]
        rows = list(zip(self.scores, self.correct, strict=True))
        return {
            n: {
                "clip": float(np.mean([ranking.best_of_n(s, c, n) for s, c in rows])),
                "oracle": float(np.mean([ranking.oracle_of_n(c, n) for _, c in rows])),
            }
            for n in counts
        }


def training_captions(count: int) -> set[str]:
    """The captions of the first `count` training samples."""
    return {shapes.make(0, i, "train", shapes.MIN_SIDE).caption for i in range(count)}


def unseen(split: str, count: int, known: set[str], side: int) -> list[shapes.Sample]:
    """The first samples of a split whose captions are neither known nor repeated."""
    known = set(known)
    found: list[shapes.Sample] = []
    index = 0
    while len(found) < count:
        candidate = shapes.make(TEST_SEED, index, split, side)
        if candidate.caption not in known:
            known.add(candidate.caption)
            found.append(candidate)
        index += 1
    return found


def reconstructed(model: Model, samples: list[shapes.Sample]) -> float:
    """Share of true pictures that still show their caption after encoding and decoding."""
    images = torch.stack([to_tensor(Image.fromarray(s.image)) for s in samples])
    decoded = model.dvae.decode(model.dvae.encode(images))
    return float(np.mean([_shows(p, s.caption) for p, s in zip(decoded, samples, strict=True)]))


def draws(model: Model, samples: list[shapes.Sample], candidates: int, seed: int = 0) -> Draws:
    """Draws, scores and judges candidates for each sample's caption."""
    assert model.clip is not None
    scores, correct = [], []
    captions = [s.caption for s in samples]
    drawn = draw_captions(model, captions, candidates, seed)
    bar = tqdm(captions, desc="judging", unit="caption", mininterval=5)
    for caption, tokens in zip(bar, drawn, strict=True):
        images = decode(model, tokens)
        scores.append(ranking.score(model.clip, clip_ids(model, caption), images))
        correct.append(torch.tensor([_shows(p, caption) for p in images]))
    return Draws(captions, torch.stack(scores), torch.stack(correct))


def sheet(model: Model, captions: list[str], candidates: int, keep: int) -> Image.Image:
    """A row for each caption: a few unranked draws, then the best by CLIP."""
    best = sample(captions, model, candidates=candidates, keep=keep)
    plain = sample(captions, model, candidates=SHOWN, keep=SHOWN, progress=False)
    rows = [[*p, *b] for p, b in zip(plain.images, best.images, strict=True)]
    titles = ("unranked draws", f"best {keep} of {candidates} by CLIP")
    return contact_sheet(rows, captions, titles, columns_before_gap=SHOWN)


def plot_best_of_n(curves: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """The paper's figure 6, with exact accuracy for its scores: one pair of lines a split."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (split, curve), colour in zip(curves.items(), ("tab:blue", "tab:orange"), strict=False):
        for judge, style in (("clip", "o-"), ("oracle", "--")):
            values = [100 * point[judge] for point in curve.values()]
            axes.plot(list(curve), values, style, color=colour, label=f"{split}, {judge}")
    axes.set(
        xscale="log",
        xlabel="candidates N",
        ylabel="captions shown exactly, %",
        ylim=(0, 101),
        title="best of N",
    )
    axes.set_xscale("log", base=2)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_losses(metrics: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The training loss of each run against its updates."""
    plt = _pyplot()
    figure, panels = plt.subplots(1, len(metrics), figsize=(4 * len(metrics), 3.4), squeeze=False)
    for axes, (name, lines) in zip(panels[0], metrics.items(), strict=True):
        # The warm start of the dVAE minimises another loss, which would squash the curve.
        points = [x for x in lines if "loss" in x and "squared_error" not in x]
        axes.plot([x["step"] for x in points], [x["loss"] for x in points])
        axes.set(title=name, xlabel="updates", ylabel="loss, nats")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _shows(picture: Tensor, caption: str) -> bool:
    return check(np.asarray(to_pil(picture)), caption).ok


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'dalle1[curves]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot

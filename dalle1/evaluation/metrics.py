"""How good chosen pictures are: CLIP score, FID, Inception Score, the checker; with intervals.

Dimensions: q captions, n pictures, f features, k classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import islice
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageFilter
from torch import Tensor, nn

from dalle1.protocols import EmbeddingRanker

BATCH = 64
MAX_CLASSES = 1000
# Pictures [n, 3, H, W] in [0, 1] to features [n, f] and, if there are classes, logits [n, k].
Network = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def blurred(images: Tensor, radius: float) -> Tensor:
    """Pictures [n, 3, H, W] in [0, 1], 8 bits deep, through a Gaussian of that deviation in
    pixels."""
    pixels = (images * 255).round().clamp(0, 255).to(torch.uint8)
    if radius == 0:
        return pixels.float() / 255
    soft = [
        np.asarray(Image.fromarray(p).filter(ImageFilter.GaussianBlur(radius)))
        for p in rearrange(pixels, "n c h w -> n h w c").numpy()
    ]
    return rearrange(torch.from_numpy(np.stack(soft)), "n h w c -> n c h w").float() / 255


def ranker_network(ranker: EmbeddingRanker, captions: Sequence[str]) -> Network:
    """The ranker's image embeddings as features, and as classes the first of the captions: how
    plainly an image shows one of them."""
    classes = list(dict.fromkeys(captions))[:MAX_CLASSES]

    @torch.inference_mode()
    def network(images: Tensor) -> tuple[Tensor, Tensor | None]:
        found = ranker.embed_images(images.to(known.device))
        return found.float().cpu(), (ranker.scale() * found @ known.T).float().cpu()

    with torch.inference_mode():
        known = ranker.embed_captions(classes)
    return network


def no_features(images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Nothing to compute FID and Inception Score on: features [n, 0]."""
    return images.new_zeros(len(images), 0), None


def named_network(name: str) -> Network:
    """What the user's function 'module:function' returns: a callable of pictures [n, 3, H, W] in
    [0, 1] that gives features [n, f], or features and class logits [n, k]."""
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise ValueError(f"features: expected 'module:function', got {name!r}")
    try:
        made = getattr(import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features: {name!r} cannot be imported: {error}") from error
    if isinstance(made, nn.Module):
        made = made.eval()

    @torch.inference_mode()
    def network(images: Tensor) -> tuple[Tensor, Tensor | None]:
        result = made(images)
        features, logits = result if isinstance(result, tuple) else (result, None)
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(
                f"features: {name} gave {list(features.shape)} for {len(images)} pictures, "
                "expected [n, f]"
            )
        return features.float().cpu(), None if logits is None else logits.float().cpu()

    return network


class _Given(nn.Identity):
    """Features that are there already, in the place of a network."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features  # what torchmetrics asks for


class Comparison:
    """FID and Inception Score of drawn pictures against true ones, of features added bit by bit."""

    def __init__(self, features: int, splits: int) -> None:
        """features: f. Raises ValueError when torchmetrics is missing."""
        fid, inception = metric_classes()
        # The other ranks have left by now: there is nobody to add up with.
        self.features, self.classified = features, False
        self.fid = fid(feature=_Given(max(1, features)), sync_on_compute=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it keeps the logits of all pictures
            self.inception = inception(feature=nn.Identity(), splits=splits, sync_on_compute=False)

    def add(self, features: Tensor, logits: Tensor | None, real: bool) -> None:
        """Features [n, f] and, if there are classes, logits [n, k] of true or drawn pictures."""
        if self.features:
            self.fid.update(features, real=real)
        if logits is not None and not real:
            self.inception.update(logits)
            self.classified = True

    def add_true(self, other: Comparison) -> None:
        """Takes over the true pictures of another comparison."""
        for name in ("real_features_sum", "real_features_cov_sum", "real_features_num_samples"):
            setattr(self.fid, name, getattr(other.fid, name).clone())

    def values(self) -> dict[str, float | None]:
        """`fid` (None without features, or with fewer than two true or drawn images) and
        `inception_score` (None without classes)."""
        counts = (self.fid.real_features_num_samples, self.fid.fake_features_num_samples)
        enough = self.features > 0 and min(map(int, counts)) > 1
        score = None
        if self.classified:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                torch.manual_seed(0)  # the score is a mean over random parts
                warnings.simplefilter("ignore")  # that one part has no deviation
                score = float(self.inception.compute()[0])
        return {"fid": float(self.fid.compute()) if enough else None, "inception_score": score}


def metric_classes() -> tuple[Any, Any]:
    """torchmetrics' FID and Inception Score; ValueError that says how to install them."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore
    except ImportError as error:
        raise ValueError(
            "FID and Inception Score need torchmetrics: pip install 'dalle1[eval]'"
        ) from error
    return FrechetInceptionDistance, InceptionScore


def batches(pictures: Iterable[Tensor], size: int = BATCH) -> Iterable[Tensor]:
    """Pictures [3, H, W] as stacks [<= size, 3, H, W]."""
    stream = iter(pictures)
    while block := list(islice(stream, size)):
        yield torch.stack(block)


def interval(values: Sequence[float], resamples: int) -> tuple[float, float]:
    """The middle 95 % of the mean over the captions, by resampling them: a bootstrap."""
    rng = np.random.default_rng(0)
    known = np.asarray(values, dtype=np.float64)
    means = [rng.choice(known, len(known)).mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)

"""How good chosen images are: FID, Inception Score, and intervals of means over captions.

Dimensions: q captions, n images, f features, k classes, H W image height and width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import ImageFilter
from torch import Tensor, nn

from dalle1.common.images import to_pil, to_tensor
from dalle1.protocols import EmbeddingRanker

BATCH = 64
MAX_CLASSES = 1000
# Images [n, 3, H, W] in [0, 1] to features [n, f] and, if there are classes, logits [n, k].
FeatureNetwork = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def blurred(images: Tensor, radius: float) -> Tensor:
    """Images [n, 3, H, W] in [0, 1] through a Gaussian blur, rounded to 8 bits.

    Args:
        radius: the Gaussian's standard deviation in pixels; 0 rounds only.
    """
    pil_images = [to_pil(image) for image in images]
    if radius > 0:
        pil_images = [image.filter(ImageFilter.GaussianBlur(radius)) for image in pil_images]
    return torch.stack([to_tensor(image) for image in pil_images])


def ranker_network(ranker: EmbeddingRanker, captions: Sequence[str]) -> FeatureNetwork:
    """The ranker's image embeddings as features; its scores of the captions as class logits.

    The classes are the first 1,000 different captions, so the Inception Score says how plainly an
    image shows one of them.
    """
    classes = list(dict.fromkeys(captions))[:MAX_CLASSES]

    @torch.inference_mode()
    def network(images: Tensor) -> tuple[Tensor, Tensor | None]:
        embeddings = ranker.embed_images(images.to(class_embeddings.device))  # [n, f]
        logits = ranker.scale() * embeddings @ class_embeddings.T  # [n, k]
        return embeddings.float().cpu(), logits.float().cpu()

    with torch.inference_mode():
        class_embeddings = ranker.embed_captions(classes)  # [k, f]
    return network


def no_features(images: Tensor) -> tuple[Tensor, Tensor | None]:
    """A network of no features, [n, 0], and no classes: FID and Inception Score are left out."""
    return images.new_zeros(len(images), 0), None


def named_network(name: str) -> FeatureNetwork:
    """The network that a user's function returns.

    Args:
        name: 'module:function'. The function takes no arguments and returns a callable of images
            [n, 3, H, W] in [0, 1] that gives features [n, f], or features and class logits [n, k].

    Raises:
        ValueError: the name cannot be imported. The network raises it for features of a wrong
            shape.
    """
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise ValueError(f"features: expected 'module:function', got {name!r}")
    try:
        user_network = getattr(import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features: {name!r} cannot be imported: {error}") from error
    if isinstance(user_network, nn.Module):
        user_network = user_network.eval()

    @torch.inference_mode()
    def network(images: Tensor) -> tuple[Tensor, Tensor | None]:
        output = user_network(images)
        features, logits = output if isinstance(output, tuple) else (output, None)
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(
                f"features: {name} gave {list(features.shape)} for {len(images)} images, "
                "expected [n, f]"
            )
        return features.float().cpu(), None if logits is None else logits.float().cpu()

    return network


class _Precomputed(nn.Identity):
    """Stands where torchmetrics expects a network and hands on features that are computed."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features  # an attribute that torchmetrics reads


class Comparison:
    """FID and Inception Score of generated images against true ones, added batch by batch."""

    def __init__(self, features: int, splits: int) -> None:
        """Starts without images.

        Args:
            features: f; 0 leaves FID out.
            splits: parts that the Inception Score is averaged over.

        Raises:
            ValueError: torchmetrics is missing.
        """
        fid, inception = metric_classes()
        self.features = features
        self._has_classes = False
        # Rank 0 alone compares, the other ranks have left: there is nothing to reduce.
        self.fid = fid(feature=_Precomputed(max(1, features)), sync_on_compute=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it keeps the logits of all images
            self.inception = inception(feature=nn.Identity(), splits=splits, sync_on_compute=False)

    def add(self, features: Tensor, logits: Tensor | None, real: bool) -> None:
        """Adds features [n, f] and, if there are classes, logits [n, k].

        Args:
            real: whether they are of true images.
        """
        if self.features:
            self.fid.update(features, real=real)
        if logits is not None and not real:
            self.inception.update(logits)
            self._has_classes = True

    def add_true(self, other: Comparison) -> None:
        """Copies the true images of another comparison."""
        for name in ("real_features_sum", "real_features_cov_sum", "real_features_num_samples"):
            setattr(self.fid, name, getattr(other.fid, name).clone())

    def values(self) -> dict[str, float | None]:
        """`fid` (None without features, or with fewer than two true or generated images) and
        `inception_score` (None without classes)."""
        counts = (self.fid.real_features_num_samples, self.fid.fake_features_num_samples)
        enough = self.features > 0 and min(map(int, counts)) > 1
        score = None
        if self._has_classes:
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


def batches(images: Iterable[Tensor], size: int = BATCH) -> Iterable[Tensor]:
    """Images [3, H, W] as batches [<= size, 3, H, W]."""
    stream = iter(images)
    while block := list(islice(stream, size)):
        yield torch.stack(block)


def interval(values: Sequence[float], resamples: int) -> tuple[float, float]:
    """The 95 % interval of a mean over captions, by resampling the captions (bootstrap).

    Args:
        values: one of each caption, q in all.
    """
    rng = np.random.default_rng(0)
    sample = np.asarray(values, dtype=np.float64)
    means = [rng.choice(sample, len(sample)).mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)

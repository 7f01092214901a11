"""How good chosen images are: FID, Inception Score, and intervals of means over captions.

Dimensions: q captions, n images, f features, k classes, H W image height and width.
"""

from __future__ import annotations

import math
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
from dvae.images import check_images

BATCH = 64
MAX_CLASSES = 1000
# Images [n, 3, H, W] in [0, 1] to features [n, f] and, if there are classes, logits [n, k].
FeatureNetwork = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def blurred(images: Tensor, radius: float) -> Tensor:
    """Images [n, 3, H, W] in [0, 1] through a Gaussian blur, rounded to 8 bits.

    Args:
        radius: the Gaussian's standard deviation in pixels; 0 rounds only.
    """
    check_images(images)
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
        check_images(images)
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
        ValueError: the name cannot be imported. The network raises it for features or logits of a
            wrong shape, and where they are not finite.
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
        check_images(images)
        output = user_network(images)
        if isinstance(output, tuple) and len(output) != 2:
            raise ValueError(
                f"features: expected features, or features and logits, of {name}, got "
                f"{len(output)} results"
            )
        features, logits = output if isinstance(output, tuple) else (output, None)
        check_rows(features, "features", name, len(images))
        if logits is not None:
            check_rows(logits, "logits", name, len(images))
        return features.float().cpu(), None if logits is None else logits.float().cpu()

    return network


def check_rows(
    values: Tensor, what: str, source: str, rows: int | None = None, columns: int | None = None
) -> None:
    """Raises ValueError where features or logits are no finite numbers [n, f].

    Args:
        values: what a network gave.
        what: "features" or "logits", for the message.
        source: what gave them.
        rows: n, where it is known.
        columns: f, where it is known.
    """
    wanted = f"[{'n' if rows is None else rows}, {'f' if columns is None else columns}]"
    if not isinstance(values, Tensor):
        kind = type(values).__name__
        raise ValueError(f"{what}: expected [n, f], a tensor {wanted}, of {source}, got {kind}")
    shape = list(values.shape)
    fits = values.ndim == 2 and rows in (None, shape[0]) and columns in (None, shape[1])
    if not fits:
        raise ValueError(f"{what}: expected [n, f], here {wanted}, of {source}, got {shape}")
    # In 32 bits, which they are kept in.
    bad = ~values.float().isfinite().all(dim=1)
    if bool(bad.any()):
        raise ValueError(
            f"{what}: expected finite numbers of {source}, got NaN or infinite ones in "
            f"{int(bad.sum())} of {shape[0]} rows; look at the network, and at the images"
        )


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

        Raises:
            ValueError: they have another shape, or are not finite.
        """
        source = "true images" if real else "generated images"
        check_rows(features, "features", source, columns=self.features)
        if logits is not None:
            check_rows(logits, "logits", source, rows=len(features))
        if self.features:
            self.fid.update(features, real=real)
        if logits is not None and not real:
            # In 32 bits the probability of a class may be 0 in all images, and the score NaN.
            self.inception.update(logits.double())
            self._has_classes = True

    def add_true(self, other: Comparison) -> None:
        """Copies the true images of another comparison; ValueError for one of other features."""
        if other.features != self.features:
            raise ValueError(
                f"features: expected [n, {self.features}] of true images, got [n, {other.features}]"
            )
        for name in ("real_features_sum", "real_features_cov_sum", "real_features_num_samples"):
            setattr(self.fid, name, getattr(other.fid, name).clone())

    def values(self) -> dict[str, float | None]:
        """`fid` (None without features, or with fewer than two true or generated images) and
        `inception_score` (None without classes).

        Raises ValueError where features are too large for the FID.
        """
        counts = (self.fid.real_features_num_samples, self.fid.fake_features_num_samples)
        enough = self.features > 0 and min(map(int, counts)) > 1
        score = None
        if self._has_classes:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                torch.manual_seed(0)  # the score is a mean over random parts
                warnings.simplefilter("ignore")  # that one part has no deviation
                score = float(self.inception.compute()[0])
        fid = float(self.fid.compute()) if enough else None
        if fid is not None and not math.isfinite(fid):
            raise ValueError(
                f"features: expected numbers whose squares fit 32 bits, got an FID of {fid}; scale "
                "them down"
            )
        return {"fid": fid, "inception_score": score}


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

    Raises:
        ValueError: there are none, or one is not finite.
    """
    rng = np.random.default_rng(0)
    sample = np.asarray(values, dtype=np.float64)
    if not len(sample) or not np.isfinite(sample).all():
        raise ValueError(
            f"values: expected finite numbers, one of each caption, got {sample.size}, of which "
            f"{int((~np.isfinite(sample)).sum())} are not finite"
        )
    means = [rng.choice(sample, len(sample)).mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)

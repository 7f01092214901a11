"""How good chosen images are: networks, FID, Inception Score, intervals of means over captions.

Dimensions: q captions, n images, f features, k classes, H W image height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import ImageFilter
from torch import Tensor, nn

from dalle1.common.images import to_pil, to_tensor
from dalle1.evaluation.inception import load_inception
from dalle1.evaluation.judged import imported
from dalle1.protocols import EmbeddingRanker
from dvae.images import check_images

BATCH = 64
MAX_CLASSES = 1000
# Images [n, 3, H, W] in [0, 1] to features [n, f] and, if there are classes, logits [n, k].
FeatureNetwork = Callable[[Tensor], tuple[Tensor, Tensor | None]]
Point = dict[str, float | list[float]]  # {"mean": ..., "interval": [low, high]}


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


def inception_network(path: str, device: torch.device) -> FeatureNetwork:
    """FID's own network, see `inception.load_inception`; path: of its file."""
    inception = load_inception(path).to(device)

    @torch.inference_mode()
    def network(images: Tensor) -> tuple[Tensor, Tensor | None]:
        check_images(images)
        results = [inception(part.to(device)) for part in images.split(BATCH)]
        features, logits = (torch.cat(values).cpu() for values in zip(*results, strict=True))
        return features, logits

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
    user_network = imported(name, "features")()
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


class Moments:
    """Mean and covariance of features, added batch by batch, in 64 bits.

    The memory does not depend on the number of images.
    """

    def __init__(self, features: int) -> None:
        """features: f."""
        self.features, self.count = features, 0
        self._sum = torch.zeros(features, dtype=torch.float64)
        self._products = torch.zeros(features, features, dtype=torch.float64)

    def add(self, features: Tensor, source: str = "images") -> None:
        """Adds features [n, f] of n images; source: what they are of, for messages.

        Raises ValueError where they have another shape, or are not finite.
        """
        check_rows(features, "features", source, columns=self.features)
        rows = features.double()
        self.count += len(rows)
        self._sum += rows.sum(0)
        self._products += rows.T @ rows

    def mean(self) -> Tensor:
        """[f]; NaN of no images."""
        return self._sum / self.count

    def covariance(self) -> Tensor:
        """[f, f], over count - 1."""
        mean = self.mean()
        return (self._products - self.count * torch.outer(mean, mean)) / (self.count - 1)


class FrechetDistance:
    """The distance of Gaussians from that of the true images (FID, Heusel et al. 2017).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), whose last trace is that of the root of the
    symmetric matrix S1^(1/2) S2 S1^(1/2). S1^(1/2) is computed once for all distances.
    """

    def __init__(self, true: Moments) -> None:
        self.true = true
        self._root: Tensor | None = None

    def to(self, generated: Moments) -> float | None:
        """The distance; None without features, or of fewer than two true or generated images.

        Raises ValueError where features are of another width.
        """
        if self.true.features != generated.features:
            raise ValueError(
                f"features: expected [n, {self.true.features}] as of true images, got "
                f"[n, {generated.features}]"
            )
        if not generated.features or min(self.true.count, generated.count) < 2:
            return None
        covariance, other = self.true.covariance(), generated.covariance()
        if self._root is None:
            values, vectors = torch.linalg.eigh(covariance)
            self._root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        mixed = self._root @ other @ self._root
        # Rounding leaves values a little below 0 where there are fewer images than features.
        shared = torch.linalg.eigvalsh((mixed + mixed.T) / 2).clamp(min=0).sqrt().sum()
        apart = (self.true.mean() - generated.mean()).square().sum()
        distance = apart + covariance.trace() + other.trace() - 2 * shared
        return max(0.0, float(distance))


class InceptionScore:
    """exp of the mean of KL(p(class | image) || p(class)), over parts of the images (Salimans et
    al. 2016), added batch by batch.

    Only sums are kept. In 64 bits: in 32, the probability of a class may be 0 in all images.
    """

    def __init__(self, splits: int) -> None:
        """splits: parts that the score is averaged over; image i is of part i modulo `splits`."""
        self.splits, self.count = splits, 0
        self._counts = torch.zeros(splits, dtype=torch.float64)
        self._negative_entropies = torch.zeros(splits, dtype=torch.float64)
        self._probabilities: Tensor | None = None  # [splits, k], summed

    def add(self, logits: Tensor) -> None:
        """Adds class logits [n, k] of the next n images; ValueError where they are not finite."""
        columns = None if self._probabilities is None else self._probabilities.shape[1]
        check_rows(logits, "logits", "images", columns=columns)
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        if self._probabilities is None:
            self._probabilities = torch.zeros(self.splits, p.shape[1], dtype=torch.float64)
        part = torch.arange(self.count, self.count + len(p)) % self.splits
        self.count += len(p)
        self._counts.index_add_(0, part, torch.ones(len(p), dtype=torch.float64))
        self._negative_entropies.index_add_(0, part, torch.special.xlogy(p, p).sum(1))
        self._probabilities.index_add_(0, part, p)

    def values(self) -> tuple[float | None, float | None]:
        """The mean over the parts and their standard deviation; None without classes, the latter
        also of one part alone."""
        if self._probabilities is None:
            return None, None
        held = self._counts > 0  # there may be fewer images than parts
        counts = self._counts[held]
        marginal = self._probabilities[held] / counts[:, None]
        entropies = -torch.special.xlogy(marginal, marginal).sum(1)
        scores = (self._negative_entropies[held] / counts + entropies).exp()
        deviation = float(scores.std(correction=0)) if len(scores) > 1 else None
        return float(scores.mean()), deviation


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


def mean_and_interval(values: Sequence[float], resamples: int) -> Point:
    """A mean over captions as reports show it, with its `interval`."""
    return {"mean": sum(values) / len(values), "interval": list(interval(values, resamples))}

"""Metrics against closed forms."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from dalle1 import CLIP, Model
from dalle1.evaluation.metrics import (
    FrechetDistance,
    InceptionScore,
    Moments,
    blurred,
    interval,
    named_network,
    ranker_network,
)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the root from symmetric matrices."""
    s1, s2 = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(s1)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    mixed = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * mixed)


def moments(features: torch.Tensor, batch: int = 7) -> Moments:
    """Of features [n, f], added in batches."""
    found = Moments(features.shape[1])
    for part in features.split(batch):
        found.add(part)
    return found


def random_features(count: int, seed: int, width: int = 4, shift: float = 0.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=g) @ torch.randn(width, width, generator=g) + shift


def test_fid_and_inception_score() -> None:
    """Figures of another definition, true and drawn images mixed up, or a batch forgotten."""
    g = torch.Generator().manual_seed(0)
    true, drawn = random_features(50, 0, shift=1), torch.randn(30, 4, generator=g)
    logits = torch.randn(30, 7, generator=g)
    distance = FrechetDistance(moments(true, 20))
    expected = frechet(true.double().numpy(), drawn.double().numpy())
    for batch in (1, 8, 30):
        assert distance.to(moments(drawn, batch)) == pytest.approx(expected, rel=1e-9)
        score = InceptionScore(1)
        for part in logits.split(batch):
            score.add(part)
        p = logits.double().softmax(-1)
        wanted = float((p * (p / p.mean(0)).log()).sum(1).mean().exp())
        assert score.values() == (pytest.approx(wanted, rel=1e-9), None)


def test_fid_of_known_gaussians() -> None:
    """A distance whose root is of another product, or that forgets a part; on covariances that
    commute the closed form needs no root of a matrix."""
    turned, _ = torch.linalg.qr(random_features(6, 3, 6).double())
    first, second = torch.tensor([4.0, 1, 0.25, 9, 1, 0]), torch.tensor([1.0, 1, 4, 0.01, 0, 2])
    apart = torch.tensor([1.0, 0, -2, 0, 0.5, 0])
    found = []
    for variances, mean in ((first, torch.zeros(6)), (second, apart)):
        made = Moments(6)  # of exactly these moments, as if of infinitely many images
        made.count = 10**9
        mean, scaled = turned @ mean.double(), turned * variances.double()
        made._sum = made.count * mean
        covariance = (scaled @ turned.T) * (made.count - 1)
        made._products = covariance + made.count * torch.outer(mean, mean)
        found.append(made)
    expected = float(apart.square().sum() + (first.sqrt() - second.sqrt()).square().sum())
    for a, b in (found, reversed(found)):
        assert FrechetDistance(a).to(b) == pytest.approx(expected, abs=1e-6)
    assert FrechetDistance(found[0]).to(found[0]) == pytest.approx(0, abs=1e-6)


def test_figures_of_torchmetrics() -> None:
    """Figures that differ from those of a library that others publish with."""
    fid = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance
    inception = pytest.importorskip("torchmetrics.image.inception").InceptionScore
    true, drawn = random_features(90, 1, 12, 0.5), random_features(70, 2, 12)

    class Given(nn.Identity):
        num_features = 12

    theirs = fid(feature=Given())
    theirs.update(true, real=True)
    theirs.update(drawn, real=False)
    ours = FrechetDistance(moments(true)).to(moments(drawn))
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-5)
    score = inception(feature=nn.Identity(), splits=1)
    score.update(drawn.double())
    found = InceptionScore(1)
    found.add(drawn)
    assert found.values()[0] == pytest.approx(float(score.compute()[0]), rel=1e-6)


def test_parts_of_the_inception_score() -> None:
    """Parts that share images or lose some; a deviation of one part, or over count - 1; parts that
    depend on the batches; fewer images than parts."""
    logits = random_features(23, 4, 5)
    score = InceptionScore(4)
    for part in logits.split([5, 1, 9, 8]):
        score.add(part)
    values = []
    for i in range(4):
        p = logits[i::4].double().softmax(-1)
        values.append(float((p * (p / p.mean(0)).log()).sum(1).mean().exp()))
    mean = sum(values) / 4
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 4)
    assert score.values() == (pytest.approx(mean), pytest.approx(deviation))
    few = InceptionScore(10)
    few.add(logits[:3])
    assert few.values() == (pytest.approx(1), pytest.approx(0))  # each image is alone in its part
    certain = InceptionScore(1)
    certain.add(1e4 * torch.eye(6))  # each of its own class
    assert certain.values()[0] == pytest.approx(6)


def test_no_fid_without_true_images() -> None:
    """A distance from nothing, or of one image, or of no features; a crash in place of a gap."""
    some = moments(torch.randn(5, 4))
    assert FrechetDistance(Moments(4)).to(some) is None
    assert FrechetDistance(some).to(moments(torch.randn(1, 4))) is None
    assert FrechetDistance(Moments(0)).to(Moments(0)) is None
    assert InceptionScore(1).values() == (None, None)


def test_fewer_images_than_features() -> None:
    """NaN, or less than 0, where covariances have no full rank."""
    few, others = random_features(5, 0, 40), random_features(6, 1, 40)
    expected = frechet(few.double().numpy(), others.double().numpy())
    assert FrechetDistance(moments(few)).to(moments(others)) == pytest.approx(expected, rel=1e-6)
    same = FrechetDistance(moments(few)).to(moments(few))
    assert same is not None and 0 <= same < 1e-4


def test_memory_does_not_grow_with_the_images() -> None:
    """Features or logits of all images kept, which 30,000 of them fill the memory with."""
    found, score = Moments(8), InceptionScore(10)

    def held() -> int:
        parts = [*vars(found).values(), *vars(score).values()]
        return sum(p.numel() for p in parts if isinstance(p, torch.Tensor))

    found.add(torch.randn(4, 8))
    score.add(torch.randn(4, 6))
    before = held()
    for _ in range(50):
        found.add(torch.randn(64, 8))
        score.add(torch.randn(64, 6))
    assert held() == before and found.count == score.count == 3204


def test_blur() -> None:
    """A blur of another width, along one axis, or of images in another order."""
    point = torch.zeros(2, 3, 41, 41)
    point[1, 1, 20, 20] = 1
    for radius in (1.0, 2.0):
        soft = blurred(point, radius)
        assert soft.shape == point.shape and float(soft[0].max()) == 0
        assert float(soft[1, 0].max()) == float(soft[1, 2].max()) == 0
        torch.testing.assert_close(soft[1, 1], soft[1, 1].T, rtol=0, atol=1.5 / 255)
        # A row of light: the profile across has the radius as its deviation.
        line = torch.zeros(1, 3, 41, 41)
        line[:, :, 20] = 1
        profile = blurred(line, radius)[0, 0, :, 20].double()
        spread = math.sqrt(float((profile * (torch.arange(41) - 20) ** 2).sum() / profile.sum()))
        assert spread == pytest.approx(radius, rel=0.1)
    grey = torch.full((1, 3, 9, 9), 0.5)
    assert torch.equal(blurred(grey, 4.0), blurred(grey, 0.0))
    assert float(blurred(grey, 0.0)[0, 0, 0, 0]) == pytest.approx(128 / 255)  # 8 bits deep


def test_interval() -> None:
    """An interval of one caption's spread rather than the mean's."""
    assert interval([0.3] * 7, 20) == (pytest.approx(0.3), pytest.approx(0.3))
    values = [float(i % 2) for i in range(400)]
    low, high = interval(values, 2000)
    half = 1.96 * math.sqrt(0.25 / 400)
    assert low == pytest.approx(0.5 - half, abs=0.01)
    assert high == pytest.approx(0.5 + half, abs=0.01)
    assert interval(values, 50) == interval(values, 50)


def test_ranker_network(model: Model) -> None:
    """Features that are not CLIP's, classes that are not the captions."""
    assert model.ranker is not None
    images = torch.rand(3, 3, 8, 8)
    captions = ["a red cat", "a blue dog", "a red cat"]
    features, logits = ranker_network(model.ranker, captions)(images)
    with torch.inference_mode():
        torch.testing.assert_close(features, model.ranker.encode_image(images))
        expected = model.ranker.classify(images, captions[:2])
    assert logits is not None
    torch.testing.assert_close(logits.softmax(-1), expected)


@pytest.mark.parametrize("scale", [50.0, 100.0, 5000.0])
def test_ranker_network_clips_the_scale(model: Model, scale: float) -> None:
    """An Inception Score of logits beyond CLIP's scale of 100, where each image is certain."""
    clip = model.ranker
    assert isinstance(clip, CLIP)
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(scale))
    captions, images = ["a red cat", "one small mat"], torch.rand(3, 3, 8, 8)
    _, logits = ranker_network(clip, captions)(images)
    assert logits is not None
    expected = min(scale, 100) * clip.score(captions, images).T
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_named_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's network that runs in training mode, or whose mistakes show after hours."""
    module = ModuleType("my_features")

    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return x.flatten(1)

    module.made = Own  # type: ignore[attr-defined]
    module.both = lambda: lambda x: (x.flatten(1), x[:, :, 0, 0])  # type: ignore[attr-defined]
    module.wrong = lambda: lambda x: x  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_features", module)
    images = torch.rand(2, 3, 4, 4)
    features, logits = named_network("my_features:made")(images)
    assert torch.equal(features, images.flatten(1)) and logits is None
    both = named_network("my_features:both")(images)[1]
    assert both is not None and both.shape == (2, 3)
    with pytest.raises(ValueError, match=r"expected \[n, f\]"):
        named_network("my_features:wrong")(images)
    for name in ("my_features", "my_features:gone", "nowhere:made", ":made"):
        with pytest.raises(ValueError, match="features: "):
            named_network(name)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_features_that_are_not_finite(value: float) -> None:
    """An FID that ends in an error of linear algebra, or an Inception Score of NaN."""
    features, logits = torch.randn(6, 4), torch.randn(6, 3)
    features[2, 1] = value
    with pytest.raises(ValueError, match=r"features: .* of true images, got .* 1 of 6 rows"):
        Moments(4).add(features, "true images")
    logits[4] = value
    with pytest.raises(ValueError, match="logits: expected finite numbers"):
        InceptionScore(1).add(logits)


@pytest.mark.parametrize("shape", [(6, 3), (6, 5), (6,), (6, 4, 1), (4, 6)])
def test_features_of_another_shape(shape: tuple[int, ...]) -> None:
    """Features of another width, or [f, n], that are broadcast or end in a matrix product."""
    with pytest.raises(ValueError, match=r"features: expected \[n, f\].*\[n, 4\]"):
        Moments(4).add(torch.rand(shape))
    score = InceptionScore(1)
    score.add(torch.rand(6, 4))
    with pytest.raises(ValueError, match=r"logits: expected \[n, f\].*\[n, 4\]"):
        score.add(torch.rand(shape))
    with pytest.raises(ValueError, match=r"features: expected \[n, 4\].*\[n, 3\]"):
        FrechetDistance(moments(torch.rand(5, 4))).to(moments(torch.rand(5, 3)))


def test_large_features() -> None:
    """Features whose squares do not fit 32 bits, and an FID of infinity, which is no JSON."""
    true, drawn = random_features(9, 0, 3), random_features(9, 1, 3)
    plain = FrechetDistance(moments(true)).to(moments(drawn))
    large = FrechetDistance(moments(1e30 * true)).to(moments(1e30 * drawn))
    assert plain is not None and large == pytest.approx(1e60 * plain, rel=1e-4)


def test_classes_that_no_image_has() -> None:
    """A probability that 32 bits round to 0 in every image, and a score of NaN for it."""
    score = InceptionScore(1)
    score.add(torch.tensor([[0.0, -200.0, 0.0]] * 4))
    assert score.values()[0] == pytest.approx(1)
    score.add(torch.tensor([[0.0, -2000.0, 0.0]] * 4))  # beyond 64 bits
    assert score.values()[0] == pytest.approx(1)


def test_images_beyond_their_range_have_no_features(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of images that were scaled otherwise, which an FID compares without a word."""
    module = ModuleType("my_network")
    module.made = lambda: lambda x: x.flatten(1)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_network", module)
    assert model.ranker is not None
    networks = [ranker_network(model.ranker, ["a cat"]), named_network("my_network:made")]
    for images in (2 * torch.rand(2, 3, 8, 8) - 1, 255 * torch.rand(2, 3, 8, 8)):
        for network in (*networks, lambda x: blurred(x, 1.0)):
            with pytest.raises(ValueError, match=r"images: expected floats .* got values in"):
                network(images)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.full((2, 5), NAN), "features: expected finite numbers of my_network:made"),
        ((torch.rand(2, 5), torch.full((2, 3), INF)), "logits: expected finite numbers"),
        ((torch.rand(2, 5), torch.rand(3)), "logits: expected .*2, f"),
        ((torch.rand(2, 5), torch.rand(2, 3), None), "got 3 results"),
        ([[1.0], [2.0]], "features: expected .*, got list"),
        ({"features": torch.rand(2, 5)}, "features: expected .*, got dict"),
    ],
)
def test_a_network_of_the_user_that_gives_no_features(
    monkeypatch: pytest.MonkeyPatch, output: object, message: str
) -> None:
    """A network's mistake that shows in an FID after hours of drawing."""
    module = ModuleType("my_network")
    module.made = lambda: lambda x: output  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_network", module)
    with pytest.raises(ValueError, match=message):
        named_network("my_network:made")(torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize("values", [[], [0.2, NAN], [INF]])
def test_interval_of_no_numbers(values: list[float]) -> None:
    """An interval of NaN, or an error that names nothing."""
    with pytest.raises(ValueError, match="values: expected finite numbers"):
        interval(values, 10)

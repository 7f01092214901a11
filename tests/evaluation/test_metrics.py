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
    Comparison,
    batches,
    blurred,
    interval,
    metric_classes,
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


def test_fid_and_inception_score() -> None:
    """Figures of another definition, true and drawn images mixed up, or a batch forgotten."""
    g = torch.Generator().manual_seed(0)
    true = torch.randn(50, 4, generator=g) @ torch.randn(4, 4, generator=g) + 1
    drawn, logits = torch.randn(30, 4, generator=g), torch.randn(30, 7, generator=g)
    found = Comparison(4, splits=1)
    for part in true.split(20):
        found.add(part, torch.zeros(len(part), 7), real=True)
    taken_over = Comparison(4, splits=1)
    taken_over.add_true(found)
    for comparison in (found, taken_over):
        for i in range(30):
            comparison.add(drawn[i, None], logits[i, None], real=False)
        values = comparison.values()
        expected = frechet(true.double().numpy(), drawn.double().numpy())
        assert values["fid"] == pytest.approx(expected, rel=1e-4)
        p = logits.double().softmax(-1)
        score = (p * (p / p.mean(0)).log()).sum(1).mean().exp()
        assert values["inception_score"] == pytest.approx(float(score), rel=1e-4)
    # Taking over copies: what one adds, the other does not see.
    taken_over.add(true, torch.zeros(50, 7), real=True)
    assert found.values()["fid"] == pytest.approx(expected, rel=1e-4)


def test_no_fid_without_true_images() -> None:
    """A distance from nothing, or a crash in place of a gap."""
    found = Comparison(4, splits=1)
    found.add(torch.randn(5, 4), torch.randn(5, 3), real=False)
    values = found.values()
    assert values["fid"] is None
    assert values["inception_score"] is not None and values["inception_score"] >= 1
    state = torch.get_rng_state()
    assert found.values() == values  # the random parts are the same ones
    assert torch.equal(torch.get_rng_state(), state)
    # Without classes there is no Inception Score either: features are none.
    found = Comparison(4, splits=1)
    found.add(torch.randn(5, 4), None, real=False)
    assert found.values() == {"fid": None, "inception_score": None}


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


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_features_that_are_not_finite(real: bool, value: float) -> None:
    """An FID that ends in an error of linear algebra, or an Inception Score of NaN."""
    found = Comparison(4, splits=1)
    features, logits = torch.randn(6, 4), torch.randn(6, 3)
    features[2, 1] = value
    kind = "true" if real else "generated"
    with pytest.raises(ValueError, match=rf"features: .* of {kind} images, got .* 1 of 6 rows"):
        found.add(features, None, real=real)
    logits[4] = value
    with pytest.raises(ValueError, match="logits: expected finite numbers"):
        found.add(torch.randn(6, 4), logits, real=real)


@pytest.mark.parametrize("shape", [(6, 3), (6, 5), (6,), (6, 4, 1), (4, 6)])
def test_features_of_another_shape(shape: tuple[int, ...]) -> None:
    """Features of another width, or [f, n], that are broadcast or end in a matrix product."""
    found = Comparison(4, splits=1)
    with pytest.raises(ValueError, match=r"features: expected \[n, f\].*\[n, 4\]"):
        found.add(torch.rand(shape), None, real=True)
    with pytest.raises(ValueError, match=r"logits: expected .*\[6, f\].*\[5, 2\]"):
        found.add(torch.rand(6, 4), torch.rand(5, 2), real=False)
    with pytest.raises(ValueError, match=r"features: expected \[n, 4\].*\[n, 3\]"):
        found.add_true(Comparison(3, splits=1))


def test_features_that_are_too_large() -> None:
    """An FID of infinity, which is no JSON."""
    found = Comparison(2, splits=1)
    for real in (True, False):
        found.add(1e30 * torch.randn(5, 2), None, real=real)
    with pytest.raises(ValueError, match=r"features: .*scale them down"):
        found.values()


def test_classes_that_no_image_has() -> None:
    """A probability that 32 bits round to 0 in every image, and a score of NaN for it."""
    found = Comparison(0, splits=1)
    found.add(torch.zeros(4, 0), torch.tensor([[0.0, -200.0, 0.0]] * 4), real=False)
    assert found.values()["inception_score"] == pytest.approx(1)


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


def test_without_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing extra that shows as a traceback."""
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError, match=r"pip install 'dalle1\[eval\]'"):
        metric_classes()


def test_batches() -> None:
    """A last, shorter batch that is lost."""
    images = [torch.full((3, 2, 2), float(i)) for i in range(5)]
    found = list(batches(iter(images), 2))
    assert [len(part) for part in found] == [2, 2, 1]
    assert torch.equal(torch.cat(found), torch.stack(images))

"""FID's Inception network against a restatement by functions, and files that are none of it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle1 import Model
from dalle1.evaluation import benchmark
from dalle1.evaluation.inception import FILE, load_inception
from dalle1.evaluation.metrics import inception_network
from tests.evaluation.conftest import SettingsMaker

Weights = dict[str, Tensor]


class Restated:
    """The network as functions of a state dictionary, which makes the weights that it meets.

    So the names and shapes of the file are those of the restatement.
    """

    def __init__(self) -> None:
        self.weights: Weights = {}
        self.random = torch.Generator().manual_seed(0)

    def made(self, name: str, *shape: int, low: float = 0, high: float = 0) -> Tensor:
        if name not in self.weights:
            numbers = torch.rand(shape, generator=self.random)
            self.weights[name] = low + (high - low) * numbers
        return self.weights[name]

    def conv(self, x: Tensor, name: str, width: int, h: int, w: int = 0, **how: Any) -> Tensor:
        w = w or h
        how.setdefault("padding", (h // 2, w // 2))
        bound = math.sqrt(6 / (x.shape[1] * h * w))
        kernel = self.made(f"{name}.conv.weight", width, x.shape[1], h, w, low=-bound, high=bound)
        y = F.conv2d(x, kernel, **how)
        gain = self.made(f"{name}.bn.weight", width, low=0.5, high=1.5)
        bias = self.made(f"{name}.bn.bias", width, low=-0.3, high=0.3)
        mean = self.made(f"{name}.bn.running_mean", width, low=-0.3, high=0.3)
        variance = self.made(f"{name}.bn.running_var", width, low=0.5, high=1.5)
        scale = gain / (variance + 0.001).sqrt()
        return (y * scale[:, None, None] + (bias - mean * scale)[:, None, None]).clamp(min=0)

    def mean_pool(self, x: Tensor) -> Tensor:
        """The mean of those of nine neighbors that there are."""
        ones = torch.ones_like(x[:1, :1])
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)

    def a(self, x: Tensor, name: str, pooled: int) -> Tensor:
        five = self.conv(self.conv(x, f"{name}.branch5x5_1", 48, 1), f"{name}.branch5x5_2", 64, 5)
        three = self.conv(x, f"{name}.branch3x3dbl_1", 64, 1)
        three = self.conv(three, f"{name}.branch3x3dbl_2", 96, 3)
        three = self.conv(three, f"{name}.branch3x3dbl_3", 96, 3)
        one = self.conv(x, f"{name}.branch1x1", 64, 1)
        pool = self.conv(self.mean_pool(x), f"{name}.branch_pool", pooled, 1)
        return torch.cat([one, five, three, pool], 1)

    def b(self, x: Tensor, name: str) -> Tensor:
        half = {"stride": 2, "padding": 0}
        three = self.conv(x, f"{name}.branch3x3dbl_1", 64, 1)
        three = self.conv(three, f"{name}.branch3x3dbl_2", 96, 3)
        three = self.conv(three, f"{name}.branch3x3dbl_3", 96, 3, **half)
        return torch.cat(
            [self.conv(x, f"{name}.branch3x3", 384, 3, **half), three, F.max_pool2d(x, 3, 2)], 1
        )

    def c(self, x: Tensor, name: str, width: int) -> Tensor:
        seven = self.conv(x, f"{name}.branch7x7_1", width, 1)
        seven = self.conv(seven, f"{name}.branch7x7_2", width, 1, 7)
        seven = self.conv(seven, f"{name}.branch7x7_3", 192, 7, 1)
        double = self.conv(x, f"{name}.branch7x7dbl_1", width, 1)
        for i, (h, w, out) in enumerate(
            [(7, 1, width), (1, 7, width), (7, 1, width), (1, 7, 192)], 2
        ):
            double = self.conv(double, f"{name}.branch7x7dbl_{i}", out, h, w)
        one = self.conv(x, f"{name}.branch1x1", 192, 1)
        pool = self.conv(self.mean_pool(x), f"{name}.branch_pool", 192, 1)
        return torch.cat([one, seven, double, pool], 1)

    def d(self, x: Tensor, name: str) -> Tensor:
        half = {"stride": 2, "padding": 0}
        three = self.conv(x, f"{name}.branch3x3_1", 192, 1)
        three = self.conv(three, f"{name}.branch3x3_2", 320, 3, **half)
        seven = self.conv(x, f"{name}.branch7x7x3_1", 192, 1)
        seven = self.conv(seven, f"{name}.branch7x7x3_2", 192, 1, 7)
        seven = self.conv(seven, f"{name}.branch7x7x3_3", 192, 7, 1)
        seven = self.conv(seven, f"{name}.branch7x7x3_4", 192, 3, **half)
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    def e(self, x: Tensor, name: str, pool: Callable[[Tensor], Tensor]) -> Tensor:
        def fork(y: Tensor, stem: str) -> list[Tensor]:
            return [
                self.conv(y, f"{stem}a", 384, 1, 3),
                self.conv(y, f"{stem}b", 384, 3, 1),
            ]

        three = self.conv(x, f"{name}.branch3x3_1", 384, 1)
        double = self.conv(x, f"{name}.branch3x3dbl_1", 448, 1)
        double = self.conv(double, f"{name}.branch3x3dbl_2", 384, 3)
        parts = [self.conv(x, f"{name}.branch1x1", 320, 1), *fork(three, f"{name}.branch3x3_2")]
        parts += fork(double, f"{name}.branch3x3dbl_3")
        return torch.cat([*parts, self.conv(pool(x), f"{name}.branch_pool", 192, 1)], 1)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = F.interpolate(images, size=(299, 299), mode="bilinear") * 2 - 1
        x = self.conv(x, "Conv2d_1a_3x3", 32, 3, stride=2, padding=0)
        x = self.conv(x, "Conv2d_2a_3x3", 32, 3, padding=0)
        x = F.max_pool2d(self.conv(x, "Conv2d_2b_3x3", 64, 3), 3, 2)
        x = self.conv(x, "Conv2d_3b_1x1", 80, 1)
        x = F.max_pool2d(self.conv(x, "Conv2d_4a_3x3", 192, 3, padding=0), 3, 2)
        for letter, pooled in (("b", 32), ("c", 64), ("d", 64)):
            x = self.a(x, f"Mixed_5{letter}", pooled)
        x = self.b(x, "Mixed_6a")
        for letter, width in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            x = self.c(x, f"Mixed_6{letter}", width)
        x = self.e(self.d(x, "Mixed_7a"), "Mixed_7b", self.mean_pool)
        x = self.e(x, "Mixed_7c", lambda y: F.max_pool2d(y, 3, 1, 1))
        features = x.flatten(2).mean(2)
        matrix = self.made("fc.weight", 1008, 2048, low=-0.02, high=0.02)
        self.made("fc.bias", 1008, high=1)
        return features, features @ matrix.T


@pytest.fixture(scope="module")
def restated() -> Restated:
    made = Restated()
    made(torch.zeros(1, 3, 75, 75))
    return made


@pytest.fixture(scope="module")
def file(restated: Restated, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / FILE
    torch.save(restated.weights, path)
    return path


def test_features_are_those_of_the_restatement(restated: Restated, file: Path) -> None:
    """A pool that counts the padding, a mean in place of the last maximum, branches in another
    order, another scale of the pixels, logits with a bias: figures that no one else has."""
    network = load_inception(file)
    assert sum(p.numel() for p in network.parameters()) == 23_850_960
    images = torch.rand(2, 3, 80, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features, logits = network(images)
        wanted, wanted_logits = restated(images)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    assert float(wanted.std()) > 0.01
    torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-4, atol=1e-4)
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_the_network_of_a_benchmark(
    restated: Restated, file: Path, model: Model, make_settings: SettingsMaker
) -> None:
    """A setting that names the file and is not read; a wrong file that shows after hours."""
    settings = make_settings(inception=str(file))
    network = benchmark.feature_network(model, ["a cat"], settings)
    images = torch.rand(1, 3, 8, 8)
    features, _ = network(images)
    torch.testing.assert_close(features, restated(images)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="images: expected floats"):
        network(2 * images + 1)
    with pytest.raises(ValueError, match=r"none\.pth"):
        benchmark.feature_network(model, ["a cat"], make_settings(inception="none.pth"))


def changed(restated: Restated, path: Path, **changes: Tensor | None) -> Path:
    """A file with other weights; None takes one out. Dots of names are double underscores."""
    weights = dict(restated.weights)
    for name, weight in changes.items():
        key = name.replace("__", ".")
        weights.pop(key, None)
        if weight is not None:
            weights[key] = weight
    torch.save(weights, path)
    return path


def test_what_files_hold_beside_the_network(restated: Restated, tmp_path: Path) -> None:
    """The counts of newer versions, or wrappers of the module, that make a good file be refused."""
    weights = {f"module.{name}": weight for name, weight in restated.weights.items()}
    weights["module.Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(0)
    weights["module.AuxLogits.fc.weight"] = torch.zeros(3, 4)
    torch.save({"state_dict": weights}, tmp_path / "f.pth")
    network = load_inception(tmp_path / "f.pth")
    torch.testing.assert_close(network.fc.weight, restated.weights["fc.weight"])


def test_files_that_are_another_network_s(restated: Restated, tmp_path: Path) -> None:
    """Torchvision's own weights, whose FID nobody publishes, or a part of a file, taken."""
    path = tmp_path / "f.pth"
    changed(restated, path, fc__weight=torch.zeros(1000, 2048), fc__bias=torch.zeros(1000))
    with pytest.raises(ValueError, match=f"of 1008 classes, got .*torchvision's own .* {FILE}"):
        load_inception(path)
    with pytest.raises(ValueError, match=r"has no weight 'Mixed_7c.branch1x1.conv.weight'"):
        load_inception(changed(restated, path, Mixed_7c__branch1x1__conv__weight=None))
    with pytest.raises(ValueError, match=r"'fc.bias' has shape \[7\], expected \[1008\]"):
        load_inception(changed(restated, path, fc__bias=torch.zeros(7)))
    bad = restated.weights["fc.bias"].clone()
    bad[3] = math.nan
    with pytest.raises(ValueError, match=r"'fc.bias' of FID's Inception network is not finite"):
        load_inception(changed(restated, path, fc__bias=bad))


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_hostile_file(file: Path, tmp_path: Path) -> None:
    """A program in a file of weights that runs; a traceback for a file that was cut off."""
    torch.save({"fc.weight": Harmful(tmp_path / "made")}, tmp_path / "f.pth")
    with pytest.raises(ValueError, match="mkdir, which weights have no use for"):
        inception_network(str(tmp_path / "f.pth"), torch.device("cpu"))
    assert not (tmp_path / "made").exists()
    (tmp_path / "cut.pth").write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="no readable weights file"):
        load_inception(tmp_path / "cut.pth")

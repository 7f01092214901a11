"""LPIPS on a small random VGG with the real layers, and the files that its weights come from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dvae.vqgan import perceptual
from dvae.vqgan.perceptual import LPIPS

# By torchvision's numbers (published.md, section 1.6): convolutions, and where poolings are.
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
POOLINGS = (4, 9, 16, 23)
CUTS = (2, 7, 14, 21, 28)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 are behind these
SMALL = (3, 4, 5, 6, 7)


@pytest.fixture
def lpips() -> LPIPS:
    torch.manual_seed(5)
    module = LPIPS(SMALL)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.startswith("lin"):
                weight.uniform_(0, 1)
            else:
                weight.normal_(0, 0.4)
    return module


def restated(state: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """LPIPS of images [b, 3, H, W], in float64, by the weights' names."""

    def units(x: Tensor) -> list[Tensor]:
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).double().view(1, 3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).double().view(1, 3, 1, 1)
        found = []
        for i in range(30):
            if i in POOLINGS:
                x = F.max_pool2d(x, 2, 2)
            elif i in CONVOLUTIONS:
                name = f"features.{i}"
                x = F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).relu()
                if i in CUTS:
                    found.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    total = torch.zeros(len(a)).double()
    for i, (x, y) in enumerate(zip(units(a), units(b), strict=True)):
        weight = state[f"lin{i}.model.1.weight"][0, :, 0, 0]
        total += torch.einsum("bchw,c->bhw", (x - y) ** 2, weight).mean(dim=(1, 2))
    return total


def test_distance_is_that_of_the_paper(lpips: LPIPS) -> None:
    """A cut behind another layer, pixels in another range, features that are not normed, a sum over
    positions."""
    a, b = (torch.rand(2, 3, 32, 48) * 2 - 1 for _ in range(2))
    state = {name: weight.double() for name, weight in lpips.state_dict().items()}
    expected = restated(state, a.double(), b.double())
    found = lpips(a, b)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert found.shape == (2,) and not bool(lpips(a, a).any())


def test_autocast_narrows_the_features_alone(lpips: LPIPS) -> None:
    """Distances that training in bfloat16 adds up in 8 bits."""
    a, b = (torch.rand(2, 3, 32, 48) * 2 - 1 for _ in range(2))
    expected = torch.zeros(2, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = lpips(a, b)
        for i, (one, two) in enumerate(zip(lpips.directions(a), lpips.directions(b), strict=True)):
            weight = lpips.get_parameter(f"lin{i}.model.1.weight").double()
            expected += ((one - two).double().square() * weight[0]).sum(1).mean(dim=(1, 2))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_names_are_the_files(lpips: LPIPS) -> None:
    """Weights that no file of torchvision or of LPIPS' authors has."""
    features = {f"features.{i}.{kind}" for i in CONVOLUTIONS for kind in ("weight", "bias")}
    assert set(lpips.state_dict()) == features | {f"lin{i}.model.1.weight" for i in range(5)}
    assert not any(p.requires_grad for p in lpips.parameters())
    with torch.device("meta"):
        count = sum(p.numel() for p in LPIPS().parameters())
    assert count == 14_714_688 + 64 + 128 + 256 + 512 + 512  # VGG16's features, and the channels


def test_gradient_where_no_feature_is_on(lpips: LPIPS) -> None:
    """NaN from the root of 0: one flat image would end a run."""
    with torch.no_grad():
        for name, weight in lpips.named_parameters():
            if name.endswith("bias"):
                weight.fill_(-100.0)
    a = torch.zeros(1, 3, 32, 32, requires_grad=True)
    lpips(a, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert a.grad is not None and bool(a.grad.isfinite().all())


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lpips: LPIPS) -> tuple[Path, Path]:
    """Files of a small VGG, as torchvision's with a classifier, and of the channels."""
    whole = LPIPS.__init__
    monkeypatch.setattr(LPIPS, "__init__", lambda self, widths=SMALL: whole(self, widths))
    state = lpips.state_dict()
    vgg = {name: weight for name, weight in state.items() if name.startswith("features")}
    torch.save({**vgg, "classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg16.pth")
    torch.save({n: w for n, w in state.items() if n.startswith("lin")}, tmp_path / "vgg.pth")
    return tmp_path / "vgg16.pth", tmp_path / "vgg.pth"


def test_weights_of_the_users_files(files: tuple[Path, Path], lpips: LPIPS) -> None:
    """Random weights in place of the files', or a file of safetensors that is refused."""
    loaded = perceptual.load(*files)
    expected = lpips.state_dict()
    assert all(torch.equal(w, expected[name]) for name, w in loaded.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    safe = files[0].with_suffix(".safetensors")
    save_file({n: w for n, w in expected.items() if n.startswith("features")}, safe)
    again = perceptual.load(safe, files[1])
    assert all(torch.equal(w, expected[name]) for name, w in again.state_dict().items())


def test_files_that_do_not_fit(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A file of another net or a cut one that is taken, or a message that names neither file nor
    weight; a pickle that is executed."""
    vgg, lin = files
    weights = torch.load(vgg, weights_only=True)
    for change, words in (
        ({"features.28.bias": None}, r"no weight 'features\.28\.bias' of VGG16"),
        ({"features.0.weight": torch.zeros(3, 3, 5, 5)}, r"shape \[3, 3, 5, 5\]"),
        ({"features.0.weight": torch.full((3, 3, 3, 3), math.nan)}, "not finite"),
    ):
        content = {n: w for n, w in {**weights, **change}.items() if w is not None}
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=words) as caught:
            perceptual.load(tmp_path / "other.pth", lin)
        assert "other.pth" in str(caught.value)
    with pytest.raises(ValueError, match=r"lin0\.model\.1\.weight"):
        perceptual.load(vgg, vgg)  # the two exchanged
    with pytest.raises(ValueError, match=r"missing\.pth"):
        perceptual.load(tmp_path / "missing.pth", lin)
    lin.write_bytes(lin.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"vgg\.pth"):
        perceptual.load(vgg, lin)

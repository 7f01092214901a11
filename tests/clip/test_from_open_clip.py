"""Models of open_clip as rankers: with a stand-in for it, and with itself where it is there."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import dalle1
from dalle1 import registry
from dalle1.clip.from_open_clip import OpenCLIPConfig, OpenCLIPRanker
from dalle1.commands import main as command
from dalle1.commands import rank as rank_command
from dalle1.common.images import to_pil
from tests.conftest import ModelMaker

CAPTIONS = ["a red cat", "one small mat"]
SIDE = 8


class Encoder(nn.Module):
    """Mean color of the pixels that it is given, and the length of the caption, through weights."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.image = nn.Parameter(torch.randn(3 * SIDE * SIDE, 4, generator=generator))
        self.text = nn.Parameter(torch.randn(2, 4, generator=generator))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        self.seen: list[Tensor] = []

    def encode_image(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return images.flatten(1) @ self.image

    def encode_text(self, ids: Tensor) -> Tensor:
        return ids.float() @ self.text


class FakeOpenCLIP(types.ModuleType):
    """What of the package is called, and with what."""

    def __init__(self) -> None:
        super().__init__("open_clip")
        self.calls: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.settings: dict[str, Any] = {
            "size": SIDE, "mode": "RGB", "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3),
            "interpolation": "bilinear", "resize_mode": "squash", "fill_color": 0,
        }  # fmt: skip

    def list_models(self) -> list[str]:
        return ["ViT-B-32"]

    def list_pretrained_tags_by_model(self, model: str) -> list[str]:
        return ["openai", "laion2b_s34b_b79k"] if model == "ViT-B-32" else []

    def get_pretrained_cfg(self, model: str, tag: str) -> dict[str, Any]:
        return {"quick_gelu": True} if tag == "openai" else {}

    def create_model(self, name: str, pretrained: str | None = None, **options: Any) -> Encoder:
        self.calls.append({"name": name, "pretrained": pretrained, **options})
        if self.error is not None:
            raise self.error
        return Encoder(1 if pretrained else 2)

    def get_tokenizer(self, name: str) -> Callable[[list[str]], Tensor]:
        assert name == self.calls[-1]["name"]
        return lambda captions: torch.tensor([[len(c), c.count("a")] for c in captions])

    def get_model_preprocess_cfg(self, model: Encoder) -> dict[str, Any]:
        return self.settings


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> FakeOpenCLIP:
    fake = FakeOpenCLIP()
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    return fake


def pixels(side: int = SIDE) -> Tensor:
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))


def expected_scores(encoder: Encoder, images: Tensor) -> Tensor:
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.1, 0.2, 0.3])
    rows = (images - mean[:, None, None]) / std[:, None, None]
    text = torch.tensor([[float(len(c)), float(c.count("a"))] for c in CAPTIONS]) @ encoder.text
    cosines = F.normalize(text, dim=1) @ F.normalize(rows.flatten(1) @ encoder.image, dim=1).T
    return cosines.detach()


def test_scores_are_cosines_by_its_own_settings(package: FakeOpenCLIP) -> None:
    """OpenAI's mean for the model's, products for cosines, the scale or bias in the scores."""
    ranker = registry.open_ranker("open_clip:ViT-B-32/laion2b_s34b_b79k")
    assert isinstance(ranker, OpenCLIPRanker) and not ranker.training
    scores = ranker.score(CAPTIONS, pixels())
    torch.testing.assert_close(scores, expected_scores(Encoder(1), pixels()), rtol=1e-4, atol=1e-5)
    assert ranker.scale().item() == pytest.approx(torch.tensor(2.0).exp().item())
    (call,) = package.calls
    assert (call["name"], call["pretrained"]) == ("ViT-B-32", "laion2b_s34b_b79k")
    assert call["require_pretrained"] and not call["force_quick_gelu"]
    registry.open_ranker("open_clip:ViT-B-32/openai")
    assert package.calls[1]["force_quick_gelu"]  # which the architecture's name does not say


@pytest.mark.parametrize("fit", ["squash", "shortest", "longest"])
def test_images_are_fitted_as_it_asks(package: FakeOpenCLIP, fit: str) -> None:
    """Images that are cropped where the model was trained on whole ones, or the reverse."""
    package.settings["resize_mode"] = fit
    ranker = registry.open_ranker("open_clip:ViT-B-32/openai")
    image = torch.full((1, 3, 16, 32), 0.5)
    image[:, :, :, :8], image[:, :, :, -8:] = 0.0, 1.0  # left and right of the centered square
    got = ranker.preprocessing(image, torch.device("cpu"), torch.float32)[0, 0] * 0.1 + 0.5
    assert got.shape == (SIDE, SIDE)
    if fit == "shortest":
        # The smoothing of the last column reads a little beyond the cut.
        torch.testing.assert_close(got, torch.full_like(got, 0.5), rtol=0, atol=0.07)
    else:
        assert float(got[4, 0]) == pytest.approx(0) and float(got[4, -1]) == pytest.approx(1)
        assert float(got[0, 4]) == pytest.approx(0 if fit == "longest" else 0.5, abs=0.1)


def test_weights_of_a_file(package: FakeOpenCLIP, tmp_path: Path) -> None:
    """A file that is unpickled by others, or that is not read at all."""
    state = {name: weight.detach().clone() for name, weight in Encoder(5).state_dict().items()}
    state["logit_scale"] = state["logit_scale"].reshape(1)
    save_file(state, tmp_path / "weights.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.pt")
    for name in ("weights.safetensors", "a.pt"):
        ranker = registry.open_ranker(f"open_clip:ViT-B-32/{tmp_path / name}")
        assert package.calls[-1]["pretrained"] is None
        scores = ranker.score(CAPTIONS, pixels())
        torch.testing.assert_close(
            scores, expected_scores(Encoder(5), pixels()), rtol=1e-4, atol=1e-5
        )
    torch.save({**state, "call": print}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt.*which weights have no use for"):
        registry.open_ranker(f"open_clip:ViT-B-32/{tmp_path / 'bad.pt'}")
    del state["text"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"cut\.safetensors.*text") as raised:
        registry.open_ranker(f"open_clip:ViT-B-32/{tmp_path / 'cut.safetensors'}")
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("package")
def test_a_model_folder_names_it(
    make_model: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that cannot be opened again, or a file that is looked for in another place."""
    save_file(dict(Encoder(5).state_dict()), tmp_path / "weights.safetensors")
    make_model(clip=False).save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    model = dalle1.load(tmp_path / "model", ranker="open_clip:ViT-B-32/weights.safetensors")
    scores = dalle1.rank(CAPTIONS, pixels(), model)
    model.save(tmp_path / "again")
    section = json.loads((tmp_path / "again" / "config.json").read_text())["ranker"]
    path = str(tmp_path / "weights.safetensors")
    assert section == {"kind": "open_clip", "model": "ViT-B-32", "pretrained": path}
    monkeypatch.chdir("/")
    assert torch.equal(dalle1.rank(CAPTIONS, pixels(), dalle1.load(tmp_path / "again")), scores)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:", "expected open_clip:MODEL/PRETRAINED"),
        ("open_clip:ViT-B-32", "expected open_clip:MODEL/PRETRAINED"),
        ("open_clip:ViT-B-32/", "expected open_clip:MODEL/PRETRAINED"),
        ("open_clip:ViT-Z/openai", "expected a model of open_clip.list_models"),
        ("open_clip:ViT-B-32/opnai", "one of openai, laion2b_s34b_b79k for ViT-B-32, got 'opnai'"),
        ("open_clip:ViT-B-32//no/file.pt", "expected a file of weights or one of openai"),
        ("openclip:ViT-B-32/openai", "expected a folder, open_clip:MODEL/PRETRAINED, hf:NAME"),
        ("nowhere", "expected a folder, open_clip:MODEL/PRETRAINED, hf:NAME"),
    ],
)
def test_names_that_are_none(package: FakeOpenCLIP, name: str, message: str) -> None:
    """Random weights for a name without PRETRAINED; a download for a name that was mistyped."""
    with pytest.raises(ValueError, match=f"^ranker: .*{message}") as raised:
        registry.open_ranker(name)
    assert package.calls == [] and "\n" not in str(raised.value)


def test_what_the_package_raises_is_one_line(package: FakeOpenCLIP) -> None:
    """A traceback of a download that failed."""
    package.error = RuntimeError(
        "Failed to download\nweights: offline mode is enabled " + "x" * 999
    )
    with pytest.raises(ValueError, match="ranker: ViT-B-32/openai: Failed to download") as raised:
        registry.open_ranker("open_clip:ViT-B-32/openai")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_without_the_package(
    make_model: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback where a line would say what to install; a model that is read first."""
    monkeypatch.setitem(sys.modules, "open_clip", None)
    make_model(clip=False).save(tmp_path)
    expected = "ranker: open_clip is not installed; pip install 'dalle1[open_clip]'"
    with pytest.raises(ValueError, match="not installed") as raised:
        dalle1.load(tmp_path, ranker="open_clip:ViT-B-32/openai")
    assert str(raised.value) == expected
    config = json.loads((tmp_path / "config.json").read_text())
    config["ranker"] = {"kind": "open_clip", "model": "ViT-B-32", "pretrained": "openai"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="open_clip is not installed"):
        dalle1.load(tmp_path)
    assert dalle1.load(tmp_path, ranker="none").ranker is None


def test_a_package_that_needs_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A missing package told as one that is there."""
    (tmp_path / "open_clip.py").write_text("import timmm")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    with pytest.raises(ValueError, match="timmm, which open_clip needs, is not installed"):
        OpenCLIPRanker(OpenCLIPConfig(model="ViT-B-32", pretrained="openai"))


@pytest.mark.usefixtures("package")
def test_commands(
    make_model: ModelMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An option that is read by one command alone; a ranker that asks for a model that it does not
    need."""
    monkeypatch.delenv("DALLE1_MODEL", raising=False)
    make_model(clip=False).save(tmp_path / "model")
    for i, image in enumerate(pixels()):
        to_pil(image).save(tmp_path / f"{i}.png")
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    name = "open_clip:ViT-B-32/openai"
    wanted = registry.open_ranker(name).score(CAPTIONS[:1], pixels())[0]
    for extra in ([], ["--model", str(tmp_path / "model")]):
        assert rank_command.main([CAPTIONS[0], *files, "--ranker", name, *extra]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        order = wanted.argsort(descending=True).tolist()
        assert [line[1] for line in lines] == [files[i] for i in order]
        assert [float(line[0]) for line in lines] == pytest.approx(wanted[order].tolist(), abs=0.02)
    options = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    counts = ["--candidates", "4", "--keep", "2"]
    for ranker in (name, "perplexity"):
        arguments = ["sample", CAPTIONS[0], *options, *counts, "--ranker", ranker]
        assert command.main(arguments) == 0
        found = json.loads((tmp_path / "out" / "result.json").read_text())["results"][0]["scores"]
        assert len(found) == 2 and None not in found
    assert rank_command.main([CAPTIONS[0], *files, "--ranker", "likelihood"]) == 2
    assert "expected a model whose likelihood ranks" in capsys.readouterr().err
    assert rank_command.main([CAPTIONS[0], *files, "--ranker", "none"]) == 2


@pytest.mark.slow
@pytest.mark.skipif(find_spec("open_clip") is None, reason="needs open_clip_torch")
@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "RN50-quickgelu"])
def test_against_the_package(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Scores unlike those of open_clip itself, or of our own CLIP of the same weights."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    caplog.clear()
    ranker = registry.open_ranker(f"open_clip:{name}/{tmp_path / 'weights.pt'}")
    assert "randomly" not in caplog.text  # which it says where the file is read afterwards
    images = torch.rand(2, 3, 224, 224)
    settings = open_clip.get_model_preprocess_cfg(model)
    transform = open_clip.image_transform(
        settings["size"], False, settings["mean"], settings["std"], settings["resize_mode"]
    )
    tokenizer = open_clip.get_tokenizer(name)
    with torch.no_grad():
        rows = model.encode_image(torch.stack([transform(to_pil(x)) for x in images]), True)
        expected = model.encode_text(tokenizer(CAPTIONS), True) @ rows.T
    torch.testing.assert_close(ranker.score(CAPTIONS, images), expected, rtol=0, atol=2e-3)
    ours = dalle1.clip.load_released(tmp_path / "weights.pt")
    with torch.no_grad():
        own = ours(images, tokenizer(CAPTIONS)).T
    torch.testing.assert_close(ranker.score(CAPTIONS, images), own, rtol=0, atol=1e-5)

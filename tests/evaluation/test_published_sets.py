"""configs/paper/coco.yaml and cub.yaml on made-up sets of their layouts, with the fakes.

The parts are those of tests/fakes.py. A prior that draws an image's own tokens and a codec without
loss give back the true images.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from dalle1 import Model, Tokenizer, registry
from dalle1.commands import evaluate
from dalle1.commands.data import shard
from dalle1.common.config import load_settings
from dalle1.common.images import to_tensor
from dalle1.evaluation import benchmark
from dalle1.evaluation.candidates import CaptionCandidates
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.features import measure_chosen, measure_true, open_folder
from dalle1.evaluation.judged import Prompt
from dalle1.evaluation.prompts import read_prompts
from tests.data.curation.published_sets import BIRDS, write_coco, write_cub
from tests.evaluation.conftest import SettingsMaker
from tests.fakes import (
    KINDS,
    BrightnessRanker,
    PaletteCodec,
    PaletteConfig,
    UnigramConfig,
    UnigramPrior,
)

ROOT = Path(__file__).parents[2]
COUNT = 12


@pytest.fixture
def fake_model(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A folder of a model of the fakes, whose kinds are known for one test."""
    for role, kinds in registry.KINDS.items():
        monkeypatch.setitem(registry.KINDS, role, dict(kinds))
    for kind in KINDS:
        registry.register(kind)
    torch.manual_seed(0)
    prior = UnigramPrior(UnigramConfig(text_vocab=tokenizer.vocab_size, text_length=10))
    Model(tokenizer, prior, PaletteCodec(PaletteConfig()), BrightnessRanker()).save(
        tmp_path / "fake"
    )
    yield tmp_path / "fake"


def coco_of(folder: Path, count: int = COUNT) -> Path:
    """A val2014 of smooth pictures of several sizes, with two captions each; returns the json."""
    content: dict[str, Any] = {"images": [], "annotations": []}
    (folder / "val2014").mkdir(parents=True)
    for i in range(count):
        name = f"COCO_val2014_{i:012d}.jpg"
        small = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((20 + i, 24), Image.Resampling.BICUBIC)
        image.save(folder / "val2014" / name)
        content["images"].append({"id": 100 - i, "file_name": name})
        for j in range(2):
            text = f"a {'bright' if i % 2 else 'red'} cat {i} {j}"
            entry = {"id": 2 * i + j, "image_id": 100 - i, "caption": text}
            content["annotations"].append(entry)
    path = folder / "captions_val2014.json"
    path.write_text(json.dumps(content))
    return path


def network() -> Any:
    """Features and classes for `features=my_evaluation:network`."""

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        means = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)  # [n, 12]
        return means, 5 * means[:, :4]

    return run


@pytest.fixture
def _named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_evaluation")
    module.network = network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_evaluation", module)


def results_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "ranking.json").read_text())
    return found


@pytest.mark.usefixtures("_named")
def test_coco_from_the_download_to_the_figure(
    fake_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step between the download and the figure that does not fit the next; figures that a second
    start changes."""
    annotations = coco_of(tmp_path)
    data, run = tmp_path / "coco", tmp_path / "run"
    assert shard.main([str(tmp_path / "val2014"), str(data), "--coco", str(annotations)]) == 0
    config = str(ROOT / "configs/paper/coco.yaml")
    few = [f"model={fake_model}", f"run={run}", f"data={data}", "candidates=4", "captions=10"]
    few += ["features=my_evaluation:network", "blur=[0,2]", "image_size=16", "bootstrap=20"]
    assert evaluate.main([config, *few]) == 0, capsys.readouterr().err
    results = results_of(run)
    assert results["true_images"] == {"images": COUNT, "unreadable": 0}
    assert results["image_size"] == 16 and results["counts"] == [1, 2, 4]
    group = results["groups"]["captions"]
    assert group["captions"] == 10
    for radius in ("0", "2"):
        for n in ("1", "2", "4"):
            point = group["pictures"][radius][n]
            assert point["fid"] > 0 and point["inception_score"] == pytest.approx(1)
            assert point["inception_score_deviation"] == pytest.approx(0)  # ten parts of one
    scores = [group["pictures"]["0"][n]["clip_score"]["mean"] for n in ("1", "2", "4")]
    assert scores == sorted(scores) and scores[0] < scores[2]
    text = (run / "index.html").read_text()
    assert "12 true images" in text and "16 x 16 pixels" in text
    assert "FID of my_evaluation:network" in text
    settings = load_settings(RankSettings, run / "config.yaml")
    captions = [p.caption for p in read_prompts(settings)]
    assert len(set(captions)) == 10
    assert len({c.split()[3] for c in captions}) == 10  # one a picture
    assert evaluate.main([config, *few]) == 0
    assert results_of(run) == results


@pytest.mark.usefixtures("_named")
def test_cub_from_the_download_to_the_figure(fake_model: Path, tmp_path: Path) -> None:
    """A bird of which one caption is drawn, where the paper draws all; birds of training."""
    texts = write_cub(tmp_path)
    data, run = tmp_path / "cub", tmp_path / "run"
    chosen = ["--classes", str(texts / "testclasses.txt")]
    assert shard.main([str(tmp_path), str(data), "--cub", str(texts), *chosen]) == 0
    settings = [str(ROOT / "configs/paper/cub.yaml"), f"model={fake_model}", f"run={run}"]
    settings += [f"data={data}", "candidates=1", "blur=[0]", "image_size=16", "bootstrap=5"]
    assert evaluate.main([*settings, "features=my_evaluation:network"]) == 0
    results = results_of(run)
    assert results["groups"]["captions"]["captions"] == 10
    assert results["true_images"]["images"] == 1
    assert results["groups"]["captions"]["pictures"]["0"]["1"]["fid"] is None  # of one image
    drawn = read_prompts(load_settings(RankSettings, run / "config.yaml"))
    assert {p.caption for p in drawn} == {f"bird 3 has caption {i} ." for i in range(10)}
    assert len(BIRDS) == 4


def test_a_ranker_without_embeddings_gives_no_fid(fake_model: Path, tmp_path: Path) -> None:
    """A figure of nothing, or one under the name of another."""
    annotations = write_coco(tmp_path)
    shard.main([str(tmp_path), str(tmp_path / "coco"), "--coco", str(annotations)])
    settings = [str(ROOT / "configs/paper/coco.yaml"), f"model={fake_model}", "candidates=1"]
    settings += [f"run={tmp_path / 'run'}", f"data={tmp_path / 'coco'}", "blur=[0]", "bootstrap=5"]
    assert evaluate.main([*settings, "image_size=16"]) == 0
    results = results_of(tmp_path / "run")
    assert results["names"]["features"] == "none"
    assert results["groups"]["captions"]["pictures"]["0"]["1"]["fid"] is None
    assert results["names"]["clip_score"] == "ranker's score"
    assert "CLIP" not in (tmp_path / "run" / "index.html").read_text()


def test_figures_of_the_ranker_have_names_of_their_own(
    model: Model, make_settings: SettingsMaker
) -> None:
    """An FID of CLIP's embeddings that is read as one of the Inception network."""
    names = benchmark.network_names(model, make_settings())
    assert names["fid"] == "CLIP-FID" and "CLIP" in names["inception_score"]
    assert names["clip_score"] == "CLIP score"
    names = benchmark.network_names(model, make_settings(inception="file.pth"))
    assert names["fid"] == "FID" and names["inception_score"] == "Inception Score"


def test_images_that_are_the_true_ones_have_no_distance(
    model: Model,
    make_settings: SettingsMaker,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Generated images that are cut, resized, rounded or blurred otherwise than true ones, so that
    a perfect model has an FID above 0 at some blur."""
    coco_of(tmp_path)
    pictures = tmp_path / "val2014"
    for i, path in enumerate(sorted(pictures.iterdir())):
        path.with_suffix(".txt").write_text(f"a red cat {i}")
    settings = make_settings(data=str(pictures), blur=[0, 1, 2, 4, 8], image_size=16, candidates=1)
    prompts = read_prompts(settings)
    assert len(prompts) == COUNT

    def given(prompts: list[Prompt], _: RankSettings, tokens: bool = True) -> Iterator[Any]:
        for _prompt in prompts:
            yield CaptionCandidates(torch.zeros(1, 16), torch.zeros(1), torch.zeros(1, 0))

    images = {f"a red cat {i}": path for i, path in enumerate(sorted(pictures.glob("*.jpg")))}
    order = iter(p.caption for p in prompts)

    def decoded(*_: object) -> Tensor:
        with Image.open(images[next(order)]) as image:
            return to_tensor(image)[None]  # of its full size, as a model of other sides draws

    monkeypatch.setattr("dalle1.evaluation.features.read_candidates", given)
    monkeypatch.setattr("dalle1.evaluation.features.decode", decoded)
    from dalle1.evaluation.candidates import write_or_check_settings

    write_or_check_settings(model, settings)
    folder = open_folder(model, prompts, network(), settings)
    measure_true(folder)
    measure_chosen(folder, prompts)
    figures, true = benchmark.compare(folder, prompts)
    assert true == {"images": COUNT, "unreadable": 0}
    for radius in ("0", "1", "2", "4", "8"):
        assert figures["captions"][radius][1]["fid"] == pytest.approx(0, abs=1e-6)


def test_captions_that_a_seed_chooses(make_settings: SettingsMaker, tmp_path: Path) -> None:
    """Always the first images or captions; a caption drawn twice; a choice that depends on the run
    or leaves out what it could draw."""
    annotations = coco_of(tmp_path, 40)
    data = tmp_path / "coco"
    shard.main([str(tmp_path), str(data), "--coco", str(annotations)])

    def chosen(**changes: Any) -> list[str]:
        settings = {"data": str(data), "caption_key": "captions", "caption_seed": 0, **changes}
        return [p.caption for p in read_prompts(make_settings(**settings))]

    some = chosen(captions=30)
    assert some == chosen(captions=30) and some != chosen(captions=30, caption_seed=1)
    assert some[:10] == chosen(captions=10)
    pictures = {c.split()[3] for c in some}
    assert len(pictures) == 30 and pictures != set(map(str, range(30)))
    assert 5 < sum(c.endswith(" 0") for c in some) < 25
    assert len(chosen(captions=100)) == 40
    every = chosen(captions=100, captions_per_image="all")
    assert len(set(every)) == 80 and every != sorted(every)
    assert chosen(captions=3, caption_seed=None) == [
        "a red cat 0 0",
        "a bright cat 1 0",
        "a red cat 2 0",
    ]
    in_order = chosen(captions=3, caption_seed=None, captions_per_image="all")
    assert in_order == ["a red cat 0 0", "a red cat 0 1", "a bright cat 1 0"]


def test_captions_of_several_pictures(make_settings: SettingsMaker, tmp_path: Path) -> None:
    """One text drawn twice, as the same images; a picture that loses its other captions for it."""
    folder = tmp_path / "twins"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("the same cat" if i < 4 else f"cat {i}")
    found = read_prompts(make_settings(data=str(folder), caption_seed=0))
    assert sorted(p.caption for p in found) == ["cat 4", "cat 5", "the same cat"]
    lines = tmp_path / "list.txt"
    lines.write_text("one\ntwo\none\nthree\n")
    listed = read_prompts(make_settings(data=str(lines), caption_seed=3))
    assert sorted(p.caption for p in listed) == ["one", "three", "two"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "shapes", "caption_seed": 0}, "caption_seed is not read with data=shapes"),
        ({"data": "shapes", "captions_per_image": "all"}, "captions_per_image is not read"),
        ({"inception": "a.pth", "features": "a:b"}, "inception and features are two networks"),
        ({"image_size": 0}, "image_size"),
        ({"captions_per_image": "some"}, "captions_per_image"),
    ],
)
def test_settings_that_do_not_fit(
    make_settings: SettingsMaker, changes: dict[str, Any], message: str
) -> None:
    """A setting that nothing reads, taken without a word."""
    with pytest.raises(ValueError, match=message):
        make_settings(**changes)


@pytest.mark.parametrize("name", ["coco", "cub"])
def test_configs_are_the_paper_s(name: str) -> None:
    """A config that differs from section 3: other blur radii, other numbers of candidates."""
    settings = load_settings(RankSettings, ROOT / "configs/paper" / f"{name}.yaml")
    assert settings.blur == [0, 1, 2, 4, 8] and settings.candidates == 512
    assert (settings.captions, settings.image_size, settings.inception_splits) == (30000, 256, 10)
    assert (settings.temperature, settings.top_k, settings.top_p) == (1, None, None)
    assert settings.captions_per_image == ("all" if name == "cub" else "one")
    assert yaml.safe_load((ROOT / "configs/paper/cub.yaml").read_text())["extends"] == "coco.yaml"

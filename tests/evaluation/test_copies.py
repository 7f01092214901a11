"""Copies of a codec, a ranker alone, and data of one's own with a judge."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import BaseModel
from torch import Tensor, nn

from dalle1 import load, registry
from dalle1.commands import evaluate
from dalle1.data import shapes
from dalle1.data.emoji import EmojiDataset
from dalle1.data.emoji.trials import WRONG
from dalle1.evaluation.config import CopySettings, RankSettings, RetrievalSettings
from dalle1.evaluation.copies import psnr, run_copies
from dalle1.evaluation.emoji_data import EmojiData
from dalle1.evaluation.judged import open_judged
from dalle1.evaluation.retrieval import run_retrieval
from dalle1.evaluation.run import prepare, run
from dalle1.protocols import cuts_untold
from dvae.storage import Kind, save_part
from tests.conftest import ModelMaker
from tests.evaluation.emoji import SIDE, write_data

Written = tuple[Path, Path, EmojiDataset]
LEVELS = 16


class LevelsConfig(BaseModel):
    levels: int = LEVELS
    zoom: int = 1
    black: bool = False  # what it decodes to


class LevelsCodec(nn.Module):
    """A token is a pixel, each channel rounded to one of a few levels."""

    decodes_rows = True
    stride = 1

    def __init__(self, config: LevelsConfig) -> None:
        super().__init__()
        self.config, self.vocab_size, self.out_stride = config, config.levels**3, config.zoom

    def encode(self, images: Tensor) -> Tensor:
        top = self.config.levels - 1
        r, g, b = (images * top).round().long().unbind(1)
        return (r * self.config.levels + g) * self.config.levels + b

    def decode(self, tokens: Tensor) -> Tensor:
        levels = self.config.levels
        parts = (tokens // levels**2, tokens // levels % levels, tokens % levels)
        images = torch.stack(parts, 1) / (levels - 1) * (not self.config.black)
        return nn.functional.interpolate(images, scale_factor=self.out_stride)


class SeeingConfig(BaseModel):
    blind: bool = False


class SeeingRanker(nn.Module):
    """Prefers images of which a patch at the upper left is bright; or none at all."""

    def __init__(self, config: SeeingConfig) -> None:
        super().__init__()
        self.config = config

    def score(self, captions: list[str], images: Tensor) -> Tensor:
        scores = images[:, :, :4, :4].mean(dim=(1, 2, 3)) * (not self.config.blind)
        return scores.expand(len(captions), -1)


KINDS = (
    Kind("codec", "levels", LevelsConfig, LevelsCodec, None),
    Kind("ranker", "seeing", SeeingConfig, SeeingRanker, None),
)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        kinds = registry.KINDS[kind.role]
        monkeypatch.setitem(registry.KINDS, kind.role, {**kinds, kind.name: kind})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_data(tmp_path_factory.mktemp("emoji"))


def settings_of(written: Written, folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "run": str(folder / "run"),
        "data": str(written[0]),
        "packages": str(written[1]),
        "judge": "emoji",
        "captions": 10,
        "bootstrap": 20,
        **changes,
    }


def codec_in(folder: Path, **config: Any) -> str:
    save_part(KINDS[0], LevelsCodec(LevelsConfig(**config)), folder)
    return str(folder)


def test_copies_are_compared_with_the_true_images(written: Written, tmp_path: Path) -> None:
    """A PSNR of other images, of one image's mean, or in another unit; a judge that sees the true
    image in place of the copy."""
    splits = ["test", "heldout_pairs"]
    given = settings_of(written, tmp_path, splits=splits, codec=codec_in(tmp_path / "codec"))
    settings = CopySettings(measure="copies", **given)
    path = run_copies(settings, progress=False)
    results = json.loads(path.read_text())
    data = EmojiData(settings)
    prompts = data.prompts()
    for split in splits:
        group = results["groups"][split]
        images = [data.image(p, SIDE).double().numpy() for p in prompts if p.group == split]
        errors = [np.square(np.rint(i * (LEVELS - 1)) / (LEVELS - 1) - i).mean() for i in images]
        assert group["psnr"]["mean"] == pytest.approx(-10 * math.log10(np.mean(errors)), abs=1e-3)
        low, high = group["psnr"]["interval"]
        assert low <= group["psnr"]["mean"] <= high
        assert {"all right", "style", "background", "relation"} <= group["copies"].keys()
        # A 30th of the range is hardly seen. What a caption does not say is left out.
        assert all(point["mean"] == 1 for point in group["copies"].values()), group["copies"]
        assert group["true images"]["top-1"]["mean"] == 1 and group["images"] == 10
        assert sum(k["images"] for k in group["kinds"].values()) == 10
    assert (path.parent / "copies.png").is_file()
    black = codec_in(tmp_path / "black", black=True)
    results = json.loads(
        run_copies(
            CopySettings(measure="copies", **{**given, "codec": black}), progress=False
        ).read_text()
    )
    group = results["groups"]["test"]
    assert group["copies"]["all right"]["mean"] < 0.5
    assert group["true images"]["all right"]["mean"] == 1


def test_copies_of_another_size(written: Written, tmp_path: Path) -> None:
    """A codec that writes larger images than it reads compared with images of another size."""
    codec = codec_in(tmp_path / "codec", zoom=2)
    given = settings_of(written, tmp_path, codec=codec, captions=3, image_size=32)
    results = json.loads(
        run_copies(CopySettings(measure="copies", **given), progress=False).read_text()
    )
    assert results["groups"]["test"]["true images"]["all right"]["mean"] == 1
    assert results["groups"]["test"]["psnr"]["mean"] > 10


def test_psnr_by_hand() -> None:
    """A mean of decibels, or an interval the wrong way round."""
    point = psnr([0.01, 0.001, 0.001], 200)
    assert point is not None
    assert point["mean"] == pytest.approx(-10 * math.log10(0.004))
    low, high = point["interval"]  # type: ignore[misc]
    assert 20 <= low < 24 < high <= 30
    assert psnr([0.0, 0.0], 10) is None


def test_shapes_are_copied_too(tmp_path: Path) -> None:
    """A measurement that knows one data set alone."""
    settings = CopySettings(
        measure="copies",
        codec=codec_in(tmp_path / "codec"),
        run=str(tmp_path / "run"),
        data="shapes",
        captions=5,
        bootstrap=10,
    )
    group = json.loads(run_copies(settings, progress=False).read_text())["groups"]
    assert group["unseen captions"]["copies"]["all right"]["mean"] == 1
    assert "kinds" not in group["unseen captions"]


def test_the_command_prints_what_it_measures(
    written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table whose columns are other figures, or a config that is read as a ranking's."""
    given = settings_of(written, tmp_path, codec=codec_in(tmp_path / "codec"), captions=5)
    (tmp_path / "copies.yaml").write_text(yaml.safe_dump({"measure": "copies", **given}))
    assert evaluate.main([str(tmp_path / "copies.yaml"), "captions=6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        *("copies", "images", "PSNR,", "dB", "all", "right", "top-1", "top-5", "style"),
        *("background", "relation"),
    ]
    first = lines[1].split()
    results = json.loads((tmp_path / "run" / "copies.json").read_text())
    assert first[:2] == ["test", "6"]
    assert float(first[2]) == pytest.approx(results["groups"]["test"]["psnr"]["mean"], abs=0.01)
    assert first[3:6] == ["100.0%", "100.0%", "100.0%"]
    (tmp_path / "copies.yaml").write_text(yaml.safe_dump({"measure": "ranking", **given}))
    assert evaluate.main([str(tmp_path / "copies.yaml")]) == 2
    assert "codec: Extra inputs are not permitted" in capsys.readouterr().err


def test_a_true_image_is_compared_with_each_wrong_one(written: Written, tmp_path: Path) -> None:
    """Outcomes under another name, of the wrong one preferred, or of equal scores taken as won."""
    given = settings_of(written, tmp_path, splits=["test", "heldout_pairs"])
    data = EmojiData(RetrievalSettings(measure="retrieval", ranker="r", **given))
    prompts = data.prompts()
    won: dict[str, list[float]] = {}
    for prompt in prompts:
        if prompt.group == "test":
            true = float(data.image(prompt, SIDE)[:, :4, :4].mean())
            for name, image in data.distractors(prompt, SIDE).items():
                other = float(image[:, :4, :4].mean())
                won.setdefault(name, []).append((1 + np.sign(round(true - other, 6))) / 2)
    assert set(won) <= set(WRONG) and "another emoji" in won
    for blind in (False, True):
        save_part(KINDS[1], SeeingRanker(SeeingConfig(blind=blind)), tmp_path / f"ranker-{blind}")
        settings = RetrievalSettings(
            measure="retrieval", ranker=str(tmp_path / f"ranker-{blind}"), **given
        )
        path = run_retrieval(settings, progress=False)
        groups = json.loads(path.read_text())["groups"]
        found = groups["test"]["true first"]
        assert set(found) == set(won)
        for name, values in won.items():
            assert found[name]["pairs"] == len(values)
            expected = 0.5 if blind else float(np.mean(values))
            assert found[name]["mean"] == pytest.approx(expected), name
    assert "swapped" in groups["heldout_pairs"]["true first"]
    assert (path.parent / "retrieval.png").is_file()


def test_the_ranker_of_a_model_is_tried_alone(
    written: Written, tmp_path: Path, make_model: ModelMaker
) -> None:
    """A CLIP that reads captions by its model's tokenizer, which is not there."""
    make_model().save(tmp_path / "model")
    given = settings_of(written, tmp_path, captions=4)
    settings = RetrievalSettings(measure="retrieval", ranker=str(tmp_path / "model"), **given)
    results = json.loads(run_retrieval(settings, progress=False).read_text())
    data, ranker = EmojiData(settings), load(tmp_path / "model").ranker
    assert ranker is not None
    won = []
    for prompt in data.prompts():
        images = [data.image(prompt, SIDE), data.distractors(prompt, SIDE)["another emoji"]]
        with cuts_untold():
            true, other = ranker.score([prompt.caption], torch.stack(images))[0].tolist()
        won.append(float(true > other))
    found = results["groups"]["test"]["true first"]["another emoji"]
    assert found["mean"] == pytest.approx(np.mean(won))
    make_model(clip=False).save(tmp_path / "bare")
    bare = settings.model_copy(update={"ranker": str(tmp_path / "bare")})
    with pytest.raises(ValueError, match="bare has no ranker"):
        run_retrieval(bare)


def test_ranks_of_a_launcher_leave_it_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that all ranks write at once."""
    (tmp_path / "copies.yaml").write_text("measure: copies\n")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evaluate.main([str(tmp_path / "copies.yaml")]) == 0
    monkeypatch.setenv("RANK", "0")
    assert evaluate.main([str(tmp_path / "copies.yaml")]) == 2  # it lacks all its settings


def test_distractors_show_what_they_are_called(written: Written, tmp_path: Path) -> None:
    """A distractor that the judge would pass, or a background that the caption does not say."""
    given = settings_of(written, tmp_path, captions=12)
    data = EmojiData(CopySettings(measure="copies", codec="c", **given))
    for prompt in data.prompts():
        names = list(data.attributes)
        said = data.judge.reader.read(prompt.caption).background is not None
        found = data.distractors(prompt, SIDE)
        assert ("another background" in found) == said
        again = data.distractors(prompt, SIDE)
        for name, image in found.items():
            assert torch.equal(image, again[name])
            checks = data.check(image, prompt.caption)
            assert 0 in checks, (prompt, name)
            if name == "another background":
                assert checks[names.index("background")] == 0
                assert checks[names.index("top-1")] == 1


def test_what_a_measurement_needs_is_said(written: Written, tmp_path: Path) -> None:
    """An error of a part's insides, or none at all."""
    retrieval: dict[str, Any] = {"measure": "retrieval", "ranker": "likelihood"}
    given = settings_of(written, tmp_path)
    with pytest.raises(ValueError, match=r"ranker: expected one that scores images alone"):
        run_retrieval(RetrievalSettings(**retrieval, **given))
    shapes_alone = {"data": "shapes", "run": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=r"with one thing wrong, .* got ShapesData"):
        run_retrieval(RetrievalSettings(**retrieval, **shapes_alone))
    with pytest.raises(ValueError, match="expected data that are judged"):
        run_copies(CopySettings(measure="copies", codec="c", data="x", run=str(tmp_path / "run")))
    with pytest.raises(ValueError, match=r"shapes judges data=shapes alone, got 'x'"):
        open_judged(RankSettings(model="m", run="r", data="x", judge="shapes"))
    with pytest.raises(ValueError, match="judge: expected shapes, emoji or 'module:function'"):
        open_judged(RankSettings(model="m", run="r", data="x", judge="emojis"))


OWN = '''
"""A third data set: one color fills an image."""

import torch

from dalle1.evaluation.judged import Prompt

COLORS = {"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0)}


class Colors:
    attributes = ("color",)
    side = 8

    def __init__(self, settings):
        self.count = settings.captions

    def prompts(self):
        return [Prompt(f"all {name}", "colors") for name in COLORS][: self.count]

    def check(self, image, caption):
        color = torch.tensor(COLORS[caption.split()[1]])
        return [int(((image.mean(dim=(1, 2)) - color).abs() < 0.5).all())]

    def image(self, prompt, side):
        color = torch.tensor(COLORS[prompt.caption.split()[1]])
        return color[:, None, None].expand(3, side, side).clone()

    def true_images(self, limit, side, wanted):
        prompts = self.prompts()
        return ((i, self.image(prompts[i % 2], side)) for i in range(min(limit, 4)) if wanted(i))

    def files(self):
        return []

    def fingerprint(self):
        return "colors"

    def notes(self):
        return ["Two <colors>."]
'''


def test_data_of_ones_own(
    tmp_path: Path, make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third data set that needs a change of the library."""
    (tmp_path / "own_colors.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = make_model(grid=4)
    model.save(tmp_path / "model")
    given = {"run": str(tmp_path / "run"), "data": "anything", "judge": "own_colors:Colors"}
    settings = RankSettings(
        model=str(tmp_path / "model"), candidates=4, blur=[0], inception_splits=1, bootstrap=10,
        **given,
    )  # fmt: skip
    page = run(prepare(settings), settings)
    assert page is not None
    results = json.loads((page.parent / "ranking.json").read_text())
    curves = results["groups"]["colors"]["curves"]
    assert set(curves["attributes"]) == {"color"} and curves["attributes"]["color"]["4"]
    assert results["true_images"] == {"images": 4, "unreadable": 0}
    assert "Two &lt;colors&gt;." in page.read_text()
    copies = CopySettings(
        measure="copies", codec=codec_in(tmp_path / "codec"), **{**given, "run": f"{tmp_path}/c"}
    )
    group = json.loads(run_copies(copies, progress=False).read_text())["groups"]["colors"]
    assert group["copies"]["color"]["mean"] == 1 and group["psnr"] is None
    with pytest.raises(ValueError, match="completion: expected data with images to complete"):
        prepare(settings.model_copy(update={"completion": True}))
    sys.modules.pop("own_colors", None)


def test_shapes_are_drawn_as_their_captions_say(tmp_path: Path) -> None:
    """A true image of another caption on the contact sheet."""
    data = open_judged(RankSettings(model="m", run="r", data="shapes", captions=5))
    assert data is not None
    for prompt in data.prompts():
        assert all(data.check(data.image(prompt, shapes.MIN_SIDE), prompt.caption))

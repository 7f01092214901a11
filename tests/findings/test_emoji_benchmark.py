"""The findings about emoji, from the command line, with a model that knows the images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle1 import Model, Tokenizer, registry
from dalle1.commands import findings
from dalle1.common.images import to_tensor
from dalle1.data.emoji import EmojiDataset
from dalle1.findings.base import Options
from dalle1.findings.emoji_benchmark import digest_of, missing, read_group
from dalle1.findings.results import runs_of
from dalle1.findings.table import find
from tests import fakes
from tests.evaluation.emoji import (
    COUNT,
    KINDS,
    SEED,
    SIDE,
    KnowingPrior,
    KnownConfig,
    QuarterCodec,
    write_data,
)

SPLITS = ("test", "heldout_styles")
BRIGHTNESS = fakes.KINDS[2]
Written = tuple[Path, Path, EmojiDataset]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_data(tmp_path_factory.mktemp("emoji"))


@pytest.fixture(autouse=True)
def kinds() -> Iterator[None]:
    """The fakes are registered for this test alone."""
    before = {role: dict(known) for role, known in registry.KINDS.items()}
    for kind in (*KINDS[:2], BRIGHTNESS):
        registry.register(kind)
    yield
    for role, known in registry.KINDS.items():
        known.clear()
        known.update(before[role])


def write_model(folder: Path, dataset: EmojiDataset, right: float) -> Path:
    """A model that knows the image of each caption, and begins with it with this probability."""
    captions: dict[str, Tensor] = {}
    for split in SPLITS:
        for i in range(COUNT):
            sample = dataset.make(SEED, i, split, SIDE)
            captions.setdefault(sample.caption, to_tensor(sample.image))
    tokenizer = Tokenizer.train(captions, 320, 32, dropout=0.0)
    images, texts = torch.stack(list(captions.values())), tokenizer.encode(list(captions))
    config = KnownConfig(
        count=len(images), text_vocab=tokenizer.vocab_size, text_length=32, right=right
    )
    codec, prior = QuarterCodec(config), KnowingPrior(config)
    codec.images.copy_(images)
    prior.texts.copy_(texts)
    Model(tokenizer, prior, codec, fakes.BrightnessRanker()).save(folder)
    return folder


def results(out: Path, name: str) -> dict[str, dict[str, float]]:
    """The means of the arms' measures."""
    report = json.loads((out / f"{name}-scale-0.05" / "report.json").read_text())
    return {
        arm: {measure: figure["mean"] for measure, figure in found.items()}
        for arm, found in report["arms"].items()
    }


def test_a_model_that_knows_is_right(written: Written, tmp_path: Path) -> None:
    """Captions judged against images of others; an upper half that is not given; single draws that
    are taken for CLIP's first, or the other way round."""
    data, packages, dataset = written
    out = tmp_path / "out"
    for right, name in ((0.999, "completion"), (0.999, "style-by-words"), (1e-3, "completion")):
        model = write_model(tmp_path / f"model-{right}", dataset, right)
        given = ["--model", model, "--emoji", data, "--packages", packages, "--out", out]
        status = findings.main([name, *map(str, given), "--seeds", "0", "--scale", "0.05"])
        assert status == 0
        for arm in ("seen", "held out"):
            assert set(results(out, name)[arm].values()) == {100.0}, (right, name, arm)
        sheets = list((out / f"{name}-scale-0.05" / "pictures").glob("*.png"))
        assert len(sheets) == 2 * (1 + (right < 0.5))  # another model has results of its own
    model = write_model(tmp_path / "wrong", dataset, 1e-6)
    given = ["--model", model, "--emoji", data, "--packages", packages, "--out", out]
    findings.main(["style-by-words", *map(str, given), "--seeds", "0", "--scale", "0.05"])
    assert results(out, "style-by-words")["seen"]["all"] < 50


def test_seeds_ask_for_other_captions(written: Written, tmp_path: Path) -> None:
    """An interval over seeds that knows nothing of the captions."""
    data, packages, dataset = written
    model = write_model(tmp_path / "model", dataset, 0.999)
    options = Options(scale=0.05, model=model, emoji=data, packages=packages)
    asked = []
    for seed in (0, 1, 3):
        run = runs_of(find("style-by-words"), [seed], options, tmp_path / "out")[0]
        workspace = run.workspace(1, options)
        run.finding.run(run.settings, workspace)
        folder = workspace.folder / "ranking"
        page = (folder / "index.html").read_text()
        asked.append({c for c in captions_of(dataset, "test") if c in page})
    assert len(asked[0]) == 4 and not asked[0] & asked[1] and asked[0] == asked[2]


def captions_of(dataset: EmojiDataset, split: str) -> set[str]:
    return {dataset.make(SEED, i, split, SIDE).caption for i in range(COUNT)}


def test_what_is_missing_is_named(written: Written, tmp_path: Path) -> None:
    """A traceback in place of the flag that is missing."""
    data, _, dataset = written
    assert "--model" in (missing(Options()) or "")
    assert "--model" in (missing(Options(model=tmp_path, emoji=data)) or "")
    model = write_model(tmp_path / "model", dataset, 0.5)
    assert "--emoji" in (missing(Options(model=model)) or "")
    assert "--emoji" in (missing(Options(model=model, emoji=tmp_path)) or "")
    assert missing(Options(model=model, emoji=data)) is None


def test_another_model_has_another_digest(written: Written, tmp_path: Path) -> None:
    """Results of the former model that are shown for a newer one in the same folder."""
    folder = write_model(tmp_path / "model", written[2], 0.5)
    before = digest_of(folder)
    assert digest_of(write_model(folder, written[2], 0.5)) == before
    assert digest_of(write_model(folder, written[2], 0.6)) != before


def test_the_last_count_is_the_largest() -> None:
    """Counts that are sorted as text, by which 8 comes behind 16."""
    points = {n: {"mean": int(n) / 100} for n in ("1", "2", "4", "8", "16")}
    attributes = {"top-1": points, "style": points}
    found = read_group({"curves": {"accuracy": points, "attributes": attributes}})
    assert found.values == {
        "top1": 1, "style": 1, "all": 1, "best_top1": 16, "best_all": 16
    }  # fmt: skip
    assert [n for n, _ in found.curves["all"]] == [1, 2, 4, 8, 16]

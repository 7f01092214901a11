"""What the benchmarks count, against counts by hand."""

from __future__ import annotations

import io
import json
import random
import statistics
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle1 import Model, TransformerConfig
from dalle1.benchmarks import dataloading as data
from dalle1.benchmarks import dropout, float16, importing, published
from dalle1.benchmarks import generation as sampling
from dalle1.commands import benchmark
from dalle1.data.transforms import augment_dalle, read_image
from dalle1.seq2seq.config import Seq2SeqConfig
from dalle1.seq2seq.model import Seq2Seq
from dalle1.training.planning.flops import training_flops
from dalle1.transformer.masks import allowed
from dalle1.transformer.sequence import layer_pattern
from dvae import DVAEConfig
from tests.conftest import CAPTIONS

CONFIG = TransformerConfig(
    width=16, heads=2, head_size=8, layers=2, grid=6, text_length=8, text_vocab=50,
    image_vocab=60, conv_kernel=3,
)  # fmt: skip


def pairs() -> list[int]:
    """Allowed (query, key) pairs of each layer."""
    return [int(allowed(layer_pattern(i, 2), 8, 6, 3).sum()) for i in (1, 2)]


def test_flops_of_a_training_step() -> None:
    """FLOPs against the count of every matrix product of a training step."""
    n, products = 44, 0
    for allowed_pairs in pairs():
        products += n * (16 * 48 + 16 * 16 + 16 * 64 + 64 * 16) + 2 * allowed_pairs * 16
    products += 8 * 16 * 50 + 36 * 16 * 60
    assert training_flops(CONFIG) == 3 * 2 * products


def test_roofline_of_a_decoding_step() -> None:
    """A roofline of other work than a step does: text counted for each candidate, or not at all."""
    weights = 2 * (16 * 48 + 16 * 16 + 16 * 64 + 64 * 16) + 16 * 60
    # Of the stream's pairs those of the text with itself are no step's; a mean over 36 steps.
    read = [(total - 8 * 9 / 2) / 36 for total in pairs()]
    flops = 2 * 5 * (weights + 2 * 16 * sum(read))
    assert abs(sampling.decoding_flops(CONFIG, 5) / flops - 1) < 1e-12
    # The first layer, row, holds keys and values, the last, conv, states; the text is read once.
    image = 2 * 16 * (read[0] - 8) + 16 * (read[1] - 8)
    values = weights + 2 * 2 * 16 * 8 + 5 * image
    assert abs(sampling.read_bytes(CONFIG, 5, torch.bfloat16) / (2 * values) - 1) < 1e-12


def test_half_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ways that train other models or on other batches; a planted span that 32 bits notice."""
    figure, out = tmp_path / "half.png", tmp_path / "half.json"
    sizes = ["--layers", "3", "--width", "16", "--updates", "12", "--figure", str(figure)]
    assert benchmark.main(["half", *sizes, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert all(printed.count(f"  {way} ") == 2 for way in float16.WAYS)
    with Image.open(figure) as image:
        assert image.width > 1000
    without, planted = json.loads(out.read_text())["results"].values()
    wide = without[float16.FLOAT32]
    for name in ("losses", "sizes"):
        assert planted[float16.FLOAT32][name] == pytest.approx(wide[name], rel=0.02)
    for runs in (without, planted):
        assert runs[float16.BLOCKS]["losses"] == pytest.approx(wide["losses"], rel=0.05)
        assert runs[float16.BLOCKS]["losses"] != wide["losses"]
        assert {len(run["losses"]) for run in runs.values()} == {12}
        assert {len(shares) for run in runs.values() for shares in run["zeros"]} == {6}
    # One scale begins at 2^16, where the first blocks overflow.
    assert planted[float16.STREAM32]["skipped"] >= 1 and planted[float16.BLOCKS]["skipped"] == 0
    assert without[float16.STREAM16]["losses"] == pytest.approx(wide["losses"], rel=0.05)
    assert benchmark.main(["half", "--width", "24"]) == 2
    assert "multiple of 16" in capsys.readouterr().err


def test_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ways that read other images than the loop by hand, or a ratio of other rates."""
    small = {"GRID": 4, "SIDE": 32, "BATCH": 8, "DIFFERENT": 4}
    for name, value in small.items():
        monkeypatch.setattr(data, name, value)
    codec = DVAEConfig(width=4, groups=4, blocks_per_group=1, codebook_size=8192)
    monkeypatch.setattr(data, "CODEC", codec)
    transformer = CONFIG.model_copy(update={"grid": 4, "image_vocab": 8192})
    monkeypatch.setattr(data, "TRANSFORMER", transformer)
    out = tmp_path / "data.json"
    options = ["--samples", "24", "--workers", "0,1", "--repeats", "2", "--out", str(out)]
    assert benchmark.main(["data", *options]) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())["results"]
    rates = found["samples_per_second"]
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in rates.values())
    hand = statistics.median(rates[data.BY_HAND])
    for count in (0, 1):
        images, tokens = (
            statistics.median(rates[f"{what}, {count} workers"])
            for what in ("images", "token shards")
        )
        assert found["ratios"][f"images, {count} workers / {data.BY_HAND}"] == images / hand
        name = f"token shards / images, {count} workers"
        assert found["ratios"][name] == tokens / images and name in printed
    assert len(found["waiting"]) == 4
    assert all(0 <= values["waits"] <= 1 for values in found["waiting"].values())
    assert benchmark.main(["data", "configs/shapes/dalle.yaml"]) == 2
    assert benchmark.main(["data", "--samples", "7"]) == 2


def test_dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions of another script or length than the table says, or times of no work."""
    monkeypatch.setattr(dropout, "LETTERS", (10, 60))
    out = tmp_path / "dropout.json"
    assert benchmark.main(["dropout", "--repeats", "3", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["results"]
    assert set(found) == {"Latin", "Cyrillic", "Chinese", "Devanagari", "Arabic"}
    for script, times in found.items():
        assert set(times) == {"10", "60"} and all(len(ms) == 3 for ms in times.values())
        text = dropout.caption(script, 60, random.Random(0))
        names = {unicodedata.name(c).split()[0].lower() for c in text if c.isalpha()}
        assert len(text) == 60 and names == {"cjk" if script == "Chinese" else script.lower()}
    assert benchmark.main(["dropout", "configs/shapes/dalle.yaml"]) == 2


def test_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures of another model than the line says, norms at random, or a name that is guessed."""
    c = Seq2SeqConfig(
        width=16, heads=2, encoder_layers=1, decoder_layers=1, ffn_width=8, text_vocab=90,
        text_length=6, image_vocab=12, grid=3,
    )  # fmt: skip
    monkeypatch.setattr(published, "PRIORS", {"dalle_mini": lambda: Seq2Seq(c)})
    out = tmp_path / "published.json"
    options = ["--candidates", "1,2", "--dtype", "bfloat16", "--out", str(out)]
    assert benchmark.main(["published", *options]) == 0
    said = capsys.readouterr().out
    count = sum(p.numel() for p in Seq2Seq(c).parameters())
    assert f"dalle_mini: {count:,} parameters in bfloat16, 9 tokens an image, guidance 10.0" in said
    results = json.loads(out.read_text())["results"]["dalle_mini"]
    assert list(results) == ["1", "2"] and all(r["seconds"] > 0 for r in results.values())
    prior = published.random_prior("dalle_mini", torch.bfloat16)
    assert {p.dtype for p in prior.parameters()} == {torch.bfloat16}
    assert all(bool(p.isfinite().all()) for p in prior.parameters())
    assert benchmark.main(["published", "dalle"]) == 2
    assert "published: expected one of dalle_mini, got 'dalle'" in capsys.readouterr().err


def test_windows(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Passes that are not those of the way, tokens that differ, a caption that is left out."""
    model.save(tmp_path / "model")
    out = tmp_path / "windows.json"
    folder = str(tmp_path / "model")
    options = ["--candidates", "1,2", "--windows", "3", "--repeats", "2", "--out", str(out)]
    assert benchmark.main(["windows", folder, *CAPTIONS[:2], *options]) == 0
    found = json.loads(out.read_text())["results"]
    length = model.prior.grid[0] * model.prior.grid[1]
    for count in ("1", "2"):
        ways = found[count]
        assert set(ways) == {"one by one", "window 3", "chosen"}
        assert ways["one by one"]["passes"] == [length, length]
        assert ways["one by one"]["times as fast"] == 1
        for way in ways.values():
            assert way["equal"] == 1 and len(way["passes"]) == 2 and max(way["passes"]) <= length
            assert [len(seconds) for seconds in way["seconds"]] == [2, 2]
            assert way["roofline"] > 0
    assert "of the tokens equal" in capsys.readouterr().out
    assert benchmark.main(["windows", folder]) == 2
    assert benchmark.main(["windows", folder, "x", "--windows", "0"]) == 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process' memory")
def test_serving(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Requests that are lost, or counted where they were not answered; batches that are not
    shared; CPU threads that are not given back."""
    model.save(tmp_path / "model")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        arguments = ["serving", str(tmp_path / "model"), CAPTIONS[0], CAPTIONS[1]]
        arguments += ["--clients", "3", "--requests", "6", "--candidates", "2", "--repeats", "2"]
        assert benchmark.main([*arguments, "--out", str(tmp_path / "out.json")]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    found = json.loads((tmp_path / "out.json").read_text())["results"]["2"]
    assert found["answered"] == found["asked"] == len(found["waits"]) == 12
    assert len(found["sample"]) == len(found["served"]) == 2
    assert 2 <= found["mean_batch"] <= 6
    assert "12 of 12 answered" in capsys.readouterr().out


def test_loading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Memory of this process, or of torch itself, in the place of the weights' own."""
    config = tmp_path / "config.yaml"
    config.write_text(Path("configs/shapes/dalle.yaml").read_text())
    sizes = ["transformer.width=256", "transformer.heads=4", "transformer.head_size=64"]
    out = tmp_path / "loading.json"
    options = ["--dtype", "bfloat16", "--repeats", "1", "--out", str(out)]
    assert benchmark.main(["loading", str(config), *sizes, *options]) == 0
    found = json.loads(out.read_text())["results"]
    (run,) = found["runs"]
    assert found["bytes"] == 2 * found["weights"] and found["weights"] > 10**6
    assert 0 < run["load"] < run["load and read"]
    assert 0 < run["memory"] < 1.1 * found["bytes"] + 2**23
    assert "times the weights" in capsys.readouterr().out
    assert benchmark.main(["loading"]) == 2


def test_the_loop_by_hand_makes_what_the_reader_makes() -> None:
    """A loop that is easier than what it is compared with: no crop, no resize, another size."""
    photograph = data.photograph(np.random.default_rng(0))
    assert 25_000 < len(photograph) < 80_000
    with Image.open(io.BytesIO(photograph)) as image:
        assert image.size == (500, 375)
    ours = augment_dalle(read_image(photograph), 256, np.random.default_rng(1)).transpose(2, 0, 1)
    hand = data.read_by_hand(photograph, np.random.default_rng(1)).numpy()
    assert hand.shape == ours.shape and hand.dtype == ours.dtype
    # The same means, and the same large shapes; the crops may be a few pixels apart.
    assert abs(hand.astype(float).mean() - ours.astype(float).mean()) < 5
    coarse = [x.reshape(3, 8, 32, 8, 32).astype(float).mean((2, 4)) for x in (hand, ours)]
    assert np.corrcoef(coarse[0].ravel(), coarse[1].ravel())[0, 1] > 0.98


def test_importing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first import, which fills the disk's cache, counted; imports that share a process; what
    is heavy left unsaid."""
    for name, source in {"quick": "", "slow": "import time, matplotlib\ntime.sleep(0.05)"}.items():
        (tmp_path / f"{name}.py").write_text(source)
    (tmp_path / "matplotlib.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(importing, "STATEMENTS", ("import quick", "import slow"))
    monkeypatch.setattr(importing, "REFERENCE", "import quick")
    out = tmp_path / "importing.json"
    assert benchmark.main(["import", "--repeats", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["results"]
    assert [len(figures["seconds"]) for figures in found.values()] == [2, 2]
    assert found["import slow"]["median"] > 0.05 > found["import quick"]["median"]
    assert found["import slow"]["heavy"] == ["matplotlib"] and not found["import quick"]["heavy"]
    printed = capsys.readouterr().out
    assert "1.00 times torch's" in printed and "matplotlib" in printed
    assert benchmark.main(["import", "paper/250m"]) == 2

"""What the benchmarks count, against counts by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle1 import TransformerConfig
from dalle1.attention import allowed
from dalle1.benchmarks import half, sampling, training
from dalle1.layout import layer_pattern
from launch import benchmark

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
    assert training.step_flops(CONFIG) == 3 * 2 * products


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
    assert all(printed.count(f"  {way} ") == 2 for way in half.WAYS)
    with Image.open(figure) as picture:
        assert picture.width > 1000
    without, planted = json.loads(out.read_text())["results"].values()
    wide = without[half.FLOAT32]
    for name in ("losses", "sizes"):
        assert planted[half.FLOAT32][name] == pytest.approx(wide[name], rel=0.02)
    for runs in (without, planted):
        assert runs[half.BLOCKS]["losses"] == pytest.approx(wide["losses"], rel=0.05)
        assert runs[half.BLOCKS]["losses"] != wide["losses"]
        assert {len(run["losses"]) for run in runs.values()} == {12}
        assert {len(shares) for run in runs.values() for shares in run["zeros"]} == {6}
    # One scale begins at 2^16, where the first blocks overflow.
    assert planted[half.STREAM32]["skipped"] >= 1 and planted[half.BLOCKS]["skipped"] == 0
    assert without[half.STREAM16]["losses"] == pytest.approx(wide["losses"], rel=0.05)
    assert benchmark.main(["half", "--width", "24"]) == 2
    assert "multiple of 16" in capsys.readouterr().err

"""What the benchmarks count, against counts by hand."""

from __future__ import annotations

import torch

from dalle1 import TransformerConfig
from dalle1.attention import allowed
from dalle1.benchmarks import sampling, training
from dalle1.layout import layer_pattern

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

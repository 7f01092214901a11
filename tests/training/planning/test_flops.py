"""FLOPs and kept bytes of a pass, against autograd and counts by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dalle1 import Transformer, TransformerConfig
from dalle1.published import mindalle, rudalle
from dalle1.training.config import load_config
from dalle1.training.planning.flops import (
    build_module,
    measured_cost,
    saved_bytes,
    training_flops,
    transformer_cost,
)
from dalle1.training.planning.plan import parameters_by_part
from dalle1.transformer.config import Execution
from dalle1.transformer.layers import Layer
from dalle1.transformer.masks import allowed
from dalle1.transformer.sequence import layer_pattern
from dvae import DVAE, VQGAN
from dvae.objective import relaxed_elb
from dvae.vqgan.perceptual import LPIPS

PAPER = Path(__file__).parents[3] / "configs" / "paper"
SMALL = TransformerConfig(
    width=32, layers=3, heads=4, head_size=8, text_vocab=50, text_length=16, image_vocab=60,
    grid=8, conv_kernel=3,
)  # fmt: skip


def close(a: float, b: float, by: float) -> bool:
    return abs(a - b) <= by * abs(b)


@pytest.mark.parametrize(
    ("name", "flops", "blocks"),
    [
        (None, 20_353_152.0, 6_487_424.0),
        ("250m", 1_671_827_678_976.0, 536_337_927_424.0),
        ("12b", 94_156_654_017_024.0, 31_285_693_349_376.0),
    ],
)
def test_training_flops_keep_their_numbers(name: str | None, flops: float, blocks: float) -> None:
    """A count that drifts from the two that it replaced, one by formula and one by modules.

    They agreed on these numbers, of a sample's training pass and of the blocks' forward pass.
    """
    c = SMALL if name is None else load_config(PAPER / f"{name}.yaml").transformer
    assert c is not None
    assert training_flops(c) == flops
    cost = transformer_cost(c, Execution(checkpointing=True), 3)
    assert (cost.flops, cost.recomputed_flops) == (3 * flops, 3 * blocks)
    # The formula that the benchmarks had.
    n, t, m = c.sequence.length, c.text_length, c.sequence.image_length
    weights = 12 * c.width**2 * n * c.layers + c.width * (t * c.text_vocab + m * c.image_vocab)
    pairs = {p: int(allowed(p, t, c.grid, c.conv_kernel).sum()) for p in set(c.patterns)}
    assert flops == 6 * weights + 12 * c.width * sum(pairs[p] for p in c.patterns)


def tokens(c: TransformerConfig, batch: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(1, c.text_vocab, (batch, c.text_length))
    return text, torch.randint(c.image_vocab, (batch, c.sequence.image_length))


RUDALLE = SMALL.model_copy(update={"variant": rudalle.variant("v3", 16)})
MINDALLE = SMALL.model_copy(update={"variant": mindalle.variant(padding=1)})


@pytest.mark.parametrize("c", [SMALL, RUDALLE, MINDALLE], ids=["paper", "ruDALL-E", "minDALL-E"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_activations_against_autograd(
    attention: str,
    checkpointing: bool,
    precision: str,
    c: TransformerConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tensor that the formula forgets, or counts although nothing keeps it."""
    # The formula is for GPUs, whose attention stays in 16 bits.
    plain = "dalle1.transformer.attention.attend_widened"
    monkeypatch.setattr(plain, lambda attend, *qkv: attend(*qkv))
    execution = Execution.model_validate({"attention": attention, "checkpointing": checkpointing})
    transformer = Transformer(c, execution)
    if precision == "bf16":
        for layer in transformer.layers:
            assert isinstance(layer, Layer) and layer.narrow is None
            layer.narrow = torch.bfloat16
    batch = tokens(c, 3)
    kept, _ = saved_bytes(transformer.parameters(), lambda: transformer.loss(*batch).loss)
    cost = transformer_cost(c, execution, 3, precision)
    heads = sum(p.numel() for n, p in transformer.named_parameters() if "_head." in n)
    copies = 0 if checkpointing else cost.copies  # made anew in the backward pass
    assert close(cost.activations + copies + 4 * heads, kept, 0.05)
    # The loss holds chunks of logits beside those gradients of the heads.
    assert cost.logits == 4 * (heads + 2 * max(3 * 16 * c.text_classes, 3 * 64 * 60))


def test_recomputed_block_against_autograd() -> None:
    """A peak of the backward pass that leaves out what checkpointing computes again."""
    kept, again = (transformer_cost(SMALL, Execution(checkpointing=c), 3) for c in (False, True))
    layer = Transformer(SMALL).layers[0]
    assert isinstance(layer, Layer)
    x = torch.randn(3, SMALL.sequence.length, SMALL.width, requires_grad=True)
    held, _ = saved_bytes([*layer.mlp.parameters(), x], lambda: layer.mlp(x))
    assert close(again.block - kept.block, held, 0.01)


@pytest.mark.parametrize("c", [RUDALLE, MINDALLE], ids=["ruDALL-E", "minDALL-E"])
def test_flops_of_variants(c: TransformerConfig) -> None:
    """Pairs of the paper's patterns, or positions whose logits nobody asks for."""
    w, t, m = c.width, c.text_length, c.sequence.image_length
    pairs = sum(int(allowed(p, t, c.grid, c.conv_kernel).sum()) for p in c.patterns)
    heads = w * ((t - 1) * c.text_classes + m * c.image_vocab)
    assert training_flops(c) == 6 * (12 * w**2 * c.layers * (t + m) + heads + 2 * w * pairs)


def test_flops() -> None:
    """Dense attention counted for sparse, recomputation of the heads, or a batch counted twice."""
    pairs = [int(allowed(layer_pattern(i, 3), 16, 8, 3).sum()) for i in (1, 2, 3)]
    plain, again = (transformer_cost(SMALL, Execution(checkpointing=c), 5) for c in (False, True))
    assert plain.flops == again.flops == 5 * training_flops(SMALL) and plain.recomputed_flops == 0
    assert again.recomputed_flops == 5 * (2 * 80 * 3 * 12 * 32**2 + sum(4 * 32 * p for p in pairs))


def test_other_stages_without_values() -> None:
    """An estimate of the dVAE or CLIP that has little to do with what autograd keeps."""
    config = load_config(
        PAPER / "dvae.yaml",
        [
            "parallel={}",
            "compression=null",
            "dvae.width=16",
            "dvae.bottleneck=8",
            "dvae.codebook_size=32",
            "reader.image_size=32",
        ],
    )
    codec = DVAE(config.dvae)
    images = torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    kept, _ = saved_bytes(codec.parameters(), lambda: relaxed_elb(codec, images, 1.0, 1.0).loss)
    cost = measured_cost(config, 2, world_size=1)
    assert close(cost.activations, kept, 0.01)
    convolutions = [p for p in codec.parameters() if p.ndim == 4]
    assert cost.flops > 6 * 2 * 16 * sum(p.numel() for p in convolutions)  # at the tokens' 4 x 4
    half = config.parallel.model_copy(update={"precision": "bf16"})
    less = measured_cost(config.model_copy(update={"parallel": half}), 2, world_size=1)
    assert 0.4 * kept < less.activations < 0.8 * kept


def test_a_vqgan_without_values() -> None:
    """An estimate that leaves out the discriminator or LPIPS, or a pass that fails on tensors
    without values; parameters of the generator alone."""
    paper = PAPER.parent / "vqgan" / "f16.yaml"
    small = ["parallel={}", "reader.image_size=64", "vqgan.width=32", "vqgan.codebook_size=64"]
    full = measured_cost(load_config(paper, small), 2, world_size=1)
    without = "vqgan_training.discriminator=null"
    alone = measured_cost(load_config(paper, [*small, without]), 2, world_size=1)
    plain = load_config(paper, [*small, without, "vqgan_training.perceptual=null"])
    least = measured_cost(plain, 2, world_size=1)
    assert full.activations > alone.activations > least.activations
    assert full.flops > alone.flops > least.flops
    # LPIPS sees both images, and one of them backward too, where only inputs have gradients.
    with torch.device("meta"):
        features = [m for m in LPIPS().features if not isinstance(m, nn.ReLU)]
    side, products = 64, 0
    for module in features:
        if isinstance(module, nn.Conv2d):
            products += module.weight.numel() * side**2
        else:
            side //= 2
    assert close(alone.flops - least.flops, 2 * 2 * 3 * products, 0.02)
    # The generator's FLOPs are those of its convolutions in a pass that keeps what autograd keeps.
    codec = VQGAN(plain.vqgan)
    images = torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)

    def run() -> Tensor:
        quantized = codec.quantize.forward(codec.latents(images))
        difference = codec.pixels(quantized.vectors) - images
        return difference.abs().mean() + sum(quantized.losses.values())

    kept, _ = saved_bytes(codec.parameters(), run)
    assert close(least.activations, kept, 0.02)
    parts = parameters_by_part(build_module(load_config(paper)))
    assert parts["discriminator"] == 663_361
    assert sum(parts.values()) == 76_073_859 + 663_361

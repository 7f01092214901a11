"""FLOPs and kept bytes of a pass of the encoder-decoder, against autograd and counts by hand."""

from __future__ import annotations

import pytest
import torch

from dalle1.seq2seq.config import Seq2SeqConfig
from dalle1.seq2seq.model import Seq2Seq
from dalle1.training.planning.flops import saved_bytes, seq2seq_cost
from dalle1.transformer.config import Execution

SMALL = Seq2SeqConfig(
    width=32, heads=4, encoder_layers=2, decoder_layers=3, ffn_width=72, text_vocab=50,
    text_length=16, image_vocab=60, grid=8,
)  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_against_autograd(
    checkpointing: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that the formula forgets, or counts although nothing keeps it."""
    # The formula is for GPUs, whose attention stays in 16 bits.
    monkeypatch.setattr("dalle1.seq2seq.layers.attend_widened", lambda attend, *qkv: attend(*qkv))
    model = Seq2Seq(SMALL, Execution(checkpointing=checkpointing))
    if precision == "bf16":
        for layer in model.residual_layers:
            layer.narrow = torch.bfloat16
    text, image = torch.randint(3, 50, (3, 16)), torch.randint(60, (3, 64))
    kept, _ = saved_bytes(model.parameters(), lambda: model.loss(text, image).loss)
    cost = seq2seq_cost(SMALL, checkpointing, 3, precision)
    copies = 0 if checkpointing else cost.copies  # made anew in the backward pass
    head = model.decoder.head.weight.numel()
    assert cost.activations + copies + 4 * head == pytest.approx(kept, rel=0.05)
    assert cost.logits == 4 * (head + 2 * 3 * 64 * 61)


def test_flops() -> None:
    """Keys of the caption counted for every image position, a causal mask counted as full."""
    encoder = 2 * (4 * 32**2 + 3 * 32 * 72) * 16 + 2 * 2 * 32 * 16 * 16
    decoder = 3 * ((6 * 32**2 + 3 * 32 * 72) * 64 + 2 * 32**2 * 16)
    decoder += 3 * 2 * 32 * (64 * 65 // 2 + 64 * 16)
    plain, again = (seq2seq_cost(SMALL, checkpointing, 5) for checkpointing in (False, True))
    assert plain.flops == again.flops == 5 * 6 * (encoder + decoder + 61 * 32 * 64)
    assert (plain.recomputed_flops, again.recomputed_flops) == (0, 5 * 2 * (encoder + decoder))

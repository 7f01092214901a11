"""The published sizes; DALL-E mini's are the defaults."""

from __future__ import annotations

from dalle1.seq2seq.config import Seq2SeqConfig

MEGA = Seq2SeqConfig(
    width=2048,
    heads=32,
    encoder_layers=24,
    decoder_layers=24,
    ffn_width=4096,
    text_vocab=50272,
    image_rows=16416,
    init_std=0.01,
)

"""What captions and images must be for the encoder-decoder, and which text tokens count.

Dimensions: b batch, t text positions, m image positions.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from dalle1.seq2seq.config import Seq2SeqConfig


def is_token(c: Seq2SeqConfig, text_tokens: Tensor) -> Tensor:
    """Which text positions are no padding, and so are attended to: int64 [b, t] -> bool
    [b, 1, 1, t]."""
    counts = text_tokens < c.text_vocab if c.padding is None else text_tokens != c.padding
    return rearrange(counts, "b t -> b 1 1 t")


def check_text(c: Seq2SeqConfig, text_tokens: Tensor) -> None:
    """Raises ValueError when captions, int64 [b, t], do not fit."""
    if text_tokens.ndim != 2 or text_tokens.dtype != torch.int64:
        raise ValueError(
            f"text_tokens: expected int64 [batch, positions], got {text_tokens.dtype} "
            f"{list(text_tokens.shape)}"
        )
    if text_tokens.shape[1] != c.text_length:
        raise ValueError(
            f"text_tokens: expected {c.text_length} positions (the tokenizer pads to them), got "
            f"{text_tokens.shape[1]}"
        )
    if text_tokens.device.type != "cpu" or not len(text_tokens):
        return  # reading values would stall the device; its embedding look-up asserts there
    # Where padding is an id of its own, there are none beyond the vocabulary.
    beyond = c.text_vocab + (c.text_length if c.padding is None else 0)
    low, high = int(text_tokens.min()), int(text_tokens.max())
    if not 0 <= low <= high < beyond:
        raise ValueError(f"text_tokens: expected values in [0, {beyond - 1}], got [{low}, {high}]")
    if not bool(is_token(c, text_tokens).any(dim=-1).all()):
        raise ValueError(
            "text_tokens: expected at least one token in each caption, got padding alone; take "
            "`empty_caption()` for no caption"
        )


def check_tokens(c: Seq2SeqConfig, text_tokens: Tensor, image_tokens: Tensor) -> None:
    """Raises ValueError when captions, int64 [b, t], or images, int64 [b, m], do not fit."""
    check_text(c, text_tokens)
    if image_tokens.ndim != 2 or image_tokens.dtype != torch.int64:
        raise ValueError(
            f"image_tokens: expected int64 [batch, positions], got {image_tokens.dtype} "
            f"{list(image_tokens.shape)}"
        )
    if not 1 <= image_tokens.shape[1] <= c.image_length:
        raise ValueError(
            f"image_tokens: expected 1 to {c.image_length} positions, got {image_tokens.shape[1]}"
        )
    if len(text_tokens) != len(image_tokens):
        raise ValueError(
            f"text_tokens and image_tokens differ in batch: {len(text_tokens)} and "
            f"{len(image_tokens)}"
        )
    if image_tokens.device.type != "cpu" or not len(image_tokens):
        return
    low, high = int(image_tokens.min()), int(image_tokens.max())
    if not 0 <= low <= high < c.image_vocab:
        raise ValueError(
            f"image_tokens: expected values in [0, {c.image_vocab - 1}], got [{low}, {high}]"
        )

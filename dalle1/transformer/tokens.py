"""What the transformer's streams of tokens must be, and the targets of the text among them.

Dimensions: b batch, t text positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle1.tokenizer import END_OF_CAPTION
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.loss import IGNORED


def text_targets(text_tokens: Tensor, text_vocab: int) -> Tensor:
    """Targets of the text positions: int64 [b, t] -> int64 [b, t].

    Tokens stay, the first padding becomes END_OF_CAPTION, later padding is IGNORED.
    """
    padded = text_tokens >= text_vocab
    first = padded & (padded.cumsum(dim=1) == 1)
    targets = text_tokens.masked_fill(padded, IGNORED)
    return targets.masked_fill(first, END_OF_CAPTION)


def count_text_targets(text_tokens: Tensor, text_vocab: int) -> int:
    """Positions of int64 [b, t] that the text loss counts."""
    return int((text_targets(text_tokens, text_vocab) != IGNORED).sum())


def check_tokens(config: TransformerConfig, text_tokens: Tensor, image_tokens: Tensor) -> None:
    """Raises ValueError when the tokens do not fit the stream or the vocabularies."""
    c = config
    for name, tokens in (("text_tokens", text_tokens), ("image_tokens", image_tokens)):
        if tokens.ndim != 2 or tokens.dtype != torch.int64:
            raise ValueError(
                f"{name}: expected int64 [batch, positions], got {tokens.dtype} "
                f"{list(tokens.shape)}"
            )
    if text_tokens.shape[1] != c.text_length:
        raise ValueError(
            f"text_tokens: expected {c.text_length} positions (Tokenizer.encode pads to "
            f"them), got {text_tokens.shape[1]}"
        )
    if image_tokens.shape[1] > c.sequence.image_length:
        raise ValueError(
            f"image_tokens: expected at most {c.sequence.image_length} positions, got "
            f"{image_tokens.shape[1]}"
        )
    if text_tokens.shape[0] != image_tokens.shape[0]:
        raise ValueError(
            f"text_tokens and image_tokens differ in batch: {text_tokens.shape[0]} and "
            f"{image_tokens.shape[0]}"
        )
    if text_tokens.device.type != "cpu":
        return  # reading values would stall the device; its embedding look-up asserts there
    if image_tokens.numel() and not (
        int(image_tokens.min()) >= 0 and int(image_tokens.max()) < c.image_vocab
    ):
        raise ValueError(
            f"image_tokens: expected values in [0, {c.image_vocab - 1}], got "
            f"[{int(image_tokens.min())}, {int(image_tokens.max())}]"
        )
    padding = c.text_vocab + torch.arange(c.text_length, device="cpu")
    fits = ((text_tokens >= 0) & (text_tokens < c.text_vocab)) | (text_tokens == padding)
    if not bool(fits.all()):
        wrong = int(text_tokens[~fits][0])
        raise ValueError(
            f"text_tokens: expected tokens in [0, {c.text_vocab - 1}] or, at position p, the "
            f"padding {c.text_vocab} + p; got {wrong}"
        )

"""What captions and images must be for the encoder-decoder, and which text tokens count.

Dimensions: b batch, t text positions, m image positions.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from dalle1.seq2seq.config import Seq2SeqConfig
from dalle1.transformer.prior import PADDED, check_ids, check_same_batch, check_values


def is_token(c: Seq2SeqConfig, text_tokens: Tensor) -> Tensor:
    """Which text positions are no padding, and so are attended to: int64 [b, t] -> bool
    [b, 1, 1, t]."""
    counts = text_tokens < c.text_vocab if c.padding is None else text_tokens != c.padding
    return rearrange(counts, "b t -> b 1 1 t")


def check_text(c: Seq2SeqConfig, text_tokens: Tensor) -> None:
    """Raises ValueError when captions, int64 [b, t], do not fit."""
    check_ids("text_tokens", text_tokens, c.text_length, c.text_length, PADDED)
    # Where padding is an id of its own, there are none beyond the vocabulary.
    beyond = c.text_vocab + (c.text_length if c.padding is None else 0)
    check_values("text_tokens", text_tokens, beyond)
    if text_tokens.device.type != "cpu":
        return
    if not bool(is_token(c, text_tokens).any(dim=-1).all()):
        raise ValueError(
            "text_tokens: expected at least one token in each caption, got padding alone; take "
            "`empty_caption()` for no caption"
        )


def check_tokens(c: Seq2SeqConfig, text_tokens: Tensor, image_tokens: Tensor) -> None:
    """Raises ValueError when captions, int64 [b, t], or images, int64 [b, m], do not fit."""
    check_text(c, text_tokens)
    check_ids("image_tokens", image_tokens, 1, c.image_length)
    check_same_batch(text_tokens, image_tokens)
    check_values("image_tokens", image_tokens, c.image_vocab)

"""What the transformer's streams of tokens must be, and the targets of the text among them.

Dimensions: b batch, t text positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle1.tokenizer import padding_id
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.loss import IGNORED
from dalle1.transformer.prior import PADDED, check_ids, check_same_batch, check_values


def empty_caption(config: TransformerConfig) -> Tensor:
    """The text of no caption: int64 [t], all padding unless the variant has tokens for it."""
    c, tokens = config, config.variant.empty_caption
    if c.variant.position_paddings:
        padding = [padding_id(c.text_vocab, p) for p in range(len(tokens), c.text_length)]
    else:
        assert c.variant.padding_token is not None  # see Variant
        padding = [c.variant.padding_token] * (c.text_length - len(tokens))
    return torch.tensor([*tokens, *padding], device="cpu")


def embedded_ids(config: TransformerConfig, text_tokens: Tensor) -> Tensor:
    """Rows of the text's embedding, int64 [b, t]: the tokens themselves but for a padding token,
    which becomes the padding of its position where positions have their own."""
    c, padding = config, config.variant.padding_token
    if padding is None or not c.variant.position_paddings:
        return text_tokens
    own = padding_id(c.text_vocab, 0) + torch.arange(
        text_tokens.shape[1], device=text_tokens.device
    )
    return torch.where(text_tokens == padding, own, text_tokens)


def text_targets(config: TransformerConfig, text_tokens: Tensor, image_tokens: Tensor) -> Tensor:
    """Targets of the text positions: int64 [b, t] and, of the image, [b, m] -> int64 [b, t].

    The paper's: tokens stay, the first padding becomes the end of the caption, later padding is
    IGNORED. Where padding is predicted, it stays. Where no start stands before the text, a position
    predicts the next token, and the last one is IGNORED, or predicts the first image token as if
    it were a text token (`Variant.first_token_as_text`).
    """
    c, v = config, config.variant
    targets = embedded_ids(c, text_tokens)
    if not v.predicts_padding:
        padded = targets >= c.text_vocab
        if v.padding_token is not None:
            padded |= targets == v.padding_token
        first = padded & (padded.cumsum(dim=1) == 1)
        targets = targets.masked_fill(padded, IGNORED).masked_fill(first, v.end_of_caption)
    if c.shift:
        last = image_tokens[:, :1]
        if not v.first_token_as_text:
            last = torch.full_like(last, IGNORED)
        targets = torch.cat([targets[:, 1:], last], dim=1)
    return targets


def image_targets(config: TransformerConfig, image_tokens: Tensor) -> Tensor:
    """Targets of the image: its tokens, int64 [b, m], but for a first one that counts as text."""
    if not config.variant.first_token_as_text:
        return image_tokens
    return image_tokens.index_fill(1, image_tokens.new_zeros(1), IGNORED)


def count_text_targets(config: TransformerConfig, text_tokens: Tensor) -> int:
    """Positions of int64 [b, t] that the text loss counts."""
    image_tokens = torch.zeros_like(text_tokens)  # which of them there are does not matter
    return int((text_targets(config, text_tokens, image_tokens) != IGNORED).sum())


def check_tokens(config: TransformerConfig, text_tokens: Tensor, image_tokens: Tensor) -> None:
    """Raises ValueError when the tokens do not fit the stream or the vocabularies."""
    c = config
    check_ids("text_tokens", text_tokens, c.text_length, c.text_length, PADDED)
    check_ids("image_tokens", image_tokens, 0, c.sequence.image_length)
    check_same_batch(text_tokens, image_tokens)
    check_values("image_tokens", image_tokens, c.image_vocab)
    if text_tokens.device.type != "cpu":
        return  # as in `check_values`
    fits = (text_tokens >= 0) & (text_tokens < c.text_vocab)
    paddings = ""
    if c.variant.position_paddings:
        fits |= text_tokens == c.text_vocab + torch.arange(c.text_length, device="cpu")
        paddings = f" or, at position p, the padding {c.text_vocab} + p"
    if not bool(fits.all()):
        wrong = int(text_tokens[~fits][0])
        raise ValueError(
            f"text_tokens: expected tokens in [0, {c.text_vocab - 1}]{paddings}; got {wrong}"
        )

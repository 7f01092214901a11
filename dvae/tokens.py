"""What image tokens must be before they are decoded.

Dimensions: b images, h w token grid.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raises ValueError where tokens are no int64 [b, h, w] in [0, vocab_size)."""
    if not isinstance(tokens, Tensor):
        kind = type(tokens).__name__
        raise ValueError(f"tokens: expected int64 [b, rows, columns], a tensor, got {kind}")
    if tokens.ndim != 3 or tokens.dtype != torch.int64:
        raise ValueError(
            f"tokens: expected int64 [b, rows, columns], got {tokens.dtype} {list(tokens.shape)}"
        )
    if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size):
        raise ValueError(
            f"tokens: expected values in [0, {vocab_size - 1}], got "
            f"[{int(tokens.min())}, {int(tokens.max())}]"
        )

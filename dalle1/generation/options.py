"""How a token is drawn from its logits, and the random numbers that it is drawn with.

Dimensions: b rows, v vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle1.common.arguments import as_caption, as_float, as_int
from dalle1.common.hardware import largest_float

# Below 1 by more than float32 rounds when a total of probabilities is multiplied with it.
LARGEST_UNIFORM = 1 - 2**-22


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is drawn from its logits; the defaults are the paper's (section 2.6).

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keeps the k likeliest tokens; None keeps all.
        top_p: keeps the smallest set of tokens of total probability >= p; None keeps all.
        guidance: classifier-free guidance, logits = unconditional + guidance * (conditional -
            unconditional); 1 is none.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "guidance"):
            self._set(name, as_float(getattr(self, name), name))
        if self.top_k is not None:
            self._set("top_k", as_int(self.top_k, "top_k"))
        if self.top_p is not None:
            self._set("top_p", as_float(self.top_p, "top_p"))
        if not (0 <= self.temperature < float("inf")):
            raise ValueError(f"temperature: expected a number >= 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1 or None, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1] or None, got {self.top_p}")
        if not (0 <= self.guidance < float("inf")):
            raise ValueError(f"guidance: expected a number >= 0, got {self.guidance}")

    def _set(self, name: str, value: float) -> None:
        object.__setattr__(self, name, value)  # Python's own type, in a frozen class


def sample_token(logits: Tensor, uniforms: Tensor, options: SamplingOptions) -> Tensor:
    """Draws a token of each row by inverse transform sampling.

    Args:
        logits: [b, v].
        uniforms: [b] in [0, 1).

    Returns:
        Tokens, int64 [b].
    """
    if options.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / options.temperature
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        least = logits.topk(options.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if options.top_p is not None and options.top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        # A token is left out when likelier ones already have the mass; the likeliest always stays.
        surplus = ordered.cumsum(dim=-1) - ordered >= options.top_p
        logits = logits.masked_fill(surplus.scatter(-1, order, surplus), -torch.inf)
    # The sums have thousands of terms, so they are in 64 bits.
    cumulative = F.softmax(logits, dim=-1).double().cumsum(dim=-1)
    # Scaled by the actual total, so that rounding never leads beyond the last token.
    point = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True)[:, 0]


def candidate_uniforms(seed: int, caption: str, first: int, count: int, length: int) -> Tensor:
    """Uniform numbers in [0, 1) of candidates first ... first + count - 1: float64 [count, length].

    Row i depends on (seed, caption, first + i) alone: each has a counter-based generator (Philox).
    """
    seed, caption = as_int(seed, "seed"), as_caption(caption)
    first, count, length = as_int(first, "first"), as_int(count, "count"), as_int(length, "length")
    digest = hashlib.sha256(f"{seed}\0{caption}".encode()).digest()
    key = int.from_bytes(digest[:8], "little")
    rows = []
    for i in range(first, first + count):
        bits = np.random.Philox(key=np.array([key, i], dtype=np.uint64))
        rows.append(np.random.Generator(bits).random(length))
    return torch.from_numpy(np.stack(rows))


def uniforms_for(device: torch.device, uniforms: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), of any shape, on a device, in the largest type that it has.

    Rounded to 32 bits a number may become 1, which no token stands for: it is cut below that.
    """
    dtype = largest_float(device)
    rounded = uniforms.to(dtype)  # where they are: the device may not have their type
    if dtype == torch.float32:
        rounded = rounded.clamp(max=LARGEST_UNIFORM)
    return rounded.to(device)

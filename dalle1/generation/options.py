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

# Logits are float32: below the smallest temperature that divides them 0 is meant.
SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny
LARGEST_TEMPERATURE = torch.finfo(torch.float32).max
# Below 1 by more than a product with the total of probabilities is rounded by.
LARGEST_UNIFORM = {torch.float32: 1 - 2**-22, torch.float64: 1 - 2**-51}


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is drawn from its logits; the defaults are the paper's (section 2.6).

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keeps the k likeliest tokens, of equal ones those of the lowest ids; None keeps
            all.
        top_p: keeps the smallest set of tokens of total probability >= p; None keeps all.
        guidance: classifier-free guidance, logits = unconditional + guidance * (conditional -
            unconditional); 1 is none.
        window: positions that are drawn in one pass of the prior. It changes the time and not the
            tokens, up to the rounding of matrix products; 1 draws one after the other, None takes
            what pays for so many images.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "guidance"):
            self._set(name, as_float(getattr(self, name), name))
        for name in ("top_k", "window"):
            if getattr(self, name) is not None:
                self._set(name, as_int(getattr(self, name), name))
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
        if self.window is not None and self.window < 1:
            raise ValueError(f"window: expected at least 1 or None, got {self.window}")

    def _set(self, name: str, value: float) -> None:
        object.__setattr__(self, name, value)  # Python's own type, in a frozen class


def sample_token(logits: Tensor, uniforms: Tensor, options: SamplingOptions) -> Tensor:
    """Draws a token of each row by inverse transform sampling.

    Args:
        logits: [b, v]; -inf rules a token out.
        uniforms: [b] in [0, 1).

    Returns:
        Tokens, int64 [b].

    Raises:
        ValueError: a row of logits holds NaN, infinity, or nothing but -inf.
    """
    tokens, drawn = draw_token(logits, uniforms, options)
    check_drawn(drawn, options, logits.dtype)
    return tokens


def draw_token(logits: Tensor, uniforms: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """`sample_token` that never waits for the device: what cannot be drawn is told, not raised.

    Returns:
        Tokens, int64 [b], each one of the vocabulary; whether it was drawn, bool [b], false where
        the row's logits are no distribution.
    """
    logits = logits.float()
    if options.temperature < SMALLEST_TEMPERATURE:
        tokens = logits.argmax(dim=-1)
        return tokens, logits.amax(dim=-1).isfinite()
    if options.temperature < 1:
        # The likeliest is 0 and the others negative, so that no temperature overflows it.
        logits = (logits - logits.amax(dim=-1, keepdim=True)).div_(options.temperature)
    elif options.temperature > 1:
        logits = logits / min(options.temperature, LARGEST_TEMPERATURE)
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        logits = logits.masked_fill(_below_top(logits, options.top_k), -torch.inf)
    if options.top_p is not None and options.top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        # A token is left out when likelier ones already have the mass; the likeliest always stays.
        surplus = ordered.cumsum(dim=-1) - ordered >= options.top_p
        surplus[:, 0] = False  # a mass of 0 in 32 bits
        logits = logits.masked_fill(surplus.scatter(-1, order, surplus), -torch.inf)
    # The sums have thousands of terms, so they are in 64 bits where the device has them.
    wide = uniforms.dtype if uniforms.dtype == torch.float64 else largest_float(logits.device)
    cumulative = F.softmax(logits, dim=-1).to(wide).cumsum(dim=-1)
    # Scaled by the actual total, and below it, so that rounding never leads beyond the last token.
    total = cumulative[:, -1:]
    point = uniforms.to(wide).clamp(max=LARGEST_UNIFORM[wide])[:, None] * total
    found = torch.searchsorted(cumulative, point, right=True)[:, 0]
    # Where a row is NaN, so is its total, and what is found is beyond the vocabulary.
    return found.clamp(max=logits.shape[-1] - 1), total.isfinite()[:, 0]


def _below_top(logits: Tensor, k: int) -> Tensor:
    """Whether each is none of its row's k largest, bool [b, v]; of equal ones the first count."""
    least = logits.topk(k, dim=-1).values[:, -1:]
    below = logits < least
    if logits.device.type == "cpu" and int(below.sum()) == below.numel() - k * len(logits):
        return below  # no ties; a GPU does not wait for the answer
    tied = logits == least
    places = k - (logits > least).sum(dim=-1, keepdim=True, dtype=torch.int32)
    return below | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) > places))


def check_drawn(drawn: Tensor, options: SamplingOptions, dtype: torch.dtype) -> None:
    """Raises ValueError where one of `draw_token`'s rows could not be drawn.

    dtype: of the weights or activations that the logits come from, for the message.
    """
    if bool(drawn.all()):
        return
    narrow = dtype.itemsize < torch.float32.itemsize
    remedies = ["use torch.bfloat16 or torch.float32" if narrow else "take an earlier checkpoint"]
    if options.guidance != 1:
        remedies.append(f"a smaller guidance than {options.guidance:g}")
    raise ValueError(
        "dtype: expected finite logits, got NaN or infinity: the activations are beyond what "
        f"{dtype} holds; {', or '.join(remedies)}"
    )


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
    """Uniform numbers of any shape on a device, in the largest type that it has."""
    return uniforms.to(largest_float(device)).to(device)  # in this order: it may lack theirs

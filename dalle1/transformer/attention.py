"""Block-sparse execution of the attention patterns, for training: only blocks with allowed keys.

Every pattern is a narrow band once the image states stand in the right order: raster for row and
conv, column by column for the column layers (paper appendix B.1), whose keys are then contiguous.
On CUDA the band is a FlexAttention block mask. FlexAttention has no backward pass on CPUs
(torch 2.13); there `CHUNK` queries at a time read the text and their part of the band through the
fused CPU kernel.

The masks come from `attention.allowed`, the one definition of each pattern.

Dimensions: b batch, n stream positions, t text positions, m keys of a chunk, s heads, d head size,
w grid side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._triton import has_triton

from dalle1.common.attention import attend_widened
from dalle1.transformer.masks import allowed, sequence_allowed
from dalle1.transformer.sequence import Pattern
from dvae.calls import isolated

CHUNK = 64  # queries at a time on CPUs: two rows of the paper's grid; 128 is slower
VARIANTS = 64  # compiled for one pattern
SPARSE_FROM = 256  # stream positions
SMALLEST_HEAD = 16  # that FlexAttention's kernels take
BLOCK = 128  # side of a block of the mask on CUDA


def sparse_pays(x: Tensor, head_size: int) -> bool:
    """Whether a stream of states [b, n, w] is expected to run faster through the blocks.

    Measured on two CPU cores, forward and backward: half as fast as a mask at n = 46, equal at 88,
    1.5 times as fast at 320 and 2 to 3 times at 1,280 (launch/benchmark.py attention).
    """
    if x.shape[1] < SPARSE_FROM or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if x.is_cuda:
        return head_size >= SMALLEST_HEAD and has_triton()
    return x.device.type == "cpu"


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, text_length: int, grid: int, kernel: int
) -> Tensor:
    """One softmax over all allowed keys of a whole stream: q, k, v [b, s, n, d] -> [b, s, n, d].

    Equal to `attention.dense_attention` up to rounding, gradients included. Raises ValueError
    when n is not the whole stream's.
    """
    if pattern == "column":
        q, k, v = (by_column(x, text_length, grid) for x in (q, k, v))
    y = banded_attention(q, k, v, pattern, text_length, grid, kernel)
    return by_column(y, text_length, grid) if pattern == "column" else y


def banded_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, text_length: int, grid: int, kernel: int
) -> Tensor:
    """`sparse_attention` of states that already stand in the pattern's order: those of a column
    layer `by_column`, which costs less before the projection to q, k and v than behind it."""
    n = text_length + grid * grid
    if q.shape[2] != n:
        raise ValueError(f"sparse attention: expected the whole stream of {n}, got {q.shape[2]}")
    if q.is_cuda:
        if q.shape[-1] < SMALLEST_HEAD:
            raise ValueError(
                f"sparse attention on CUDA needs heads of at least {SMALLEST_HEAD}, got "
                f"{q.shape[-1]}: set execution.attention to dense"
            )
        blocks = _block_mask(pattern, text_length, grid, kernel, str(q.device))
        return _on_cuda(q, k, v, pattern, blocks)
    if q.device.type != "cpu":
        raise ValueError(
            f"sparse attention: expected a device cpu or cuda, got {q.device.type}: set "
            "execution.attention to dense"
        )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The kernel called below takes it for granted that a head's numbers lie side by side.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        chunks = _chunks(pattern, text_length, grid, kernel, q.dtype)
        y: Tensor = _Chunked.apply(q, k, v, chunks)  # type: ignore[no-untyped-call]
        return y

    return attend_widened(attend, q, k, v)


def by_column(x: Tensor, text_length: int, grid: int) -> Tensor:
    """Image states from raster order to column by column, or back: [..., n, d] -> [..., n, d]."""
    text, image = x[..., :text_length, :], x[..., text_length:, :]
    turned = rearrange(image, "... (r c) d -> ... (c r) d", r=grid, c=grid)
    return torch.cat([text, turned], dim=-2)


def _sequence_position(pattern: Pattern, p: Tensor, text_length: int, grid: int) -> Tensor:
    """The stream position of the p-th state in the order that the pattern is run in."""
    if pattern != "column":
        return p
    i = p - text_length
    return torch.where(i < 0, p, text_length + i % grid * grid + i // grid)


@lru_cache(maxsize=64)
@isolated()  # kept: a mask made in inference must serve training too
def _block_mask(
    pattern: Pattern, text_length: int, grid: int, kernel: int, device: str
) -> BlockMask:
    def mask(b: Tensor, s: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q, k = (_sequence_position(pattern, p, text_length, grid) for p in (q, k))
        return sequence_allowed(pattern, q, k, text_length, grid, kernel)

    n = text_length + grid * grid
    return create_block_mask(mask, None, None, n, n, device=device, BLOCK_SIZE=BLOCK)


@cache
def _compiled(pattern: Pattern) -> Callable[..., Any]:
    # One for each pattern, with variants of its own (batch sizes, types, with and without
    # gradients): beyond its limit a compiled function silently falls back to dense scores.
    limits: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": VARIANTS}
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False, **limits)
    return compiled


def _on_cuda(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, blocks: BlockMask) -> Tensor:
    y: Tensor = _compiled(pattern)(q, k, v, block_mask=blocks)
    return y


@dataclass(frozen=True)
class _Chunk:
    """Queries first ... last - 1 and the keys they read: the first `text`, then low ... high - 1.

    mask: what is added to the scores, [queries, keys], 0 or -inf; None where all is allowed.
    """

    first: int
    last: int
    text: int
    low: int
    high: int
    mask: Tensor | None

    def keys(self, x: Tensor) -> Tensor:
        if self.low == self.text:
            return x[:, :, : self.high]
        return torch.cat([x[:, :, : self.text], x[:, :, self.low : self.high]], dim=2)

    def add(self, total: Tensor, part: Tensor) -> None:
        total[:, :, : self.text] += part[:, :, : self.text]
        total[:, :, self.low : self.high] += part[:, :, self.text :]


@lru_cache(maxsize=64)
@isolated()
def _chunks(
    pattern: Pattern, text_length: int, grid: int, kernel: int, dtype: torch.dtype
) -> tuple[_Chunk, ...]:
    """The text's queries, then the image's, `CHUNK` at a time."""
    t, n = text_length, text_length + grid * grid
    order = _sequence_position(pattern, torch.arange(n), text_length, grid)
    mask = allowed(pattern, text_length, grid, kernel)[order][:, order]
    chunks = []
    for first in [*range(0, t, CHUNK), *range(t, n, CHUNK)]:
        last = min(first + CHUNK, t if first < t else n)
        text = min(last, t)
        read = mask[first:last, t:].any(dim=0).nonzero()[:, 0] + t
        low, high = (int(read[0]), int(read[-1]) + 1) if len(read) else (text, text)
        rows = torch.cat([mask[first:last, :text], mask[first:last, low:high]], dim=1)
        bias = torch.zeros(rows.shape, dtype=dtype).masked_fill(~rows, -torch.inf)
        chunks.append(_Chunk(first, last, text, low, high, None if bool(rows.all()) else bias))
    return tuple(chunks)


class _Chunked(torch.autograd.Function):
    """Chunk by chunk through the fused CPU kernel, which keeps no scores.

    The chunks' keys are put together anew in the backward pass: kept, they would take several
    times the memory of q, k and v.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, chunks: tuple[_Chunk, ...]) -> Tensor:
        # Heads innermost, as the output map reads them: no copy there.
        y = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
        y = y.transpose(1, 2)
        norms = []  # ln of each query's softmax denominator
        for c in chunks:
            part, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, c.first : c.last], c.keys(k), c.keys(v), attn_mask=c.mask
            )
            y[:, :, c.first : c.last] = part
            norms.append(norm)
        ctx.save_for_backward(q, k, v, y, *norms)
        ctx.chunks = chunks
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, y, *norms = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for c, norm in zip(ctx.chunks, norms, strict=True):
            here = slice(c.first, c.last)
            part_q, part_k, part_v = (
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad[:, :, here],
                    q[:, :, here],
                    c.keys(k),
                    c.keys(v),
                    y[:, :, here],
                    norm,
                    0.0,
                    False,
                    attn_mask=c.mask,
                )
            )
            grad_q[:, :, here] = part_q
            c.add(grad_k, part_k)
            c.add(grad_v, part_v)
        return grad_q, grad_k, grad_v, None


@lru_cache(maxsize=32)
@isolated()
def _mask(pattern: Pattern, text_length: int, grid: int, kernel: int, device: str) -> Tensor:
    return allowed(pattern, text_length, grid, kernel).to(device)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, text_length: int, grid: int, kernel: int
) -> Tensor:
    """One softmax over all allowed keys, by a boolean mask: q, k, v [b, s, n, d] -> [b, s, n, d].

    n may stop short of the whole stream; the mask is cut to it.
    """
    n = q.shape[2]
    mask = _mask(pattern, text_length, grid, kernel, str(q.device))[:n, :n]
    return attend_widened(partial(F.scaled_dot_product_attention, attn_mask=mask), q, k, v)

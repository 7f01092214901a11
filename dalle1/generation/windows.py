"""Exact parallel decoding: windows of image tokens in one pass of a prior.

A token is a function of its logits and of a uniform number that belongs to its position. So an
image is the fixed point of z = F(z), where F draws every position from the tokens before it (Jacobi
iteration; Santilli et al. 2023, Teng et al. 2024). A pass runs a window of drafted tokens. Each
position draws its token with its own number, and those up to the first draft that was wrong are
final: their logits came from final tokens. Of what is drawn behind it, a row of the grid is the
next draft; further back, the tokens above are copied anew. The result is the sequential image,
token for token; nothing is accepted or rejected at random.

Dimensions: n rows, k positions of a window, m image positions, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, log2

import torch
from torch import Tensor

from dalle1.generation.options import SamplingOptions, draw_token

MEAN_SHARE = 0.2  # of the newest pass in the running mean of positions that a row advances by
MARGIN = 8.0  # the window is MARGIN x (that mean - 1), rounded up to a power of two
SMALLEST = 2


def draw_windows(
    logits_of: Callable[[Tensor, Tensor], Tensor],
    tokens: Tensor,
    uniforms: Tensor,
    options: SamplingOptions,
    given: int,
    window: int,
    columns: int,
    start: int,
    on_pass: Callable[[int, Tensor], None],
) -> None:
    """Draws the tokens of all rows, each of which advances at its own speed.

    Args:
        logits_of: what a prior's `step` gives: tokens [n, k] that stand before positions
            first ... first + k - 1, and first, int64 [n] -> logits [n, k, v].
        tokens: int64 [n, m], of which the first `given` are given; the others are written.
        uniforms: [n, m] in [0, 1).
        options: how a token is drawn.
        given: positions that are not drawn.
        window: largest k; it shrinks while few of the drafts are right, and grows again.
        columns: of the token grid.
        start: what stands before the first position.
        on_pass: called after each pass with the number of positions that are final in all rows,
            and with whether these were drawn, bool [n]; see `draw_token`.
    """
    rows, length = tokens.shape
    window = min(window, length - given)
    size, mean_advance = window, window / 2
    final = torch.full((rows,), given, device=tokens.device)  # positions, of each row
    drafted = final  # positions that hold a token that is final or was drawn for a draft
    drawn = torch.ones(rows, dtype=torch.bool, device=tokens.device)
    done = given
    while done < length:
        first = final.clamp(max=length - size)
        index = first[:, None] + torch.arange(size, device=tokens.device)
        is_open = index >= final[:, None]
        drafts = _drafts(tokens, index, drafted, columns)
        tokens.scatter_(1, index, drafts)
        before = tokens.gather(1, (index - 1).clamp(min=0)).masked_fill(index == 0, start)
        logits = logits_of(before, first)
        numbers = uniforms.gather(1, index)
        picked, possible = (
            x.view(rows, size) for x in draw_token(logits.flatten(0, 1), numbers.flatten(), options)
        )
        picked = torch.where(is_open, picked, drafts)
        # A position is final where all drafts before it in the window were right.
        right = (picked == drafts).cumprod(dim=1)
        is_final = torch.cat([torch.ones_like(right[:, :1]), right[:, :-1]], dim=1)
        drawn &= (possible | (is_final == 0)).all(dim=1)
        tokens.scatter_(1, index, picked)
        reached = first + is_final.sum(dim=1)
        # What was drawn more than a row behind the wrong draft followed a wrong context.
        drafted = torch.minimum(torch.maximum(drafted, first + size), reached + columns)
        advance = float((reached - final)[final < length].float().mean())
        final, done = reached, int(reached.min())
        on_pass(done, drawn)
        # Where drafts are often wrong, long windows are work for nothing.
        mean_advance += MEAN_SHARE * (advance - mean_advance)
        size = min(window, _size(mean_advance))


def _size(mean_advance: float) -> int:
    """Positions of the next window, where rows advanced by so many in a pass."""
    wanted = MARGIN * (mean_advance - 1)
    return max(SMALLEST, int(2 ** ceil(log2(wanted)))) if wanted > 1 else SMALLEST


def _drafts(tokens: Tensor, index: Tensor, drafted: Tensor, columns: int) -> Tensor:
    """The tokens at positions [n, k]; where there is none yet, the nearest above that there is, in
    the first row of the grid the last one."""
    end = drafted[:, None]
    rows_up = (index - end).div(columns, rounding_mode="floor") + 1
    above = index - columns * rows_up.clamp(min=0)
    source = torch.where(above >= 0, above, (end - 1).clamp(min=0))
    return tokens.gather(1, source).masked_fill(end == 0, 0)

"""The inverse Haar transform, by which Sber's decoder writes images of twice its maps' side.

Dimensions: b batch, c colors, h w height and width of the bands.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def inverse_haar(maps: Tensor) -> Tensor:
    """Images, float [b, c, 2h, 2w], of their bands, float [b, 4c, h, w].

    The first c maps are the means of each color, LL. Then come, color by color, three details: LH,
    the difference of rows; HL, that of columns; HH, that of both. A square of 2x2 pixels is half of

        LL + LH + HL + HH    LL + LH - HL - HH
        LL - LH + HL - HH    LL - LH - HL + HH
    """
    colors = maps.shape[1] // 4
    mean = maps[:, :colors]
    row, column, both = rearrange(maps[:, colors:], "b (c n) h w -> n b c h w", n=3)
    upper, lower = mean + row, mean - row
    upper_detail, lower_detail = column + both, column - both
    pixels = torch.stack(
        [upper + upper_detail, upper - upper_detail, lower + lower_detail, lower - lower_detail]
    )
    return rearrange(pixels / 2, "(i j) b c h w -> b c (h i) (w j)", i=2)

"""The type that attention is computed in.

Dimensions: b batch, s heads, n queries, m keys, d head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def attend_widened(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """`attend(q, k, v)` in the type that it is fastest in, the result in that of the queries.

    On CPUs bfloat16 becomes float32: torch's kernel multiplies 16-bit numbers in so many small
    products that 17 positions take ten times as long, 280 twice, and 1,280 as long
    (docs/benchmarks).

    Args:
        attend: attention of queries, keys and values.
        q: [b, s, n, d].
        k: [b, s, m, d].
        v: as the keys.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return attend(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return attend(q.float(), k.float(), v.float()).to(q.dtype)

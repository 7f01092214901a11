"""Cross-entropy of a linear head, without ever holding the logits of a whole batch.

At the paper's size the image logits alone would be 1,024 x 8,192 float32 numbers for each sample.

Dimensions: n positions, w width, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100  # target of positions that count for nothing; cross_entropy's own default
CHUNK = 512  # positions whose logits stand in memory at once: 16 MB at 8,192 tokens


def linear_cross_entropy(states: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of head(states) against targets, logits in 32 bits.

    states [n, w]; targets int64 [n], IGNORED where a position is none. The mean is over the
    others. Equal to `F.cross_entropy(head(states).float(), targets)` up to rounding.
    """
    wanted = torch.is_grad_enabled()  # inside of forward it is always off
    with torch.autocast(states.device.type, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            states, head.weight, head.bias, targets, wanted
        )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """A chunk's logits are turned into their own gradient at once, and that into the gradients of
    states and head: so the backward pass needs neither the logits nor a second look at them.

    All of it in 32 bits whatever the weights are in (section 2.4): a share of 1 / n of a
    probability is below what float16 can hold.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, wanted: bool
    ) -> Tensor:
        w, b = weight.float(), None if bias is None else bias.float()
        counted = targets != IGNORED
        share = counted / counted.sum()  # of each position in the mean
        loss = torch.zeros((), device=states.device)
        if wanted:
            grads = (
                torch.empty_like(states, dtype=torch.float32),
                torch.zeros_like(w),
                None if b is None else torch.zeros_like(b),
            )
        for first in range(0, len(states), CHUNK):
            here = slice(first, first + CHUNK)
            x = states[here].float()
            logits = F.linear(x, w, b)
            target = targets[here].clamp(min=0)[:, None]
            total = logits.logsumexp(dim=1, keepdim=True)
            loss += ((total - logits.gather(1, target))[:, 0] * share[here]).sum()
            if wanted:
                # d loss / d logits = share * (softmax - one-hot), in the logits' own memory.
                error = logits.sub_(total).exp_()
                error.scatter_add_(1, target, -torch.ones_like(total))
                error.mul_(share[here, None])
                torch.mm(error, w, out=grads[0][here])
                grads[1].addmm_(error.t(), x)
                if grads[2] is not None:
                    grads[2].add_(error.sum(dim=0))
        if wanted:
            ctx.save_for_backward(*grads)
            ctx.dtypes = states.dtype, weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias = (
            None if held is None else (held * grad).to(dtype)
            for held, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return states, weight, bias, None, None

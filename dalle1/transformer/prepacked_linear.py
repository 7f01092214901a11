"""Linear maps whose weights are laid out once for the CPU's matrix kernels (oneDNN).

A step of the decoder multiplies a few dozen rows with every weight of the model. With the weights
packed in blocks that is two to three times as fast as `nn.Linear` on the CPUs measured
(docs/benchmarks), in 32 as in 16 bits, and the same up to rounding. Elsewhere, and where torch
lacks the kernels, modules stay as they are.

Dimensions: n rows, i and o features in and out.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


@lru_cache(maxsize=1)
def has_kernels() -> bool:
    """Whether this torch has oneDNN, and its kernels under the names known here."""
    ops = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(ops, name) for name in names)


class PrepackedLinear(nn.Module):
    """`weight @ x + bias` with a packed copy of the weight [o, i]; inference alone."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        """rows: how many are expected at a call; others are right too, only slower."""
        super().__init__()
        # No buffer: a packed tensor can be neither moved nor saved.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:  # [..., i] -> [..., o]
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


def can_prepack(weight: Tensor) -> bool:
    """Whether torch has the kernels for a weight of this type and device."""
    ops = torch.ops.mkldnn
    if weight.device.type != "cpu" or not has_kernels():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def prepacked_linear(weight: Tensor, bias: Tensor | None, rows: int) -> nn.Module:
    """A map of x [..., i] to `weight @ x + bias` [..., o], packed where that is possible."""
    if can_prepack(weight):
        return PrepackedLinear(weight, bias, rows)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    plain.weight = nn.Parameter(weight)
    if bias is not None:
        plain.bias = nn.Parameter(bias)
    return plain


def prepacked(module: M, rows: int) -> M:
    """A copy of a module that shares its parameters, with its linear maps packed."""
    if not all(can_prepack(p) for p in module.parameters()):
        return module
    if isinstance(module, nn.Linear):
        return prepacked_linear(module.weight, module.bias, rows)  # type: ignore[return-value]
    shared = {id(p): p for p in module.parameters()}
    twin = copy.deepcopy(module, shared)
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            twin.set_submodule(name, PrepackedLinear(part.weight, part.bias, rows))
    return twin


def prepacked_bytes(module: nn.Module) -> int:
    """What packing all linear maps of a module takes beside their own weights."""
    weights = (m.weight for m in module.modules() if isinstance(m, nn.Linear))
    return sum(w.numel() * w.element_size() for w in weights if can_prepack(w))

"""What all parts of a model have: a device, weights that are numbers, a fingerprint."""

from __future__ import annotations

import hashlib
import json
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

Part = TypeVar("Part")
SAMPLED = 256  # values of a weight that `quick_fingerprint` reads, up to twice as many


def device_of(part: Any) -> torch.device:
    """Where a part's parameters, or else its buffers, are; the CPU where it has none."""
    if isinstance(part, nn.Module):
        for tensor in chain(part.parameters(), part.buffers()):
            return tensor.device
    return torch.device("cpu")


def dtype_name(part: Any) -> str:
    """The type of a part's parameters, such as "bfloat16"; "float32" where it has none."""
    first = next(part.parameters(), None) if isinstance(part, nn.Module) else None
    return "float32" if first is None else str(first.dtype).removeprefix("torch.")


def in_32_bits(part: Part) -> Part:
    """The part itself; what it holds in 16 bits is converted."""
    if isinstance(part, nn.Module):
        held = {tensor.dtype for tensor in chain(part.parameters(), part.buffers())}
        if held & {torch.float16, torch.bfloat16}:
            part.float()
    return part


def check_finite(part: Any, name: str) -> None:
    """ValueError that names the weight or table when one is NaN or infinite; name: of the part."""
    if not isinstance(part, nn.Module):
        return
    for key, weight in part.state_dict().items():  # buffers too: the tables of a part may be some
        if not bool(weight.isfinite().all()):
            raise ValueError(
                f"{name}: the weight {key} is not finite; take an earlier checkpoint, the training "
                "has diverged"
            )


def fingerprint(part: Any) -> str:
    """The same 16 digits for the same config and weights, wherever they lie and whatever the type
    that the weights are held in."""
    config = getattr(part, "config", None)
    described = config.model_dump() if config is not None else type(part).__name__
    sha = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    weights = part.state_dict() if isinstance(part, nn.Module) else {}
    for name, weight in sorted(weights.items()):
        sha.update(f"{name} {list(weight.shape)}".encode())
        sha.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def quick_fingerprint(*parts: Any) -> str:
    """16 digits that tell models apart without reading all of their weights: of each part's config
    and of SAMPLED values of each of its weights.

    It costs milliseconds where `fingerprint` hashes gigabytes. Weights in another type count as
    others where they were rounded.
    """
    sha = hashlib.sha256()
    for part in parts:
        config = getattr(part, "config", None)
        described = config.model_dump() if config is not None else type(part).__name__
        sha.update(json.dumps(described, sort_keys=True).encode())
        weights = part.state_dict() if isinstance(part, nn.Module) else {}
        for name, weight in sorted(weights.items()):
            flat = weight.detach().reshape(-1)
            values = flat[:: max(1, len(flat) // SAMPLED)]
            sha.update(f"{name} {list(weight.shape)}".encode())
            sha.update(values.float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]

"""Writes safetensors files tensor by tensor: one of them is in memory at a time.

The format: the header's length as a 64-bit number, a JSON header that says where each tensor lies,
padded to 8 bytes, then the tensors' numbers without gaps. Given the same tensors, the file is the
one that the package `safetensors` writes, to the byte; that one needs all of them at once.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 8  # bytes that the header's length is a multiple of
PART = 2**24  # bytes that are written at once
# The format's names, in the order in which it puts tensors of the types: wide types first, so that
# each tensor lies on a multiple of its numbers' size.
DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES)}


def byte_count(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors' numbers; they may lie on the meta device."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def write_safetensors(
    path: Path,
    expected: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    on_bytes: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes a file; the caller renames it (`storage.replacing`).

    Args:
        path: of the file.
        expected: shapes and types of all tensors, by name; they may lie on the meta device.
        read: the tensor of a name, on any device, in any layout. Each is asked for once, and let go
            of once it is written.
        on_bytes: called with the number of bytes that were just written.

    Raises:
        ValueError: a tensor is of a type that the format does not have, or not as expected.
        OSError: the disk is full or cannot be written.
    """
    order = sorted(expected, key=lambda name: (_rank(name, expected[name].dtype), name))
    header = _header({name: expected[name] for name in order})
    with open(path, "wb") as file:
        file.write(header)
        for name in order:
            tensor = read(name)
            _check(name, tensor, expected[name])
            numbers = _bytes_of(tensor)
            for first in range(0, len(numbers), PART):
                part = numbers[first : first + PART]
                file.write(part)
                on_bytes(len(part))
            del tensor, numbers  # before the next one is read


def check_space(folder: Path, count: int) -> None:
    """Raises ValueError where a disk has less room than so many bytes, as far as it says."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if count > free:
        raise ValueError(
            f"{folder}: expected {count:,} bytes free, got {free:,}; free {count - free:,} more, "
            "or name a folder on another disk"
        )


def _rank(name: str, dtype: torch.dtype) -> int:
    if dtype not in _RANKS:
        raise ValueError(f"weight {name!r}: safetensors holds no numbers of type {dtype}")
    return _RANKS[dtype]


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """The file's beginning, up to the first tensor's numbers."""
    entries: dict[str, Any] = {}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.itemsize
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _check(name: str, tensor: Tensor, expected: Tensor) -> None:
    found, wanted = ((list(t.shape), t.dtype) for t in (tensor, expected))
    if found != wanted:
        raise ValueError(
            f"weight {name!r}: expected shape {wanted[0]} of {wanted[1]}, got {found[0]} of "
            f"{found[1]}"
        )


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's numbers, row by row, in the order of bytes that the format has."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if len(flat) else memoryview(b"")  # type: ignore[arg-type]

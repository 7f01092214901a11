"""Reads the weights of flax's files: a tree of names in msgpack, whose leaves are arrays.

A reader of our own, because a general one would unpack the whole file into memory first, and build
whatever a file claims to hold. Here the file is mapped. One pass over it finds where the arrays
lie, and checks each length against the bytes that are left; numbers are read when a weight is asked
for. Of msgpack's types only those are known that flax's `to_bytes` writes for weights: maps with
names, arrays (an extension, see `_Reader.array`), and of arrays above a gigabyte their chunks.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle1.common.files import expand_home
from dvae.weights import NOT_FETCHED, POINTER

MAX_DEPTH = 16  # of names within names; the published have 7
MAX_VALUES = 2**17  # of all kinds; an array takes a dozen
MAX_NAME = 256  # bytes
MAX_DIMENSIONS = 8
ARRAY, SCALAR = 1, 3  # extensions of flax: an array, and a number that numpy knows the type of
CHUNKED = "__msgpack_chunked_array__"  # a map that stands for one array has this key
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def read_msgpack(path: str | Path) -> dict[str, FlaxArray]:
    """The weights of a flax file by their names, joined by dots, such as `encoder.conv_in.kernel`.

    Each is read from the file when it is called, into memory of its own, in the file's type.

    Raises ValueError where the file is missing, cut short, or holds anything but named arrays.
    """
    path = Path(expand_home(path))
    try:
        with open(path, "rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise ValueError(f"{path}: expected msgpack, got {NOT_FETCHED}")
            file.seek(0, 2)
            if not file.tell():
                raise ValueError(f"{path}: expected msgpack of flax, got an empty file")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    reader = _Reader(content)
    try:
        root = reader.value("", 0)
        if reader.position < len(content):
            raise _Unreadable(f"{len(content) - reader.position:,} bytes follow the end")
        if not isinstance(root, dict):
            raise _Unreadable("it begins with no map of names")
        weights: dict[str, FlaxArray] = {}
        _flatten(root, "", weights, content)
    except _Unreadable as error:
        raise ValueError(f"{path}: no readable msgpack of flax: {error}") from error
    if not weights:
        raise ValueError(f"{path}: holds no arrays")
    return weights


class _Unreadable(Exception):
    """What is wrong with a file."""


@dataclass(frozen=True)
class _Array:
    """Where an array's numbers lie."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class FlaxArray:
    """An array of a file, which is read when it is called: a `LazyWeight`."""

    def __init__(
        self, content: mmap.mmap, shape: tuple[int, ...], parts: tuple[_Array, ...]
    ) -> None:
        """parts: one or, side by side, several."""
        self.shape, self.dtype = shape, parts[0].dtype
        self._content, self._parts = content, parts

    def __call__(self) -> Tensor:
        return self._numbers(0, self.shape)

    def row(self, i: int) -> Tensor:
        """The i-th of those that the first dimension counts, without the others."""
        shape = self.shape[1:]
        return self._numbers(i * math.prod(shape), shape)

    def _numbers(self, first: int, shape: tuple[int, ...]) -> Tensor:
        """So many numbers as the shape says, from the first on."""
        result = torch.empty(shape, dtype=self.dtype)
        # As bytes: in the file, numbers begin anywhere.
        flat, begin = result.view(-1).view(torch.uint8), first * self.dtype.itemsize
        done = 0
        for part in self._parts:
            count = min(part.size - begin, len(flat) - done)
            if count > 0:
                held = torch.frombuffer(
                    self._content, dtype=torch.uint8, count=count, offset=part.offset + begin
                )
                flat[done : done + count] = held
                done += count
            begin = max(0, begin - part.size)
        return result


def _flatten(
    tree: Mapping[str, Any], prefix: str, weights: dict[str, FlaxArray], content: mmap.mmap
) -> None:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and CHUNKED in value:
            shape, parts = _chunks(value, name)
            _check_empty(shape, name, len(content))
            weights[name] = FlaxArray(content, shape, parts)
        elif isinstance(value, dict):
            _flatten(value, f"{name}.", weights, content)
        elif isinstance(value, _Array):
            _check_empty(value.shape, name, len(content))
            weights[name] = FlaxArray(content, value.shape, (value,))
        else:
            raise _Unreadable(f"{name!r}: expected an array, got {value!r}")


def _check_empty(shape: tuple[int, ...], name: str, most: int) -> None:
    """Raises _Unreadable for sizes beside a 0 that have no more bounds, at which torch fails."""
    if 0 in shape and math.prod(n or 1 for n in shape) > most:
        raise _Unreadable(f"{name!r}: no numbers for a shape of {list(shape)}")


def _chunks(value: Mapping[str, Any], name: str) -> tuple[tuple[int, ...], tuple[_Array, ...]]:
    """Shape and parts of an array that was written in chunks, which are flat."""
    if value.keys() != {CHUNKED, "shape", "chunks"}:
        raise _Unreadable(f"{name!r}: expected a shape and chunks, got {sorted(value)}")
    shape = _in_order(value["shape"], f"{name}.shape")
    parts = _in_order(value["chunks"], f"{name}.chunks")
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in shape):
        raise _Unreadable(f"{name!r}: expected sizes, got {shape}")
    if len(shape) > MAX_DIMENSIONS:
        raise _Unreadable(f"{name!r}: an array of {len(shape)} dimensions")
    if not parts or not all(isinstance(part, _Array) for part in parts):
        raise _Unreadable(f"{name!r}: expected arrays as chunks")
    if len({part.dtype for part in parts}) > 1:
        raise _Unreadable(f"{name!r}: chunks of several types")
    count = sum(math.prod(part.shape) for part in parts)
    if min(shape, default=1) < 0 or math.prod(shape) != count:
        raise _Unreadable(f"{name!r}: {count:,} numbers in chunks for a shape of {list(shape)}")
    return shape, parts


def _in_order(value: Any, name: str) -> tuple[Any, ...]:
    """The values of a map with the keys "0", "1", ..., which stands for a tuple."""
    keys = [str(i) for i in range(len(value))] if isinstance(value, dict) else None
    if keys is None or set(keys) != set(value):
        raise _Unreadable(f"{name!r}: expected keys 0, 1, ...")
    return tuple(value[key] for key in keys)


class _Reader:
    """Goes through the bytes once, from value to value; arrays are skipped."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.position, self.values = content, 0, 0

    def number(self, kind: str, name: str) -> int:
        """The next number, big-endian, of a letter of `struct`."""
        size = struct.calcsize(kind)
        start = self.skip(size, name)
        found: int = struct.unpack_from(f">{kind}", self.content, start)[0]
        return found

    def skip(self, size: int, name: str) -> int:
        """Where the next so many bytes begin; they must be there."""
        start, left = self.position, len(self.content) - self.position
        if size > left:
            raise _Unreadable(
                f"{name!r}: {size:,} bytes are to follow byte {start:,}, and {left:,} do; it is "
                "cut short, or claims what it does not hold"
            )
        self.position += size
        return start

    def value(self, name: str, depth: int) -> Any:
        """A map, an array, or a number, truth value or text, as maps of chunks hold them."""
        self.values += 1
        if self.values > MAX_VALUES:
            raise _Unreadable(f"more than {MAX_VALUES:,} values")
        code = self.number("B", name)
        if code <= 0x7F or code >= 0xE0:  # small numbers, those below zero at the end
            return code if code <= 0x7F else code - 0x100
        if 0x80 <= code <= 0x8F:
            return self.map(code & 0x0F, name, depth)
        if code in (0xDE, 0xDF):
            return self.map(self.number("H" if code == 0xDE else "I", name), name, depth)
        if code in (0xC2, 0xC3):
            return code == 0xC3
        if 0xCC <= code <= 0xD3:
            return self.number("BHIQbhiq"[code - 0xCC], name)
        if code in (0xC7, 0xC8, 0xC9):
            size = self.number("BHI"[code - 0xC7], name)
            return self.extension(size, name)
        if 0xD4 <= code <= 0xD8:
            return self.extension(1 << (code - 0xD4), name)
        raise _Unreadable(
            f"{name!r}: byte {self.position - 1:,} is {code:#04x}, of no type that flax writes for "
            "weights"
        )

    def map(self, count: int, name: str, depth: int) -> dict[str, Any]:
        if depth >= MAX_DEPTH:
            raise _Unreadable(f"{name!r}: more than {MAX_DEPTH} names within names")
        result: dict[str, Any] = {}
        for _ in range(count):
            key = self.text(name)
            inner = f"{name}.{key}" if name else key
            if key in result or "." in key or not key:
                raise _Unreadable(f"{inner!r}: a name that is there twice, is empty or has a dot")
            result[key] = self.value(inner, depth + 1)
        return result

    def text(self, name: str) -> str:
        """A text, or the bytes of one, as older files have them."""
        code = self.number("B", name)
        if 0xA0 <= code <= 0xBF:
            size = code & 0x1F
        elif code in (0xD9, 0xC4):
            size = self.number("B", name)
        else:
            raise _Unreadable(f"{name!r}: expected a name, got byte {code:#04x}")
        start = self.skip(min(size, MAX_NAME + 1), name)
        if size > MAX_NAME:
            raise _Unreadable(f"{name!r}: a name of {size:,} bytes")
        try:
            return self.content[start : start + size].decode()
        except UnicodeDecodeError as error:
            raise _Unreadable(f"{name!r}: a name that is no UTF-8") from error

    def extension(self, size: int, name: str) -> _Array:
        """An array: its shape, the name of its type, and its numbers, row by row, little-endian."""
        kind = self.number("b", name)
        if kind not in (ARRAY, SCALAR):
            raise _Unreadable(f"{name!r}: expected an array, got extension {kind}")
        end = self.skip(size, name) + size
        self.position = end - size
        if self.length("array", name) != 3:
            raise _Unreadable(f"{name!r}: expected shape, type and numbers")
        dimensions = self.length("array", name)
        if dimensions > MAX_DIMENSIONS:
            raise _Unreadable(f"{name!r}: an array of {dimensions} dimensions")
        shape = tuple(self.size(name) for _ in range(dimensions))
        type_name = self.text(name)
        dtype = DTYPES.get(type_name)
        if dtype is None:
            raise _Unreadable(f"{name!r}: numbers of type {type_name!r}")
        count = self.length("bytes", name)
        if count != math.prod(shape) * dtype.itemsize:
            raise _Unreadable(
                f"{name!r}: {count:,} bytes for a shape of {list(shape)} in {type_name}"
            )
        start = self.skip(count, name)
        if self.position != end:
            raise _Unreadable(f"{name!r}: {size:,} bytes, of which its numbers end elsewhere")
        return _Array(dtype, shape, start)

    def size(self, name: str) -> int:
        found = self.value(name, MAX_DEPTH)
        if not isinstance(found, int) or isinstance(found, bool) or found < 0:
            raise _Unreadable(f"{name!r}: a size of {found!r}")
        return found

    def length(self, what: str, name: str) -> int:
        """How long the array or the bytes are that follow."""
        code = self.number("B", name)
        if what == "array" and 0x90 <= code <= 0x9F:
            return code & 0x0F
        codes = {0xDC: "H", 0xDD: "I"} if what == "array" else {0xC4: "B", 0xC5: "H", 0xC6: "I"}
        if code not in codes:
            raise _Unreadable(f"{name!r}: expected {what}, got byte {code:#04x}")
        return self.number(codes[code], name)

"""Reads the tensors of published weights files without running anything that is in them.

A file of `torch.save` or TorchScript is a pickle, and a pickle is a program that calls whatever it
names. Here it may name tensors, plain containers and the module classes that the caller allows;
those become empty nodes that hold attributes. Any other name is an error before it is looked up.
Nothing is allocated because a file says so: every tensor lies within bytes that the file holds.
Those of the newer format are mapped: their numbers are read where and when they are used.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from dvae.calls import isolated
from dvae.storage import expand_home
from dvae.weights import COMMON, INDEX, NOT_FETCHED, POINTER, read_safetensors, weights_file

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first number of a file of torch.save before 1.6
LARGEST_PROGRAM = 64 * 2**20  # bytes of a pickle without its tensors; the published have 100 kB
# Where training scripts, Lightning and DeepSpeed keep the state dictionary in their checkpoints.
STATES = ("state_dict", "model_state_dict", "model", "module")
PART = 2**20  # bytes that are read at once
# Of a zip's header in front of each member: its length without names, where their lengths stand.
LOCAL_HEADER, LOCAL_LENGTHS = 30, 26

# Whose objects lie beside the weights in checkpoints of training: arguments, schedules, callbacks.
PACKAGES = {
    "__main__",
    "_codecs",
    "argparse",
    "collections",
    "copy_reg",
    "copyreg",
    "datetime",
    "enum",
    "ldm",
    "lightning",
    "lightning_fabric",
    "main",  # the script of taming-transformers and latent diffusion
    "numpy",
    "omegaconf",
    "pathlib",
    "pytorch_lightning",
    "taming",
    "torch",
    "typing",
}
BUILTINS = {"bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object"}
BUILTINS |= {"range", "slice", "str", "tuple", "long", "unicode", "xrange"}  # three of Python 2

_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


# Whether a class or function of this module and this name may be named.
Names = Callable[[str, str], bool]


def _none(module: str, name: str) -> bool:
    return False


def is_beside_weights(module: str, name: str) -> bool:
    """Whether a class or function is one that checkpoints of training name for other objects than
    weights; for `ignores` of `read_tensors`."""
    if module in ("builtins", "__builtin__"):
        return name in BUILTINS
    return module.split(".")[0] in PACKAGES


class Node:
    """Stands for a module of the file: its attributes and its class' name, no behavior."""

    name = ""

    def __new__(cls, *_: Any) -> Node:
        return super().__new__(cls)


class Ignored:
    """Stands for an object beside the weights: takes whatever a pickle gives it, keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Ignored:
        return super().__new__(cls)

    def append(self, value: Any) -> None:
        """As a list's."""

    def extend(self, values: Any) -> None:
        """As a list's."""

    def add(self, value: Any) -> None:
        """As a set's."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """As a dictionary's."""


@isolated()
def read_tensors(
    path: str | Path, allows: Names = _none, ignores: Names = _none
) -> tuple[dict[str, Tensor], str]:
    """The state dictionary of a weights file, and the full name of its root class.

    The file is safetensors, an index of shards in safetensors, or torch.save's (either format) or
    TorchScript's: a state dictionary, alone or under a key of `STATES`, or a module tree of which
    allows(module, name) accepts every class. The class' name is "" where there is none. A
    folder stands for its `model.safetensors`, or the index of its shards.

    Checkpoints of training frameworks hold objects beside the weights. Those of classes that
    ignores(module, name) accepts are passed by: no such class is looked up, nothing is kept.

    Raises:
        ValueError: the file is missing, cut short, or names anything that is not allowed.
    """
    path = Path(expand_home(path))
    if path.is_dir():
        path = weights_file(path / COMMON)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            if start == POINTER:
                raise pickle.UnpicklingError(NOT_FETCHED)
            file.seek(0)
            # Of safetensors, the length of the header stands in front.
            header = struct.unpack("<Q", start)[0] if len(start) == 8 else math.inf
            safe = path.name.endswith(INDEX) or header < os.path.getsize(path)
            if safe:
                root = {}
            elif start[:2] == b"PK":
                root = _read_zip(path, allows, ignores)
            else:
                root = _read_legacy(file, allows, ignores)
        if isinstance(root, dict):
            held = (root.get(name) for name in STATES)
            root = next((state for state in held if isinstance(state, dict)), root)
        tensors: dict[str, Tensor] = {}
        _flatten(root, "", tensors, set())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path}: no readable weights file: {error}") from error
    # What a pickle's opcodes raise when they meet arguments that do not fit.
    except (
        *(ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError),
        *(TypeError, ValueError, struct.error),
    ) as error:
        raise ValueError(f"{path}: no readable weights file: {error!r}") from error
    if safe:
        tensors = read_safetensors(path)
    if not tensors:
        raise ValueError(
            f"{path}: holds no tensors; save a state dictionary, as torch.save(model.state_dict(), "
            "...) does"
        )
    return tensors, root.name if isinstance(root, Node) else ""


def _flatten(value: Any, prefix: str, tensors: dict[str, Tensor], seen: set[int]) -> None:
    """Adds the tensors of a state dictionary or of a tree of nodes, each node once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Node):
        value = vars(value)
        if "_modules" in value:  # an eager module keeps its parts in three dictionaries
            parts = (value.get(name) or {} for name in ("_parameters", "_buffers", "_modules"))
            value = {key: part for held in parts for key, part in held.items()}
    if isinstance(value, dict):
        for key, part in value.items():
            name = f"{prefix}.{key}" if prefix else str(key)
            if isinstance(part, Tensor):
                tensors[name] = part
            elif isinstance(part, Node):
                _flatten(part, name, tensors, seen)


class _Unpickler(pickle._Unpickler):
    """A pickle machine whose every name is on the list, and which sets attributes of nodes alone.

    The pure Python machine: its parts can be replaced, and its memo is a dictionary, where the
    other's is an array as long as the file cares to claim.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = {
        code: act
        for code, act in pickle._Unpickler.dispatch.items()
        # Buffers of a claimed length, and names by number: weights have no use for either.
        if bytes([code])
        not in (
            pickle.BYTEARRAY8,
            pickle.NEXT_BUFFER,
            pickle.READONLY_BUFFER,
            pickle.EXT1,
            pickle.EXT2,
            pickle.EXT4,
        )
    }

    def __init__(
        self,
        file: IO[bytes],
        allows: Names,
        ignores: Names,
        storage: Callable[[torch.dtype, str, int], Tensor],
    ) -> None:
        super().__init__(file)
        self.allows, self.ignores, self.storage = allows, ignores, storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return _NAMES[module, name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if self.allows(module, name):
            return type("Node", (Node,), {"name": f"{module}.{name}"})
        if self.ignores(module, name):
            return Ignored
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which weights have no use for; save the state dictionary "
            "alone, as torch.save(model.state_dict(), ...) does"
        )

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Node):
            vars(target).update({str(key): value for key, value in dict(state).items()})
        # Nobody needs the attributes (versions) of an OrderedDict.
        elif not isinstance(target, OrderedDict | Ignored):
            raise pickle.UnpicklingError(f"it sets the state of a {type(target).__name__}")

    dispatch[pickle.BUILD[0]] = load_build

    def persistent_load(self, pid: Any) -> Any:
        kind = pid[0]
        if kind == "module":  # the old format adds a class' source text, which nobody reads here
            return pid[1]
        view = pid[5] if len(pid) > 5 else None  # a part of another storage, before 0.4
        if kind != "storage" or not isinstance(pid[1], torch.dtype) or view is not None:
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        return self.storage(pid[1], str(pid[2]), int(pid[4]))


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    if min((offset, *size, *stride)) < 0 or len(size) != len(stride):
        raise pickle.UnpicklingError(f"a tensor of size {size} and stride {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # A stride of 0 repeats numbers without end.
    if 0 not in size and max(last + 1, math.prod(size)) > storage.numel():
        raise pickle.UnpicklingError(f"a tensor of size {size} reaches beyond its storage")
    return torch.as_strided(storage, size, stride, offset)


def _first(value: Any, *_: Any) -> Any:
    return value


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch", "Size"): tuple,
    ("torch", "device"): _first,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    **{
        ("torch.jit._pickle", name): _first
        for name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
    },
    ("torch.jit._pickle", "restore_type_tag"): _first,
}


def programs(archive: zipfile.ZipFile) -> list[str]:
    """Names of the pickles in a zip: one in a file of torch.save or TorchScript, none elsewhere."""
    return [n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]


def _read_zip(path: Path, allows: Names, ignores: Names) -> Any:
    with zipfile.ZipFile(path) as archive:
        pickles = programs(archive)
        if len(pickles) != 1:
            raise zipfile.BadZipFile(f"{len(pickles)} members called data.pkl in place of one")
        folder = pickles[0].removesuffix("data.pkl")
        for name in (pickles[0], f"{folder}byteorder"):
            if name in archive.namelist():
                member = archive.getinfo(name)
                if member.compress_type != zipfile.ZIP_STORED or member.file_size > LARGEST_PROGRAM:
                    raise zipfile.BadZipFile(f"{name} is compressed or far too long")
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise zipfile.BadZipFile("written on a big-endian machine")
        held: dict[str, Tensor] = {}
        left = os.path.getsize(path)
        mapped = _mapped(path)

        def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
            nonlocal left
            if key not in held:
                member = archive.getinfo(f"{folder}data/{key}")
                size = count * dtype.itemsize
                left -= size
                if member.compress_type != zipfile.ZIP_STORED or member.file_size != size:
                    raise zipfile.BadZipFile(f"{member.filename} does not hold {size} bytes")
                if left < 0:
                    raise zipfile.BadZipFile("its members are longer than the file")
                with archive.open(member) as numbers:
                    while numbers.read(PART):  # compares the checksum at the end
                        pass
                start = _start_of(mapped, member)
                if not count or start % dtype.itemsize:  # as nothing of torch's own
                    held[key] = torch.empty(count, dtype=dtype)
                    with archive.open(member) as numbers:
                        _read_into(held[key], numbers)
                else:
                    held[key] = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start)
            return held[key]

        with archive.open(pickles[0]) as file:
            return _Unpickler(file, allows, ignores, storage).load()


def _mapped(path: Path) -> mmap.mmap:
    """A file's bytes, read when they are used; what is written to them stays in memory."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _start_of(mapped: mmap.mmap, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member that is not compressed begin, behind a header of its own."""
    name, extra = struct.unpack_from("<HH", mapped, member.header_offset + LOCAL_LENGTHS)
    start: int = member.header_offset + LOCAL_HEADER + name + extra
    return start


def _read_legacy(file: IO[bytes], allows: Names, ignores: Names) -> Any:
    limit = os.fstat(file.fileno()).st_size
    held: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        if not 0 <= count * dtype.itemsize <= limit:
            raise pickle.UnpicklingError(f"a storage of {count} numbers in a file of {limit} bytes")
        if key not in held:
            held[key] = torch.empty(count, dtype=dtype)
        return held[key]

    def load() -> Any:
        return _Unpickler(file, allows, ignores, storage).load()

    if load() != LEGACY_MAGIC:
        raise pickle.UnpicklingError("not a file of torch.save")
    load()  # the protocol's version
    if load().get("little_endian") is not True:
        raise pickle.UnpicklingError("written on a big-endian machine")
    root, keys = load(), load()
    if {str(key) for key in keys} != held.keys():
        raise pickle.UnpicklingError("the storages named and those in the file differ")
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        if count != held[str(key)].numel():
            raise EOFError(f"storage {key} is cut short")
        _read_into(held[str(key)], file)
    return root


def _read_into(target: Tensor, file: IO[bytes]) -> None:
    """Fills a storage's numbers, [count], from a file; there is no second copy of them."""
    content: Any = memoryview(target.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while len(content):
        part = file.read(min(len(content), PART))
        if not part:
            raise EOFError("a storage is cut short")
        content[: len(part)] = part
        content = content[len(part) :]

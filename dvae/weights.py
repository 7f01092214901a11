"""Weights files in safetensors, alone or in shards of an index, and the names in them.

Tensors are mapped: their numbers are read from the file where and when they are used, and what is
written to them stays in memory. A file that takes the place of another by a rename, as all of ours
do, does not change the tensors of the other.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dvae.calls import isolated

INDEX = ".index.json"  # behind the name of the file that was divided
COMMON = "model.safetensors"  # what Hugging Face's libraries call the weights of a folder
LARGEST_HEADER = 16 * 2**20  # bytes; the paper's 12 billion weights need 100 kB
LARGEST_INDEX = 64 * 2**20
POINTER = b"version "  # how a file of Git LFS begins that stands for another
NOT_FETCHED = "a pointer of Git LFS; fetch the file itself with `git lfs pull`"
OTHERS = {  # as a length of a header, each would be longer than any may be
    POINTER: NOT_FETCHED,
    b"PK\x03\x04": "a file of torch.save; write its tensors with safetensors.torch.save_file",
}
# Modules that others put around a model or a part of it before they save: torch.compile,
# data-parallel training, sharding, checkpointed activations.
WRAPPERS = {
    "_orig_mod",
    "module",
    "_fsdp_wrapped_module",
    "_fpw_module",  # of older releases, behind the former
    "_checkpoint_wrapped_module",
    "_forward_module",  # Lightning's
}
COUNTER = "n_averaged"  # which torch's AveragedModel saves beside `module.`


def weights_file(path: Path) -> Path:
    """The file of a folder that holds what `path` is to hold: itself, or the index of its shards.

    It is `path` too where there is none.
    """
    files = (path.with_name(name) for name in weights_names(path.name))
    return next((file for file in files if file.is_file()), path)


def weights_names(name: str) -> tuple[str, str, str]:
    """Names of the files of a folder that may hold what `name` is to hold, the first first: itself,
    and two of an index of shards."""
    return name, name + INDEX, COMMON + INDEX


@isolated()
def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of all shards of an index, mapped.

    Raises ValueError when a file is missing, cut short or no safetensors, or when an index names
    anything but files in its folder, or a weight that its shards do not hold once.
    """
    return _read_index(path) if path.name.endswith(".json") else _read_file(path)


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: missing, or no file")
    try:
        with open(path, "rb") as file:
            start = file.read(8)
        other = next((what for begin, what in OTHERS.items() if start.startswith(begin)), None)
        if other is not None:
            raise ValueError(f"{path}: expected safetensors, got {other}")
        if len(start) == 8 and struct.unpack("<Q", start)[0] > LARGEST_HEADER:
            raise ValueError(f"{path}: truncated or no safetensors: its header would be too long")
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: truncated or no safetensors: {error}") from error
    return tensors


def _read_index(path: Path) -> dict[str, Tensor]:
    held: dict[str, tuple[str, Tensor]] = {}
    files = weight_map(path)
    shards = {name: _shard(path, name) for name in files.values()}
    for name, shard in shards.items():
        for key, tensor in _read_file(shard).items():
            if key in held:
                raise ValueError(
                    f"{path}: weight {key!r}: expected in one shard, got {held[key][0]!r} and "
                    f"{name!r}"
                )
            held[key] = name, tensor
    for key, name in files.items():
        if key not in held or held[key][0] != name:
            raise ValueError(f"{path}: weight {key!r}: {name!r} does not hold it")
    return {key: tensor for key, (_, tensor) in held.items()}


def weight_map(path: Path) -> dict[str, str]:
    """The names of shards, in the folder of their index, by weight; ValueError for anything else in
    the index."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} is there twice")
        return result

    try:
        if path.stat().st_size > LARGEST_INDEX:
            raise ValueError("it is far too long")
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no index of shards: {error}") from error
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path}: weight_map: expected the names of files by weight")
    for name in files.values():
        if not isinstance(name, str) or not name.isprintable() or set(name) & {"/", "\\"}:
            raise ValueError(
                f"{path}: weight_map: expected names of files in the same folder, got {name!r}"
            )
    return files


def _shard(index: Path, name: str) -> Path:
    """The path of a shard; ValueError where it is missing or a link out of the index's folder."""
    path = index.parent / name
    if not path.is_file():
        raise ValueError(f"{index}: the shard {name!r} is missing")
    # In a cache of Hugging Face's, index and shards are links into one folder.
    if path.resolve().parent not in (index.parent.resolve(), index.resolve().parent):
        raise ValueError(
            f"{index}: weight_map: expected files in the same folder, got {name!r}, a link to "
            f"{str(path.resolve())!r}"
        )
    return path


def unwrapped(
    weights: Mapping[str, Tensor], path: str | Path, expected: Collection[str] = ()
) -> dict[str, Tensor]:
    """Weights under the names of the model itself, without those of modules that were around it or
    around parts of it, such as `module.` or `layers._orig_mod.`.

    expected: the model's names, where they are known. One that has such a part itself keeps it.

    Raises ValueError when two weights would have the same name.
    """
    own = {_bare(name): name for name in expected}
    result: dict[str, Tensor] = {}
    former: dict[str, str] = {}
    for key, weight in weights.items():
        if _bare(key) == COUNTER and COUNTER not in own:
            continue
        if expected:
            # Several names of the model that are alike but for these parts cannot be told apart.
            known = key in expected or len(own) < len(expected)
            name = key if known else own.get(_bare(key), key)
        else:
            name = _bare(key)
        if name in result:
            raise ValueError(f"{path}: {former[name]!r} and {key!r} are the same weight twice")
        result[name], former[name] = weight, key
    return result


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def check_fits(
    expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: str | Path, what: str
) -> None:
    """Raises ValueError that names the first weight missing, not known, or of another shape or
    sort of number.

    The expected ones may lie on the meta device, so that nothing is allocated before.
    """
    for key in sorted(expected.keys() ^ weights.keys()):
        state = "has no" if key in expected else "has an unexpected"
        raise ValueError(f"{path}: {state} weight {key!r} of {what}")
    for key, weight in weights.items():
        if weight.shape != expected[key].shape:
            raise ValueError(
                f"{path}: weight {key!r} has shape {list(weight.shape)}, expected "
                f"{list(expected[key].shape)}"
            )
        if _sort(weight.dtype) != _sort(expected[key].dtype):
            raise ValueError(
                f"{path}: weight {key!r} has type {weight.dtype}, expected {expected[key].dtype}"
            )


def _sort(dtype: torch.dtype) -> str:
    if dtype.is_floating_point or dtype.is_complex:
        return "complex" if dtype.is_complex else "floating point"
    return "bool" if dtype == torch.bool else "integer"


def narrow_type(weights: Mapping[str, Tensor]) -> torch.dtype | None:
    """The type of 16 bits that all floating-point weights are in, if they are."""
    types = {weight.dtype for weight in weights.values() if weight.is_floating_point()}
    return types.pop() if types in ({torch.float16}, {torch.bfloat16}) else None


def in_types_of(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the types that a model with the expected ones holds them in.

    Where all are in one type of 16 bits, they stay in it. Any other type becomes the model's own:
    a model of several types, or of 64 or 8 bits, could not compute.
    """
    narrow = narrow_type(weights)
    return {
        name: weight
        if name not in expected or weight.dtype == narrow
        else weight.to(expected[name].dtype)
        for name, weight in weights.items()
    }

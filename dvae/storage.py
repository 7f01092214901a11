"""Parts of a model as a folder: a section of `config.json` and a safetensors file each.

    config.json        {"format": 2, "codec": {"kind": "dvae", ...}, ...}
    dvae.safetensors

A part is a codec, a prior or a ranker. What kinds there are is said in tables (`dvae.codec`,
`dalle1.registry`); here is only how one is written and read. Nothing in a folder is a pickle, and
every file is written under a temporary name and then renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from dvae.calls import isolated
from dvae.loading import fill, fit
from dvae.safetensors_writer import write_safetensors
from dvae.weights import read_safetensors, weights_file

CONFIG = "config.json"
FORMAT = 2
LISTED, SHOWN = 5, 100  # mistakes of a section in a message, letters of each value
# Sections of format 1, which had one kind of each part, and what they are called now.
_FORMAT_1 = {
    "dvae": ("codec", "dvae"),
    "transformer": ("prior", "sparse_transformer"),
    "clip": ("ranker", "clip"),
}


@dataclass(frozen=True)
class Kind:
    """A kind of part: how its section of `config.json` is read and its weights are found.

    Attributes:
        role: "codec", "prior" or "ranker", the section's name.
        name: the section's "kind".
        config: class of the other settings in the section; the part holds one as `config`.
        module: makes a part of such a config.
        weights: name of the safetensors file; None for a part without weights.
        assets: names of other files; the part has methods `save_assets(folder)` and
            `load_assets(folder)` for them.
    """

    role: str
    name: str
    config: type[BaseModel]
    module: type
    weights: str | None
    assets: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files besides `config.json`."""
        return self.assets if self.weights is None else (self.weights, *self.assets)


def expand_home(path: str | os.PathLike[str]) -> str:
    """A path or an address as it was typed, with the home folder for a `~` or `~user` in front.

    A shell leaves the `~` of `run=~/out` alone. A name that the locale cannot spell is its bytes in
    UTF-8.
    """
    expanded = os.path.expanduser(path)
    try:
        os.fsencode(expanded)
    except UnicodeEncodeError:
        with suppress(UnicodeEncodeError):
            return os.fsdecode(expanded.encode("utf-8", "surrogateescape"))
    return expanded


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk.

    A rename may get there before the content of the file, and both before the folder's list.
    """
    if path.is_dir():
        with suppress(OSError):  # some systems, and network file systems, do not let folders wait
            folder = os.open(path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    else:
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, where they are missing, to stay after a crash."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends, on the disk too;
    after an error it is removed and `path` is as before."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_part(kind: Kind, part: Any, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes a part's weights and other files, then its section; other sections stay.

    dtype: of the weights in the file, such as torch.float16, which halves it; None: as they are.
    Raises OSError where the folder cannot be written, ValueError where a weight is too large.
    """
    folder = Path(expand_home(folder))
    make_folder(folder)
    if kind.weights is not None:
        save_weights(part, folder / kind.weights, dtype)
    if kind.assets:
        part.save_assets(folder)
    write_section(folder, kind.role, {"kind": kind.name, **part.config.model_dump()})


@isolated()
def load_part(role: str, kinds: Mapping[str, Kind], folder: str | Path) -> Any:
    """The part of a folder that `save_part` wrote, in eval mode, on the CPU.

    Its weights are mapped from the file and not copied: they are in memory once, when they are
    used. Weights that are all in one type of 16 bits stay in it. A file may also be one of others:
    names of modules around the model, as of torch.compile, are taken out of its weights' names, and
    in its place may be `WEIGHTS.index.json`, or `model.safetensors.index.json`, and shards.

    Raises ValueError that names the file when one is missing, truncated or does not fit, or when
    the folder holds no such part or one of a kind that is not known.
    """
    folder = Path(expand_home(folder))
    section = dict(read_config(folder).get(role) or {})
    if not section:
        raise ValueError(f"{folder / CONFIG}: has no {role!r} section")
    name = section.pop("kind", None)
    if name not in kinds:
        raise ValueError(
            f"{folder / CONFIG}: {role}.kind: expected one of {', '.join(kinds)}, got {name!r}; "
            "import the package that registers it, or take a newer release"
        )
    kind = kinds[name]
    config = read_shape(kind, section, folder)
    if kind.weights is None:
        part = kind.module(config)
    else:
        path = weights_file(folder / kind.weights)
        what = f"a {role} of kind {name!r}"
        part = fill(lambda: kind.module(config), _read(path), path, what)
    if kind.assets:
        part.load_assets(folder)
    return part.eval() if isinstance(part, nn.Module) else part


def read_shape(kind: Kind, section: Mapping[str, Any], folder: str | Path) -> Any:
    """A part's config, of its section without "kind"; ValueError that names what is wrong in it."""
    try:
        return kind.config(**section)
    except ValidationError as error:
        mistakes = [_mistake(kind.role, mistake) for mistake in error.errors()[:LISTED]]
        rest = error.error_count() - LISTED
        mistakes += [f"and {rest} more"] if rest > 0 else []
        raise ValueError(
            f"{Path(folder) / CONFIG}: {'; '.join(mistakes)}; take the file that was saved with "
            "the weights, or a newer release"
        ) from error


def _mistake(role: str, mistake: Any) -> str:
    """One of pydantic's errors in one line."""
    name = ".".join(str(part) for part in (role, *mistake["loc"]))
    text = f"{name}: {_cut(mistake['msg'].removeprefix('Value error, '))}"
    if mistake["type"] == "missing" or not mistake["loc"]:
        return text
    return f"{text}, got {_cut(repr(mistake['input']))}"


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + " ..."


def has_part(role: str, folder: str | Path) -> bool:
    """Whether a folder's `config.json` has a section for the part."""
    return bool(read_config(folder).get(role))


def read_config(folder: str | Path) -> dict[str, Any]:
    """The folder's `config.json` as format 2 has it, whichever it is written in.

    Raises ValueError when it is missing, no JSON object, or of a newer format.
    """
    path = Path(expand_home(folder)) / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: {CONFIG} is missing; is this a model folder?")
    try:
        # Without the mark (U+FEFF) that some editors put in front.
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: truncated or not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object with a section for each part")
    found = config.get("format", 1)
    if found not in (1, FORMAT):
        raise ValueError(
            f"{path}: format: expected {FORMAT} at most, got {_cut(repr(found))}; update dalle1"
        )
    for role, section in config.items():
        if role != "format" and not isinstance(section, dict):
            raise ValueError(
                f"{path}, section {role!r}: expected an object, got {_cut(repr(section))}"
            )
        if role != "format" and not isinstance(section.get("kind", ""), str):
            raise ValueError(
                f"{path}: {role}.kind: expected a name, got {_cut(repr(section['kind']))}"
            )
    return config if found == FORMAT else _upgraded(config)


def _upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` of format 1 as format 2."""
    result: dict[str, Any] = {"format": FORMAT}
    if "transformer" in config:  # a full model, whose tokenizer was always of this kind
        result["tokenizer"] = {"kind": "bpe"}
    for name, section in config.items():
        if name in _FORMAT_1:
            role, kind = _FORMAT_1[name]
            result[role] = {"kind": kind, **section}
        elif name != "format":  # of no part, such as the origins
            result[name] = section
    return result


def write_section(folder: Path, role: str, section: Mapping[str, Any] | None) -> None:
    """Puts a section into the folder's `config.json`, or takes it out where it is None."""
    path = folder / CONFIG
    config: dict[str, Any] = read_config(folder) if path.exists() else {"format": FORMAT}
    config[role] = section
    content = {name: value for name, value in config.items() if value is not None}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_weights(module: nn.Module, path: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a module's weights as safetensors; copies one at a time, where they need copies.

    dtype: of what is not whole numbers, in the file; None: as it is held. Raises ValueError that
    names a weight that is too large for it.
    """
    weights = module.state_dict()

    def stored(name: str) -> torch.dtype:
        held = weights[name].dtype
        return dtype if dtype is not None and held.is_floating_point else held

    def read(name: str) -> Tensor:
        weight: Tensor = weights[name].to(stored(name))
        if weight.dtype != weights[name].dtype and not bool(weight.isfinite().all()):
            raise ValueError(
                f"{path.name}: expected weights that {dtype} holds, got a larger one in {name}; "
                "take torch.bfloat16, or leave dtype out"
            )
        return weight

    expected = {
        name: torch.empty(weight.shape, dtype=stored(name), device="meta")
        for name, weight in weights.items()
    }
    with replacing(path) as temporary:
        write_safetensors(temporary, expected, read)


def read_weights(kind: Kind, config: BaseModel, folder: str | Path) -> dict[str, Tensor]:
    """The weights of a part of a folder, mapped, by the names that a part of this config has.

    Raises ValueError that names the file when one is missing, truncated or does not fit.
    """
    path = weights_file(Path(folder) / str(kind.weights))
    what = f"a {kind.role} of kind {kind.name!r}"
    return fit(lambda: kind.module(config), _read(path), path, what)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: missing from the model folder")
    return read_safetensors(path)

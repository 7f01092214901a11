"""Other people's models, opened as ours or written as a folder of ours.

A folder is written tensor by tensor, after names, shapes and types of all weights were compared
with the modules that will hold them. Its `config.json` comes last: a folder without one is not
complete.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle1 import registry
from dalle1.common.files import (
    check_writable,
    expand_home,
    make_folder,
    replacing,
    saying_what_is_missing,
    write_text,
)
from dalle1.common.origins import CARD, Origin, origins_text, write_origins
from dalle1.common.progress import progress_bar
from dalle1.hub.access import HubAccess
from dalle1.model import Model
from dalle1.published.gathering import Gathered, check_complete, gather
from dalle1.published.parts import PublishedModel, PublishedPart
from dalle1.published.table import find_family
from dalle1.tokenizer import TOKENIZER
from dvae.calls import isolated
from dvae.loading import fill, fit
from dvae.safetensors_writer import byte_count, check_space, write_safetensors
from dvae.storage import CONFIG, write_section


@dataclass(frozen=True)
class Imported:
    """What `import_model` has written.

    Attributes:
        folder: of it.
        family: name of the family that the source is of.
        kinds: of each part by its role, the tokenizer's too.
        parameters: how many numbers the weights of each part are.
        bytes: of all weights.
        origins: of each part by its role.
    """

    folder: Path
    family: str
    kinds: dict[str, str]
    parameters: dict[str, int]
    bytes: int
    origins: dict[str, Origin]


def read(source: str | Path, kind: str | None = None) -> PublishedModel:
    """The parts of a file or folder of somebody else's, whose weights are not read yet.

    kind: the family's name; None where the files tell.

    Raises ValueError where the files are of no family, or something is missing or wrong in them.
    """
    path = Path(expand_home(source))
    return find_family(path, kind).read(path)


@isolated()
def load(
    source: str | Path,
    kind: str | None = None,
    codec: Any = None,
    tokenizer: Any = None,
    ranker: Any = None,
    download: bool = True,
) -> Any:
    """Opens somebody else's model as it is published, without writing a folder.

    Args:
        source, kind, download: see `import_model`.
        codec, tokenizer, ranker: as there, or a part that is open already.

    Returns:
        A `Model` where the files hold a prior; else the one part that they hold: a codec, a ranker
        or a tokenizer. In eval mode, on the CPU; a prior whose weights are in 16 bits stays so.

    Raises:
        ValueError: as `import_model`.
    """
    given = {"codec": codec, "tokenizer": tokenizer, "ranker": ranker}
    paths = {role: part for role, part in given.items() if isinstance(part, str | Path)}
    with ExitStack() as stack:
        found = gather(stack, source, kind, paths, None, _access(download))
        parts: dict[str, Any] = {role: _build(part) for role, part in found.parts.items()}
    parts["tokenizer"] = found.tokenizer
    parts |= {role: part for role, part in given.items() if part is not None and role not in paths}
    if "prior" in parts:
        check_complete(source, parts)
        model = _model(source, parts)
        model.origins = {
            r: o for r, o in found.origins.items() if given.get(r) is None or r in paths
        }
        return model
    held = [part for part in parts.values() if part is not None]
    if len(held) != 1:
        raise ValueError(
            f"{source}: expected a prior, or one part alone; got "
            f"{', '.join(role for role, part in parts.items() if part is not None)}"
        )
    return held[0]


@isolated()
def import_model(
    source: str | Path,
    out: str | Path,
    kind: str | None = None,
    codec: str | Path | None = None,
    tokenizer: str | Path | None = None,
    ranker: str | Path | None = None,
    dtype: torch.dtype | None = None,
    download: bool = True,
    progress: bool = True,
) -> Imported:
    """Writes a folder of ours from somebody else's files, tensor by tensor.

    Nothing in the files is executed, and nothing is written before names, shapes and types of all
    weights were compared with those of the parts that will hold them.

    Args:
        source: a file, a folder, an archive, or what else `sources.opened` takes.
        out: the folder to write, which must not hold a model.
        kind: the family's name; None where the files tell.
        codec, ranker: a folder of ours, or a source like `source`, for a part in place of the
            source's own.
        tokenizer: the same; or a tokenizer's file.
        dtype: of the weights of the prior, which there must be then. None: weights that are all in
            one type of 16 bits stay in it, all others get the type that the part computes in.
        download: whether what a Hub address names is fetched into the Hub's cache, by the package
            huggingface_hub; False, or HF_HUB_OFFLINE=1: it must be there.
        progress: whether a progress bar is shown.

    Returns:
        What was written: a full model where the source holds a prior, else the parts that it holds.

    Raises:
        ValueError: the files are of no family; something is missing, cut short or of another
            version; the parts do not fit each other; out holds a model; or its disk is too small.
        ConnectionError: the Hub cannot be reached, and its cache does not hold the source.
        OSError: the disk is full or fails.
    """
    out = Path(expand_home(out))
    check_writable(out, "OUT")
    if (out / CONFIG).exists():
        raise ValueError(f"OUT: {out} already holds a model; give another folder, or remove it")
    given = {"codec": codec, "tokenizer": tokenizer, "ranker": ranker}
    paths = {role: path for role, path in given.items() if path is not None}
    with ExitStack() as stack:
        found = gather(stack, source, kind, paths, _existing(out), _access(download))
        if dtype is not None and "prior" not in found.parts:
            raise ValueError(
                f"dtype: expected a prior, whose weights it is for, got none in {source}; leave it "
                "out"
            )
        writers = {
            role: _PartWriter(part, dtype if role == "prior" else None)
            for role, part in found.parts.items()
        }
        card = _card(source, found, writers)
        total = sum(writer.bytes for writer in writers.values())
        check_space(out, total)
        written: list[Path] = []
        try:
            make_folder(out)
            with (
                saying_what_is_missing(out, "the model", total),
                progress_bar(
                    total=total, unit="B", unit_scale=True, desc="importing", disable=not progress
                ) as bar,
            ):
                for writer in writers.values():
                    writer.write(out, written, bar.update)
                if found.tokenizer is not None:
                    written.append(out / TOKENIZER)
                    found.tokenizer.save(out / TOKENIZER)
                written.append(out / CARD)
                write_text(out / CARD, card)
                _write_config(found, out)
        except BaseException:
            for path in (out / CONFIG, *written):
                path.unlink(missing_ok=True)
            raise
    return Imported(
        folder=out,
        family=found.family,
        kinds=_kinds(found),
        parameters={role: writer.parameters for role, writer in writers.items()},
        bytes=total,
        origins=found.origins,
    )


class _PartWriter:
    """A part that is to be written, checked against the module that will hold it.

    Raises ValueError for a weight that is missing, not known, or of another shape.
    """

    def __init__(self, part: PublishedPart, dtype: torch.dtype | None) -> None:
        self.part = part
        with torch.device("meta"):
            self.frame = part.kind.module(part.config)
        what = f"a {part.kind.role} of kind {part.kind.name!r}"
        # Each is made once more when it is written: only its shape and type stay in memory here.
        shapes = {name: read().to("meta") for name, read in part.weights.items()}
        self.layout: dict[str, Tensor] = {}
        if part.kind.weights is not None:
            self.layout = fit(lambda: part.kind.module(part.config), shapes, part.path, what)
        if dtype is not None:
            self.layout = {
                name: shape.to(dtype) if shape.is_floating_point() else shape
                for name, shape in self.layout.items()
            }
        if part.tokenizer is not None:
            self.frame.tokenizer = part.tokenizer
        self.bytes = byte_count(self.layout)
        self.parameters = sum(shape.numel() for shape in self.layout.values())

    def write(self, out: Path, written: list[Path], on_bytes: Callable[[int], object]) -> None:
        """Writes the weights and the other files; adds their paths to those that are written."""
        kind = self.part.kind
        written += [out / name for name in kind.files]
        if kind.weights is not None:
            with replacing(out / kind.weights) as temporary:
                write_safetensors(temporary, self.layout, self._read, on_bytes)
        if kind.assets:
            self.frame.save_assets(out)

    def _read(self, name: str) -> Tensor:
        return self.part.weights[name]().to(self.layout[name].dtype)


def _build(part: PublishedPart) -> Any:
    """The part itself, in eval mode."""
    kind = part.kind
    if kind.weights is None:
        built = kind.module(part.config)
    else:
        weights = {name: read() for name, read in part.weights.items()}
        what = f"a {kind.role} of kind {kind.name!r}"
        built = fill(lambda: kind.module(part.config), weights, part.path, what)
    if part.tokenizer is not None:
        built.tokenizer = part.tokenizer
    return built.eval() if isinstance(built, nn.Module) else built


def _model(source: str | Path, parts: Mapping[str, Any]) -> Model:
    try:
        return Model(parts["tokenizer"], parts["prior"], parts["codec"], parts.get("ranker"))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _card(source: str | Path, found: Gathered, writers: Mapping[str, _PartWriter]) -> str:
    """The folder's README.md; ValueError where the parts do not fit each other."""
    if "prior" in writers:
        parts = {role: writer.frame for role, writer in writers.items()}
        parts["tokenizer"] = found.tokenizer
        check_complete(source, parts)
        model = _model(source, parts)
        model.origins = found.origins
        return model.card()
    if not writers:
        raise ValueError(f"{source}: expected a codec, a prior or a ranker, got a tokenizer alone")
    lines = [
        f"- {role}: {type(w.frame).__name__}, {w.parameters:,} parameters"
        for role, w in writers.items()
    ]
    return "\n".join(["# A part of a DALL-E model of dalle1", "", *lines, ""]) + origins_text(
        found.origins
    )


def _kinds(found: Gathered) -> dict[str, str]:
    kinds = {role: part.kind.name for role, part in found.parts.items()}
    if found.tokenizer is not None:
        kinds["tokenizer"] = registry.tokenizer_kind(found.tokenizer)
    return kinds


def _write_config(found: Gathered, out: Path) -> None:
    """The sections of all parts, in a folder that becomes complete by the rename."""
    if found.tokenizer is not None:
        write_section(out, "tokenizer", {"kind": registry.tokenizer_kind(found.tokenizer)})
    for role, part in found.parts.items():
        write_section(out, role, {"kind": part.kind.name, **part.config.model_dump()})
    write_origins(out, found.origins)


def _access(download: bool) -> HubAccess:
    return HubAccess(local_files_only=not download)


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())

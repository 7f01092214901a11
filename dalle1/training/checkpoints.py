"""Checkpoints: safetensors and JSON, written beside and then renamed.

    checkpoints/step-0000500/rank-00000-of-00002.safetensors, ..., state.json

Each rank writes whole tensors, its share of all (`ema.shares`), so that no process ever holds a
whole model and any number of ranks at any ZeRO stage can go on. `state.json` is written last and
the folder renamed after it: a folder without it does not count. All ranks see the same folder.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dalle1.common.files import flush
from dalle1.training.distributed import any_rank, rank, ranks

STATE = "state.json"


class Tensors(Mapping[str, Tensor]):
    """Tensors of safetensors files under a prefix, each read when it is asked for."""

    def __init__(self, files: Mapping[str, Any], prefix: str = "") -> None:
        """files: the open file that holds each name."""
        self._files, self._prefix = files, prefix

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._prefix + name].get_tensor(self._prefix + name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        n = len(self._prefix)
        return (name[n:] for name in self._files if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def under(self, prefix: str) -> Tensors:
        """Those whose names begin with the prefix, without it."""
        return Tensors(self._files, self._prefix + prefix)


@dataclass
class Checkpoint:
    """What a run goes on from; `state` holds the number of updates done as `step`."""

    path: Path
    tensors: Tensors
    state: dict[str, Any]


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    keep_every: int | None = None,
    meet: Callable[[], None] = lambda: None,
) -> Path | None:
    """Writes this rank's tensors; all ranks call it together. Returns the folder, on all ranks.

    None, with a warning, when a rank could not write: the former checkpoints are as they were.
    Keeps the newest `keep` and those whose update is a multiple of `keep_every`.
    meet: waits for all ranks, which may take long to write.
    """
    final = folder / f"step-{state['step']:07d}"
    beside = folder / (final.name + ".tmp")

    def begin() -> None:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)

    def write() -> None:
        path = beside / _file_name(rank(), ranks())
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
        _sync(path)

    def finish() -> None:
        content = json.dumps({**state, "ranks": ranks()}, indent=2) + "\n"
        (beside / STATE).write_text(content)
        _sync(beside / STATE)
        if final.exists():
            shutil.rmtree(final)
        os.replace(beside, final)
        for old in _finished(folder)[:-keep]:
            if not keep_every or _step(old) % keep_every:
                shutil.rmtree(old)

    for act, by in ((begin, rank() == 0), (write, True), (finish, rank() == 0)):
        failure: Exception | None = None
        if by:
            try:
                act()
            except (OSError, SafetensorError) as error:  # a full disk raises either
                failure = error
        meet()
        if any_rank(failure is not None):
            if failure is not None:
                print(f"warning: checkpoint {final} not saved: {failure}", file=sys.stderr)
            if rank() == 0:
                shutil.rmtree(beside, ignore_errors=True)
            return None
    return final


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None where none was ever finished.

    Damaged ones are passed over with a warning; ValueError when all are.
    """
    reasons = []
    for path in reversed(_finished(folder)):
        try:
            load(path)
        except ValueError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            print(f"warning: {reason}; going on from {path.name}", file=sys.stderr)
        return path
    if reasons:
        raise ValueError("; ".join(reasons))
    return None


def load(path: Path) -> Checkpoint:
    """Opens a checkpoint; ValueError when a rank's file is missing or one is damaged."""
    files: dict[str, Any] = {}
    try:
        state = json.loads((path / STATE).read_text())
        for i in range(state["ranks"]):
            opened: Any = safe_open(path / _file_name(i, state["ranks"]), framework="pt")
            files |= dict.fromkeys(opened.keys(), opened)
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from error
    return Checkpoint(path, Tensors(files), state)


def _file_name(rank: int, ranks: int) -> str:
    return f"rank-{rank:05d}-of-{ranks:05d}.safetensors"


def _finished(folder: Path) -> list[Path]:
    found = (p for p in folder.glob("step-*") if p.suffix != ".tmp")
    return sorted((p for p in found if (p / STATE).is_file()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sync(path: Path) -> None:
    """Waits until the file is on the disk: a rename may get there first."""
    with path.open("rb+") as file:
        flush(file)

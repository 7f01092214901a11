"""Checkpoints: safetensors and JSON, written to a temporary folder which is then renamed.

    checkpoints/step-0000500/rank-00000-of-00002.safetensors, ..., state.json

Each rank writes its share of the tensors (`ema.assign_owners`), each of them unsharded. No process
thus ever holds the full model, and a run can resume on any number of ranks at any ZeRO stage.
`state.json` is written last and the folder is renamed after it. What has another name than the
number of its updates, such as a copy `step-0000500.bak` or `step-0009999`, or is a file, a link or
a folder without `state.json`, is not ours: it does not count and is never removed. All ranks must
see the same folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dalle1.common.files import make_folder, put_aside, sync
from dalle1.training.distributed import any_rank, rank, world_size

STATE = "state.json"


class Tensors(Mapping[str, Tensor]):
    """Tensors of safetensors files, by the rest of their name after a prefix.

    Each is read from its file when it is asked for.
    """

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
        """The tensors whose names begin with the prefix, by the rest of the name."""
        return Tensors(self._files, self._prefix + prefix)


@dataclass
class Checkpoint:
    """What a run resumes from; `state["step"]` is the number of updates done."""

    path: Path
    tensors: Tensors
    state: dict[str, Any]


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    keep_every: int | None = None,
    barrier: Callable[[], None] = lambda: None,
) -> Path | None:
    """Writes a checkpoint and removes old ones; all ranks must call it together.

    Args:
        folder: of the run's checkpoints.
        tensors: those that this rank writes, by names that no other rank uses.
        state: everything else, of which the first rank's is written; `state["step"]` is needed.
        keep: how many of the newest good checkpoints stay; see `_remove_old`.
        keep_every: checkpoints whose update is a multiple of it stay too.
        barrier: waits for all ranks, which may take long to write.

    Returns:
        The checkpoint's folder, the same on all ranks. None, with a warning, when a rank could not
        write; the earlier checkpoints then stay as they were.
    """
    final = folder / _name(state["step"])
    temporary = folder / (final.name + ".tmp")

    def prepare() -> None:
        if os.path.lexists(temporary) and (temporary.is_symlink() or not temporary.is_dir()):
            put_aside(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        make_folder(temporary)

    def write() -> None:
        path = temporary / _file_name(rank(), world_size())
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
        sync(path)
        sync(temporary)

    def finish() -> None:
        content = json.dumps({**state, "ranks": world_size()}, indent=2) + "\n"
        (temporary / STATE).write_text(content, encoding="utf-8")
        sync(temporary / STATE)
        sync(temporary)
        with _place_freed(final):
            os.replace(temporary, final)
            sync(folder)
        _remove_old(folder, state["step"], keep, keep_every)

    for act, by in ((prepare, rank() == 0), (write, True), (finish, rank() == 0)):
        failure: Exception | None = None
        if by:
            try:
                act()
            except (OSError, SafetensorError) as error:  # a full disk raises either
                failure = error
        barrier()
        if any_rank(failure is not None):
            if failure is not None:
                print(f"warning: checkpoint {final} not saved: {failure}", file=sys.stderr)
            if rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            return None
    return final


def newest(folder: Path) -> Path | None:
    """The newest undamaged checkpoint, or None where none was ever finished.

    Damaged ones are skipped with a warning; so are copies and links, where there is nothing else.

    Raises:
        ValueError: all are damaged.
    """
    reasons = []
    for path in reversed(_finished(folder)):
        try:
            load(path)
        except ValueError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            print(f"warning: {reason}; resuming from {path.name}", file=sys.stderr)
        return path
    if reasons:
        raise ValueError(
            f"run: expected an undamaged checkpoint in {folder}, got none: {'; '.join(reasons)}; "
            "put a copy of one back, or begin a new run (run=...)"
        )
    others = sorted(p.name for p in folder.glob("step-*") if (p / STATE).is_file())
    if others and rank() == 0:
        print(
            f"warning: {folder}: no checkpoints of this run: {', '.join(others)}; to resume from "
            f"one, make it a folder with a name like {_name(500)}",
            file=sys.stderr,
        )
    return None


def load(path: Path) -> Checkpoint:
    """Opens a checkpoint.

    Raises:
        ValueError: the file of a rank is missing, or one is damaged.
    """
    files: dict[str, Any] = {}
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state["step"] < 0 or state["ranks"] < 1:
            raise ValueError(f"{STATE}: step {state['step']} of {state['ranks']} ranks")
        for i in range(state["ranks"]):
            opened: Any = safe_open(path / _file_name(i, state["ranks"]), framework="pt")
            files |= dict.fromkeys(opened.keys(), opened)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from error
    return Checkpoint(path, Tensors(files), state)


def _file_name(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def _name(step: int) -> str:
    return f"step-{step:07d}"


def _step(path: Path) -> int | None:
    """The number of updates in a folder's name; None for a name that `_name` does not give."""
    found = re.fullmatch(r"step-([0-9]{7,})", path.name)
    return int(found[1]) if found and path.name == _name(int(found[1])) else None


def _is_ours(path: Path) -> bool:
    """Whether it is a finished checkpoint, damaged or not, under the name that it was given."""
    step = _step(path)
    if step is None or path.is_symlink() or not (path / STATE).is_file():
        return False
    try:
        return bool(json.loads((path / STATE).read_text(encoding="utf-8"))["step"] == step)
    except (OSError, ValueError, KeyError, TypeError):
        return True  # damaged


def _finished(folder: Path) -> list[Path]:
    """The checkpoints, oldest first."""
    return sorted((p for p in folder.glob("step-*") if _is_ours(p)), key=lambda p: _step(p) or 0)


@contextmanager
def _place_freed(path: Path) -> Iterator[None]:
    """In this block nothing is at the path. What was there is removed afterwards if it was a
    checkpoint, as of a course that the run has left; else it stays, under another name."""
    if not os.path.lexists(path):
        yield
        return
    ours = _is_ours(path)
    aside = put_aside(path)
    try:
        yield
    except BaseException:
        os.replace(aside, path)
        raise
    if ours:
        _remove(aside)
    else:
        print(f"warning: {path} was no checkpoint, and is {aside.name} now", file=sys.stderr)


def _remove_old(folder: Path, step: int, keep: int, keep_every: int | None) -> None:
    """Removes what is older than the newest `keep` good checkpoints up to a step.

    A damaged one does not count: the last good one stays. Nor does a newer one: a run that comes to
    a smaller step has left its course, going on from before it.
    """
    kept = 0
    for path in reversed(_finished(folder)):
        number = _step(path) or 0
        if number > step:
            continue
        if kept < keep:
            kept += _is_good(path)
        elif not keep_every or number % keep_every:
            _remove(path)


def _is_good(path: Path) -> bool:
    try:
        load(path)
    except ValueError:
        return False
    return True


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        print(f"warning: the old checkpoint {path} cannot be removed: {error}", file=sys.stderr)

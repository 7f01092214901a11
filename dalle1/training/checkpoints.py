"""Checkpoints: safetensors and JSON, written beside and then renamed.

    checkpoints/step-0000500/{weights,average,optimiser}.safetensors, state.json

`state.json` is written last and the folder renamed after it: a folder without it does not count.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE = "state.json"


@dataclass
class Checkpoint:
    """All that a run needs to go on; `state` holds the number of updates done as `step`."""

    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint and removes all but the newest `keep`; returns its folder."""
    final = folder / f"step-{checkpoint.state['step']:07d}"
    beside = folder / (final.name + ".tmp")
    if beside.exists():
        shutil.rmtree(beside)
    beside.mkdir(parents=True)
    for name in ("weights", "average", "optimiser"):
        tensors = getattr(checkpoint, name)
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
            beside / f"{name}.safetensors",
        )
    (beside / STATE).write_text(json.dumps(checkpoint.state, indent=2) + "\n")
    if final.exists():
        shutil.rmtree(final)
    os.replace(beside, final)
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint; ValueError when a file is missing or damaged."""
    try:
        parts = {
            name: load_file(path / f"{name}.safetensors")
            for name in ("weights", "average", "optimiser")
        }
        return Checkpoint(**parts, state=json.loads((path / STATE).read_text()))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from error


def _complete(folder: Path) -> list[Path]:
    found = (p for p in folder.glob("step-*") if p.suffix != ".tmp")
    return sorted(p for p in found if (p / STATE).is_file())

"""Checkpoints as PyTorch Lightning writes them: weights among objects of classes that are not
installed where the file is read."""

from __future__ import annotations

import argparse
import enum
import pathlib
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ModelCheckpoint:
    """Its class is a key; an object with a state of its own."""

    def __init__(self) -> None:
        self.best, self.folder = torch.tensor(0.5), pathlib.PurePosixPath("logs")


class AttributeDict(dict[str, Any]):
    """A dictionary with attributes, filled by the pickle after it is made."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.note = "x"


class ListConfig(list[int]):
    """A list of a class of its own."""


class Mode(enum.Enum):
    """A member is made by a call of its class."""

    MIN = "min"


class Slotted:
    """Its state is a pair of dictionaries."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 3


PLACES: dict[str, tuple[type, ...]] = {
    "pytorch_lightning.callbacks.model_checkpoint": (ModelCheckpoint, Mode),
    "pytorch_lightning.utilities.parsing": (AttributeDict,),
    "omegaconf.listconfig": (ListConfig, Slotted),
}


@contextmanager
def their_names() -> Iterator[None]:
    """While it lasts, the classes here are found, and written, under their published names."""
    own = {c: c.__module__ for classes in PLACES.values() for c in classes}
    held = dict(sys.modules)
    for place, classes in PLACES.items():
        parts = place.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            sys.modules[name] = types.ModuleType(name)
        for c in classes:
            setattr(sys.modules[place], c.__name__, c)
            c.__module__ = place
    try:
        yield
    finally:
        for name in set(sys.modules) - set(held):
            del sys.modules[name]
        sys.modules.update(held)
        for c, module in own.items():
            c.__module__ = module


def save(weights: Mapping[str, Tensor], path: Path, form: str = "zip", **others: Any) -> Path:
    """Writes weights as a checkpoint; form: "zip", or "legacy" for torch's before 1.6."""
    content = {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "1.0.8",
        "callbacks": {ModelCheckpoint: {"monitor": "val/rec_loss", "object": ModelCheckpoint()}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": []}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": AttributeDict(
            {
                "ch_mult": ListConfig([1, 2]),
                "mode": Mode.MIN,
                "slots": Slotted(),
                "arguments": argparse.Namespace(seed=23),
                "best": np.float64(0.25),
                "table": np.arange(3),
                "counts": defaultdict(int, {"a": 1}),
            }
        ),
        "state_dict": OrderedDict(weights),
        **others,
    }
    with their_names():
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path

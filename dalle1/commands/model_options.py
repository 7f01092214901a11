"""What the commands that open a model have in common: its options, its device, its ranker."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dalle1 import models, registry
from dalle1.commands.command_line import as_model
from dalle1.common.hardware import default_device
from dalle1.model import Model
from dalle1.protocols import Ranker
from dalle1.sampling import MODEL_VARIABLE, resolve


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments of commands that open a model folder; see `open_model`."""
    parser.add_argument(
        "--model",
        type=as_model,
        help="model folder, or the name of a model that comes with dalle1, or "
        f"OWNER/NAME[@REVISION] on the Hugging Face Hub (default: {MODEL_VARIABLE}, or else "
        f"{models.DEFAULT})",
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """The device that `open_model` puts a model on."""
    parser.add_argument("--device", default=str(default_device()), help="cpu, cuda, cuda:1 ...")


def add_ranker(parser: argparse.ArgumentParser) -> None:
    """The argument of commands that rank; see `registry.open_ranker`."""
    parser.add_argument(
        "--ranker",
        metavar="NAME",
        help="in place of the model's own: a folder with a ranker, open_clip:MODEL/PRETRAINED, "
        "hf:NAME, one of these with '+WEIGHT*likelihood', likelihood, perplexity, or none",
    )


def open_model(options: argparse.Namespace, dtype: torch.dtype | None = None) -> Model:
    """The model that `add_model`'s arguments name, on its device.

    Raises ValueError where the folder is no model or the device is not there.
    """
    model = resolve(options.model, getattr(options, "ranker", None))
    with _device_told(options.device):
        return model.to(options.device, dtype)


def open_ranker(options: argparse.Namespace) -> Ranker:
    """The ranker of `add_ranker` alone, without a model, on its device; as `open_model`."""
    ranker: Ranker = registry.open_ranker(options.ranker)
    if isinstance(ranker, nn.Module):
        with _device_told(options.device):
            ranker.to(options.device)
    return ranker


@contextmanager
def _device_told(device: str) -> Iterator[None]:
    """In this block what torch raises for a device that is not there becomes a ValueError."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {error}") from error

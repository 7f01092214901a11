"""What the commands have in common: parsers, devices, exit statuses."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from dalle1.common.hardware import default_device
from dalle1.common.images import to_rgb
from dalle1.model import Model
from dalle1.sampling import resolve

FAILED, MISTAKE, RANK_LOST, STOPPED = 1, 2, 75, 130  # exit statuses


def make_parser(verb: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of `dalle1 VERB`; the description is the first line of the module's docstring."""
    first = (description or "").strip().splitlines()
    return argparse.ArgumentParser(prog=f"dalle1 {verb}", description=first[0] if first else None)


def add_config(parser: argparse.ArgumentParser, example: str) -> None:
    """The arguments of commands that read a YAML file of settings."""
    parser.add_argument("config", help=f"a YAML file such as {example}")
    parser.add_argument("overrides", nargs="*", help="settings as key=value, after the file's")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher's


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments of commands that open a model folder; see `open_model`."""
    parser.add_argument("--model", type=Path, help="model folder (or set DALLE1_MODEL)")
    parser.add_argument("--device", default=str(default_device()), help="cpu, cuda, cuda:1 ...")


def exit_status(work: Callable[[], int], stopped: str = "stopped", failed: str = "") -> int:
    """What a command ends with: the work's own status; MISTAKE for a mistake of the user's, FAILED
    for a disk or a network that fails, STOPPED for Ctrl-C. Each has a line on stderr in place of a
    traceback; failed: stands at its end where a disk or a network failed.
    """
    try:
        return work()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except OSError as error:
        why = error.strerror if error.strerror and not error.filename else error
        print(f"error: {why}{failed}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return STOPPED


def open_model(options: argparse.Namespace, dtype: torch.dtype | None = None) -> Model:
    """The model that `add_model`'s arguments name, on its device; ValueError if it cannot be."""
    try:
        return resolve(options.model).to(options.device, dtype)
    except (RuntimeError, AssertionError) as error:  # what torch raises where there is no CUDA
        raise ValueError(f"--device {options.device}: {error}") from error


def open_image(path: Path) -> Image.Image:
    """An image file as RGB; ValueError that names it if it cannot be read."""
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"image {path}: cannot be read: {error}") from error

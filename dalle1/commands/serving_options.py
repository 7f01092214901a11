"""What the commands that draw for many clients have in common: models, limits of a queue."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from dalle1 import models
from dalle1.commands.model_options import add_device, add_ranker, open_model
from dalle1.common.hardware import DTYPES
from dalle1.model import Model
from dalle1.sampling import MODEL_VARIABLE

S = TypeVar("S", bound=BaseModel)
LIMITS = {  # of `Limits`, by the options that set them
    "waiting": "max-waiting",
    "captions": "max-captions",
    "letters": "max-letters",
    "candidates": "max-candidates",
    "batch_size": "batch-size",
    "gather_seconds": "gather-seconds",
    "idle_seconds": "idle-seconds",
}


def add_models(parser: argparse.ArgumentParser) -> None:
    """The arguments of `open_models`."""
    parser.add_argument(
        "--model",
        action="append",
        metavar="[NAME=]FOLDER",
        help="model folder, the name of a model that comes with dalle1, or OWNER/NAME[@REVISION] "
        "on the Hugging Face Hub; again for more models. "
        f"NAME is what clients call it (default: {MODEL_VARIABLE}, or else {models.DEFAULT})",
    )
    add_device(parser)
    add_ranker(parser)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the priors")


def add_address(parser: argparse.ArgumentParser, port: int) -> None:
    """Where a server listens, and the names that it answers to; `port` by default."""
    parser.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0: of any machine")
    parser.add_argument("--port", type=int, default=port, help="0: a free one")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name that requests may be addressed to, such as that of a proxy; again for more "
        "(default: those of this machine; where --host is another address, any)",
    )


def open_models(options: argparse.Namespace) -> dict[str, Model]:
    """The models that `add_models`' arguments name, by name, on their device.

    Raises ValueError where one cannot be opened, or two have the same name.
    """
    opened: dict[str, Model] = {}
    for text in options.model or [None]:
        name, folder = _named(text)
        if name in opened:
            raise ValueError(
                f"--model: expected different names, got {name!r} twice; write NAME=FOLDER"
            )
        one = argparse.Namespace(**{**vars(options), "model": folder})
        opened[name] = open_model(one, DTYPES[options.dtype])
    return opened


def _named(text: str | None) -> tuple[str, str | None]:
    """A model's name and folder, of "NAME=FOLDER" or "FOLDER"; of None the default's name."""
    if text is None:
        return models.DEFAULT, None
    name, equals, folder = text.partition("=")
    if equals and "/" not in name and not Path(text).exists():
        if not name or not folder:
            raise ValueError(f"--model: expected NAME=FOLDER or FOLDER, got {text!r}")
        return name, folder
    path = Path(text).absolute()  # training writes RUN/model
    return (path.parent.name if path.name == "model" else path.name) or text, text


def add_settings(
    parser: argparse.ArgumentParser, kind: type[BaseModel], names: Mapping[str, str]
) -> None:
    """An option for each setting of a class that `names` gives a name, without its dashes."""
    for setting, name in names.items():
        field = kind.model_fields[setting]
        parser.add_argument(
            f"--{name}",
            type=float if setting.endswith("seconds") else int,
            default=field.default,
            help=field.description,
        )


def settings_of(
    options: argparse.Namespace, kind: type[S], names: Mapping[str, str], **others: object
) -> S:
    """The settings that `add_settings`' options give, and others.

    Raises ValueError for one that is out of its bounds.
    """
    given = {s: getattr(options, name.replace("-", "_")) for s, name in names.items()}
    try:
        return kind(**given, **others)
    except ValidationError as error:
        first = error.errors()[0]
        setting = str(first["loc"][0])
        name = f"--{names[setting]}" if setting in names else setting
        raise ValueError(f"{name}: {first['msg']}, got {first['input']!r}") from error

"""Which folder a user means by a path, by the name of a model that comes along, or by one of the
Hub's."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from dalle1 import models
from dalle1.common.files import expand_home
from dalle1.hub.access import HubAccess
from dalle1.hub.models import fetch_model
from dalle1.hub.names import HubName, as_revision, parse_model


def find_folder(
    model: str | os.PathLike[str],
    access: HubAccess | None = None,
    revision: str | None = None,
    skip: Collection[str] = (),
) -> Path:
    """The folder of a model; one on the Hub is fetched into its cache.

    The network is asked for a text of the form OWNER/NAME[@REVISION] that is no folder, and for
    nothing else.

    Args:
        model: a folder, which wins over a name; a name of `dalle1.models`; or a name on the Hub.
            What is no text is a path, whatever it looks like.
        access: to the Hub.
        revision: of a name on the Hub.
        skip: roles of parts that need not be fetched.

    Raises:
        ValueError: there is no such folder or model, or `revision` is given for a folder.
        ConnectionError: the Hub cannot be reached, and its cache does not hold the model.
    """
    if not isinstance(model, str | os.PathLike):
        raise ValueError(f"model: expected a folder, got {type(model).__name__}")
    folder = models.find(expand_home(model))
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision: expected a model on the Hub, got the folder {folder}; leave it out"
            )
        return folder
    name = parse_model(model) if isinstance(model, str) else None
    if name is not None:
        return fetch_model(_at(name, revision), access or HubAccess(), skip)
    known = f", and no name of {', '.join(models.names())}" if models.names() else ""
    raise ValueError(
        f"model: {folder} is no folder{known}; training writes one as RUN/model, and a model on "
        "the Hugging Face Hub is OWNER/NAME"
    )


def _at(name: HubName, revision: str | None) -> HubName:
    """A name at a revision, which is given beside it or in it."""
    if revision is None:
        return name
    if name.revision not in (None, revision):
        raise ValueError(f"revision: expected {name.revision!r}, as in {name}, got {revision!r}")
    return replace(name, revision=as_revision(revision))

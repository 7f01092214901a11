"""Progress bars on stderr, which do not fill the log of a job."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar, overload

from tqdm import tqdm

T = TypeVar("T")
WATCHED, LOGGED = 0.5, 20.0  # seconds between two lines


@overload
def progress_bar(iterable: None = None, **settings: Any) -> tqdm[Any]: ...
@overload
def progress_bar(iterable: Iterable[T], **settings: Any) -> tqdm[T]: ...
def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> tqdm[Any]:
    """A bar of tqdm: two lines a second in a terminal or notebook, one in 20 seconds elsewhere.

    settings: other arguments of tqdm.
    """
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(
        iterable,
        mininterval=WATCHED if watched else LOGGED,
        dynamic_ncols=watched,
        ncols=None if watched else 110,
        **settings,
    )

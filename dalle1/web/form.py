"""The page's form: what a visitor has filled in, as a request, or the line that says what is wrong.

Whatever the browser sends is checked here and not trusted: a program may fill in the form, too.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dalle1.common.arguments import as_float, as_int
from dalle1.generation.options import SamplingOptions
from dalle1.serving.requests import Limits, Request
from dalle1.web.limits import PageLimits
from dalle1.web.shapes import ModelShape
from dalle1.web.uploads import open_picture

SEEDS = 2**31  # those that the page makes up are below, so that one can write them down
PREVIEWS = 8  # about as many of each image until it is complete


@dataclass(frozen=True)
class Form:
    """The values of the form's components, under their names and in their order on the page."""

    model: Any = None
    captions: Any = ""
    candidates: Any = 16
    keep: Any = 8
    temperature: Any = 1.0
    top_k: Any = None  # None, 0: all tokens
    top_p: Any = 1.0
    guidance: Any = 1.0
    seed: Any = 0
    new_seed: Any = False  # another one for every drawing
    picture: Any = ""  # to complete: a data URL
    rows: Any = 0  # of the picture that are kept; 0: it is not used


FIELDS = tuple(field.name for field in fields(Form))


def read_form(
    form: Form, shapes: Mapping[str, ModelShape], limits: Limits, page: PageLimits
) -> Request:
    """The request that the form stands for.

    Args:
        shapes: of the models on the page, by their names.

    Raises:
        ValueError: a field is empty, wrong or beyond the limits. The message begins with its name.
    """
    if not isinstance(form.model, str) or form.model not in shapes:
        raise ValueError(f"model: expected one of {', '.join(shapes)}, got {form.model!r}")
    shape = shapes[form.model]
    captions = read_captions(form.captions, limits)
    candidates = _count(form.candidates, "candidates", limits.candidates // len(captions))
    keep = min(_count(form.keep, "keep", page.keep), candidates)
    if not shape.ranked:  # there is nothing to choose by
        keep = candidates = keep
    picture, rows = "", _whole(form.rows, "rows", 0)
    if rows and form.picture:
        picture = form.picture
        if not 0 < rows < shape.grid[0]:
            raise ValueError(f"rows: expected 0 to {shape.grid[0] - 1}, got {rows}")
    top_k = _whole(form.top_k, "top_k", 0)
    options = SamplingOptions(
        as_float(form.temperature, "temperature"),
        None if top_k == 0 else top_k,
        None if form.top_p is None else as_float(form.top_p, "top_p"),
        as_float(form.guidance, "guidance"),
    )
    return Request(
        model=form.model,
        captions=captions,
        candidates=candidates,
        keep=keep,
        options=options,
        seed=secrets.randbelow(SEEDS) if form.new_seed is True else _whole(form.seed, "seed", 0),
        image=open_picture(picture, shape.read_size, page) if picture else None,
        rows=rows if picture else 0,
        preview_rows=max(1, shape.grid[0] // PREVIEWS),
        preview_images=keep,
        of_fewer=shape.ranked,
    )


def read_captions(text: Any, limits: Limits) -> tuple[str, ...]:
    """The captions of a text, one a line; empty lines are left out.

    Raises ValueError where there are none, or more or longer ones than the limits allow.
    """
    if not isinstance(text, str):
        raise ValueError(f"captions: expected a text, got {type(text).__name__}")
    captions = tuple(line for line in map(str.strip, text.splitlines()) if line)
    if not captions:
        raise ValueError("captions: expected at least one line, got none; say what to draw")
    if len(captions) > limits.captions:
        raise ValueError(
            f"captions: expected at most {limits.captions} lines, got {len(captions)}; draw the "
            "others afterwards"
        )
    longest = max(map(len, captions))
    if longest > limits.letters:
        raise ValueError(
            f"captions: expected at most {limits.letters} letters in a line, got {longest}; "
            "shorten it"
        )
    return captions


def _whole(value: Any, name: str, empty: int) -> int:
    """A whole number; an empty field stands for `empty`."""
    return empty if value is None or value == "" else as_int(value, name)


def _count(value: Any, name: str, most: int) -> int:
    """A whole number from 1 to the limit."""
    found = as_int(value, name)
    if found < 1:
        raise ValueError(f"{name}: expected at least 1, got {found}")
    if found > most:
        raise ValueError(f"{name}: expected at most {most}, got {found}; ask for fewer")
    return found

"""Numbers and captions as people hand them in, taken as Python's own types or refused.

NumPy's numbers and tensors without dimensions are numbers. They become Python's, since what is made
of them goes into JSON and into the keys of random numbers: a seed of 3 draws the same images as
`np.int64(3)` and 3.0.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np


def as_int(value: object, name: str) -> int:
    """A whole number as Python's int.

    Args:
        value: an int of any library; a float or a tensor without dimensions that is one.
        name: of the argument, for the message.

    Raises:
        ValueError: it is no number, a bool, or not whole.
    """
    number = _number(value)
    if isinstance(number, numbers.Integral):
        return int(number)
    if number is not None and math.isfinite(number) and number == int(number):
        return int(number)
    raise ValueError(f"{name}: expected a whole number, got {_described(value)}")


def as_float(value: object, name: str) -> float:
    """A real number as Python's float, NaN and infinities included; see `as_int`."""
    number = _number(value)
    if number is None:
        raise ValueError(f"{name}: expected a number, got {_described(value)}")
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _number(value: object) -> Any:
    """A number; None for what is none. True is no number: it is a slip, such as keep=True."""
    if getattr(value, "ndim", None) == 0:  # of NumPy and torch
        try:
            value = value.item()  # type: ignore[attr-defined]
        except RuntimeError:  # a tensor without values, on the meta device
            return None
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        return None
    return value


def _described(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def as_captions(captions: str | Iterable[str], name: str = "captions") -> tuple[list[str], bool]:
    """Captions as a list, and whether it was one caption alone.

    Args:
        captions: a string; or a list, tuple, array, column of a table or iterator of strings.
        name: of the argument, for the message.

    Raises:
        ValueError: there are none, one is no text, or they have no order.
    """
    if getattr(captions, "ndim", None) == 0 and hasattr(captions, "item"):
        captions = captions.item()
    if isinstance(captions, str):
        return [as_caption(captions)], True
    ordered = isinstance(captions, Iterable) and not isinstance(captions, bytes | Mapping | Set)
    if not ordered:
        raise ValueError(f"{name}: expected a string or a list of them, got {_described(captions)}")
    result = [as_caption(caption) for caption in captions]
    if not result:
        raise ValueError(f"{name}: expected at least one")
    return result, False


def as_caption(caption: object, name: str = "caption") -> str:
    """One caption as Python's str.

    Raises ValueError for what is no string, or cannot be written as UTF-8: half a character.
    """
    if not isinstance(caption, str):
        raise ValueError(f"{name}: expected text, got {_described(caption)}")
    caption = str(caption)  # not np.str_
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected text, got {caption!r}: {error.reason}") from error
    return caption

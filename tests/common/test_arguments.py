"""Numbers and captions of NumPy, torch and tables, taken as Python's own or refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from dalle1.common.arguments import as_caption, as_captions, as_float, as_int

THREES = [
    *(3, 3.0, Fraction(3), np.int64(3), np.uint8(3)),
    *(np.float32(3), np.float16(3), np.longdouble(3)),
    *(np.array(3), np.array(3.0), torch.tensor(3), torch.tensor(3.0, dtype=torch.bfloat16)),
    torch.tensor(3, dtype=torch.uint8),
]  # fmt: skip
NO_NUMBERS = [
    *(True, False, np.True_, np.array(True), torch.tensor(True), "3", b"3", None, [3], (3,), 3j),
    *(np.array([3]), torch.tensor([3]), np.str_("3"), np.datetime64(3, "s"), object(), {3}),
    torch.empty((), device="meta"),
]  # fmt: skip


class Column:
    """A column of a table, as pandas has it: neither a list nor a sequence."""

    def __init__(self, values: list[Any]) -> None:
        self.values = np.array(values, dtype=object)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)


@pytest.mark.parametrize("value", THREES)
def test_numbers_of_any_library(value: object) -> None:
    """A NumPy number that stays one, which JSON refuses after hours of drawing."""
    assert as_int(value, "keep") == 3 and type(as_int(value, "keep")) is int
    assert as_float(value, "top_p") == 3 and type(as_float(value, "top_p")) is float
    assert json.dumps([as_int(value, "keep"), as_float(value, "top_p")]) == "[3, 3.0]"


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda x: type(x).__name__)
def test_what_is_no_number_is_refused(value: object) -> None:
    """True taken for 1, or a string compared with a number in a traceback."""
    with pytest.raises(ValueError, match="keep: expected a whole number, got "):
        as_int(value, "keep")
    with pytest.raises(ValueError, match="top_p: expected a number, got "):
        as_float(value, "top_p")


@pytest.mark.parametrize("value", [3.5, math.nan, math.inf, np.float32(2.5), torch.tensor(-0.5)])
def test_what_is_not_whole_is_refused(value: Any) -> None:
    """A count of 3.5 that is cut to 3."""
    with pytest.raises(ValueError, match=r"seed: expected a whole number, got .*\("):
        as_int(value, "seed")
    assert as_float(value, "x") == float(value) or math.isnan(value)


def test_numbers_of_any_size() -> None:
    """A large seed that is rounded, or a number beyond all floats that raises OverflowError."""
    assert as_int(2**70 + 1, "seed") == 2**70 + 1 and as_int(-(10**400), "seed") == -(10**400)
    assert as_int(np.uint64(2**64 - 1), "seed") == 2**64 - 1
    assert as_float(10**400, "x") == math.inf and as_float(-(10**400), "x") == -math.inf


@pytest.mark.parametrize(
    "captions",
    [
        ["a cat", "b"],
        ("a cat", "b"),
        np.array(["a cat", "b"]),
        np.array(["a cat", "b"], dtype=object),
        [np.str_("a cat"), "b"],
        Column(["a cat", "b"]),
        (x for x in ("a cat", "b")),
        dict.fromkeys(["a cat", "b"]).keys().__iter__(),
    ],
)
def test_captions_of_any_kind(captions: Any) -> None:
    """An array or a column of captions that is refused, or whose strings stay NumPy's."""
    found, one = as_captions(captions)
    assert found == ["a cat", "b"] and not one
    assert {type(caption) for caption in found} == {str}


@pytest.mark.parametrize("caption", ["a cat", np.str_("a cat"), np.array("a cat")])
def test_one_caption(caption: Any) -> None:
    """A caption alone that is read letter by letter."""
    assert as_captions(caption) == (["a cat"], True)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([], "captions: expected at least one"),
        (np.array([]), "captions: expected at least one"),
        (b"a cat", r"captions: expected a string or a list of them, got b'a cat' \(bytes\)"),
        (None, "captions: .*None"),
        (3, "captions: .*3"),
        ({"a cat": 1}, "captions: .*dict"),
        ({"a cat", "b"}, "captions: .*set"),  # in which order?
        (["a cat", None], "caption: expected text, got None"),
        (["a cat", math.nan], r"caption: expected text, got nan \(float\)"),
        ([["a cat"]], r"caption: expected text, got \['a cat'\]"),
        (np.array([["a", "b"]]), "caption: expected text, got .*ndarray"),
        ([b"a cat"], "caption: expected text, got b'a cat'"),
        (np.array([b"a cat"]), "caption: expected text"),
        ("half a letter \ud83d", "caption: expected text, .*surrogates"),
        (["a cat", "\udc80"], "caption: expected text"),
    ],
)
def test_what_is_no_caption_is_refused(captions: Any, message: str) -> None:
    """Bytes or half letters that fail in the middle of the drawing, or once it is done."""
    with pytest.raises(ValueError, match=message):
        as_captions(captions)


def test_the_name_is_told() -> None:
    """A message that names another argument."""
    with pytest.raises(ValueError, match="prompts: expected"):
        as_captions(3, "prompts")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="text: expected text, got 3"):
        as_caption(3, "text")

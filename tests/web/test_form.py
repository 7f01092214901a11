"""What a form stands for, and what it may not ask for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from dalle1 import SamplingOptions
from dalle1.serving.requests import LimitExceeded, Request
from dalle1.web.form import Form, read_captions, read_form
from dalle1.web.shapes import ModelShape
from tests.web.conftest import LIMITS, PAGE
from tests.web.pictures import BAD, picture

SHAPE = ModelShape((4, 4), (8, 8), (16, 16), True, "f" * 16)
SHAPES = {"ranks": SHAPE, "plain": replace(SHAPE, ranked=False)}
FORM = Form(model="ranks", captions="a red cat", candidates=8, keep=4)


def read(form: Form = FORM, **changes: Any) -> Request:
    return read_form(replace(form, **changes), SHAPES, LIMITS, PAGE)


def test_all_fields_reach_the_request() -> None:
    """A field that does nothing."""
    found = read(
        captions=" a red cat \n\n the blue cat\n",
        temperature=0.5, top_k=3, top_p=0.9, guidance=2, seed=7, picture=picture(), rows=3,
    )  # fmt: skip
    assert found.captions == ("a red cat", "the blue cat")
    assert (found.model, found.candidates, found.keep, found.seed) == ("ranks", 8, 4, 7)
    assert found.options == SamplingOptions(0.5, 3, 0.9, 2.0)
    assert found.rows == 3 and found.image is not None and found.image.size == (8, 8)  # type: ignore[union-attr]
    assert found.preview_rows == 1 and found.preview_images == 4 and found.of_fewer


def test_empty_fields_are_the_defaults() -> None:
    """An empty number that is a mistake, or a seed of its own."""
    found = read(top_k=None, top_p=None, seed=None, rows=None, picture="")
    assert found.options == SamplingOptions() and found.seed == 0 and found.image is None
    assert read(top_k=0).options.top_k is None


def test_a_new_seed_each_time() -> None:
    """Pictures that are the same ones however often one draws."""
    seeds = {read(seed=1, new_seed=True).seed for _ in range(8)}
    assert len(seeds) == 8 and all(0 <= seed < 2**31 for seed in seeds)


def test_a_picture_of_which_nothing_is_kept_is_not_used() -> None:
    """A completion that was not asked for; or an old picture's error that blocks the form."""
    assert read(picture=picture(), rows=0).image is None
    assert read(picture=BAD["a bomb"][0], rows=0).image is None
    assert read(picture="", rows=2).rows == 0


def test_without_a_ranker_all_candidates_are_shown() -> None:
    """Candidates that nobody sees, and a request that the worker refuses."""
    found = read(model="plain", candidates=16, keep=4)
    assert (found.candidates, found.keep, found.of_fewer) == (4, 4, False)


def test_fewer_candidates_than_pictures() -> None:
    """A slider beyond another one that is an error."""
    assert read(candidates=2, keep=8).keep == 2


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"captions": ""}, "captions: expected at least one"),
        ({"captions": " \n\t\n"}, "captions: expected at least one"),
        ({"captions": None}, "captions: expected a text"),
        ({"captions": "a\nb\nc\nd"}, "captions: expected at most 3 lines, got 4"),
        ({"captions": "x" * 61}, "captions: expected at most 60 letters"),
        ({"captions": "\ud800"}, "caption"),
        ({"candidates": 0}, "candidates: expected at least 1"),
        ({"candidates": 65}, "candidates: expected at most 64"),
        ({"candidates": 33, "captions": "a\nb"}, "candidates: expected at most 32"),
        ({"candidates": 10_000_000_000_000}, "candidates: expected at most"),
        ({"candidates": "many"}, "candidates: expected a whole number"),
        ({"candidates": math.nan}, "candidates: expected a whole number"),
        ({"candidates": True}, "candidates: expected a whole number"),
        ({"keep": 9}, "keep: expected at most 8"),
        ({"keep": -1}, "keep: expected at least 1"),
        ({"temperature": -1}, "temperature: expected"),
        ({"temperature": math.inf}, "temperature: expected"),
        ({"temperature": None}, "temperature: expected a number"),
        ({"guidance": math.nan}, "guidance: expected"),
        ({"top_k": -3}, "top_k: expected"),
        ({"top_k": 1.5}, "top_k: expected"),
        ({"top_p": 0}, "top_p: expected"),
        ({"top_p": 2}, "top_p: expected"),
        ({"seed": 1.5}, "seed: expected"),
        ({"seed": [1]}, "seed: expected"),
        ({"model": "other"}, "model: expected one of ranks, plain"),
        ({"model": ["ranks"]}, "model: expected one of ranks, plain"),
        ({"picture": picture(), "rows": 4}, "rows: expected 0 to 3, got 4"),
        ({"picture": picture(), "rows": -1}, "rows: expected 0 to 3, got -1"),
        ({"picture": "/etc/passwd", "rows": 1}, "picture: expected an uploaded image"),
    ],
)
def test_a_mistake_is_told_in_a_line(changes: dict[str, Any], line: str) -> None:
    """A form that reaches the worker with what it cannot draw, or an error that is no line."""
    with pytest.raises(ValueError) as error:
        read(**changes)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
    assert not isinstance(error.value, LimitExceeded)  # it is told before the worker's own limits


def test_captions_with_other_line_ends() -> None:
    """A caption with half a line end in it."""
    assert read_captions("a\r\nb\rc", LIMITS) == ("a", "b", "c")

"""What fills the form: an upload, the settings in it, an image of the page's own."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalle1.common.png_settings import png_bytes
from dalle1.web.fill import continue_from, fill_from_upload
from dalle1.web.form import Form
from dalle1.web.shapes import ModelShape
from dalle1.web.uploads import data_url, open_picture
from tests.web.conftest import PAGE
from tests.web.pictures import BAD, picture

SHAPE = ModelShape((4, 4), (8, 8), (16, 16), True, "f" * 16)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8))


def saved(**changes: Any) -> str:
    """A PNG of this page as an upload."""
    settings = {
        "caption": "a red cat", "candidate": 5, "seed": 7, "candidates": 8, "keep": 4,
        "temperature": 0.5, "top_k": 3, "guidance": 2.0, "model": SHAPE.fingerprint, **changes,
    }  # fmt: skip
    return data_url(png_bytes(IMAGE, settings))


def test_settings_fill_the_form() -> None:
    """A setting that is lost; a field that stays as it was and changes the pictures."""
    filling = fill_from_upload(saved(), SHAPE, PAGE)
    assert filling.values == {
        "captions": "a red cat", "candidates": 8, "keep": 4, "temperature": 0.5, "top_k": 3,
        "top_p": 1.0, "guidance": 2.0, "seed": 7, "new_seed": False, "rows": 0,
    }  # fmt: skip
    names = {field.name for field in fields(Form)}
    assert names - set(filling.values) == {"model", "picture"}
    np.testing.assert_array_equal(np.asarray(open_picture(filling.picture, (8, 8), PAGE)), IMAGE)
    assert "filled in" in filling.told and "another" not in filling.told


def test_another_models_settings_are_told() -> None:
    """Pictures that differ from the file's, and nobody says why."""
    told = fill_from_upload(saved(model="0" * 16), SHAPE, PAGE).told
    assert "another model" in told
    assert "number 5" in fill_from_upload(saved(first_candidate=5), SHAPE, PAGE).told


def test_a_completion_keeps_its_rows() -> None:
    """Rows beyond the model's grid in the form, or none where some were kept."""
    assert fill_from_upload(saved(rows=2), SHAPE, PAGE).values["rows"] == 2
    assert fill_from_upload(saved(rows=9), SHAPE, PAGE).values["rows"] == 0


def test_more_pictures_than_the_page_shows() -> None:
    """A form that is filled in with what it then refuses."""
    assert fill_from_upload(saved(keep=500, candidates=512), SHAPE, PAGE).values["keep"] == 8


def test_a_picture_without_settings_changes_nothing_else() -> None:
    """A photograph that empties the form."""
    for url in (picture(), picture(kind="jpeg"), data_url(png_bytes(IMAGE, None))):
        filling = fill_from_upload(url, SHAPE, PAGE)
        assert filling.values == {} and filling.told == ""
        assert open_picture(filling.picture, (8, 8), PAGE).size == (8, 8)


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_fills_nothing(name: str) -> None:
    """A path that is opened on the way to the form."""
    for fill in (fill_from_upload, continue_from):
        with pytest.raises(ValueError, match=r"^picture: "):
            fill(BAD[name][0], SHAPE, PAGE)


def test_continuing_keeps_the_upper_half() -> None:
    """An image that is put beside the form, and then not used."""
    filling = continue_from(saved(), SHAPE, PAGE)
    assert filling.values == {"rows": 2} and "upper half" in filling.told

"""Sheets: letters of any script, as far as a system has fonts for them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from dalle1.common import images as pictures
from dalle1.common.images import contact_sheet


def test_letters_beyond_ascii_are_drawn() -> None:
    """Captions of a data set as rows of boxes, all alike, although the system has the letters."""
    try:
        ImageFont.truetype("DejaVuSans.ttf", 12)
    except OSError:
        pytest.skip("no font with more letters here")
    red = Image.new("RGB", (64, 64), "red")

    def sheet(caption: str) -> np.ndarray:
        return np.asarray(contact_sheet([[red]], [caption]))

    assert not np.array_equal(sheet("äöü"), sheet("éèê"))
    assert not np.array_equal(sheet("красный"), sheet("зеленая"))
    assert np.array_equal(sheet("\ue000\ue001"), sheet("\ue002\ue003"))  # nobody has these


def test_the_font_that_has_most_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that fails where a font is not installed, or that changes plain captions' font."""
    monkeypatch.setattr(pictures, "FONTS", ("No-Such-Font.ttf",))
    plain = pictures._font("a red circle", 12)
    assert plain.getname() == ImageFont.load_default(size=12).getname()
    assert pictures._font("äöü красный", 12).getname() == plain.getname()
    assert pictures._font("", 12).getname() == plain.getname()

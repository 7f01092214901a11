"""Pictures that a visitor sends: what is opened, and what is refused in a line."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalle1.web.limits import PageLimits
from dalle1.web.uploads import (
    JPEG_WIDTH,
    data_url,
    lossless_url,
    open_picture,
    preview_url,
    read_data_url,
)
from tests.web.conftest import PAGE
from tests.web.pictures import BAD, picture


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp"])
def test_usual_pictures_are_opened(kind: str) -> None:
    """A format of cameras, phones or drawing programs that is taken for damage."""
    image = open_picture(picture(16, 16, "red", kind), (8, 8), PAGE)
    assert image.size == (8, 8) and image.mode == "RGB"
    red, green, blue = image.getpixel((4, 4))
    assert red > 240 and green < 16 and blue < 16


def test_a_picture_of_the_models_size_stays_as_it_is() -> None:
    """Rows that are kept and were scaled, so that they are not those of the picture."""
    colors = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    opened = open_picture(lossless_url(Image.fromarray(colors)), (8, 8), PAGE)
    np.testing.assert_array_equal(np.asarray(opened), colors)


def test_the_middle_of_another_shape_is_taken() -> None:
    """A wide picture that is squeezed into a square."""
    wide = Image.new("RGB", (60, 20), "red")
    wide.paste("blue", (20, 0, 40, 20))
    image = open_picture(lossless_url(wide), (8, 8), PAGE)
    assert image.getpixel((4, 4))[2] > 200 and image.getpixel((1, 4))[2] > 200


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_refused_in_a_line(name: str) -> None:
    """A path that is opened, a bomb that takes the memory, an error without a line."""
    url, word = BAD[name]
    with pytest.raises(ValueError, match=rf"^picture: .*{re.escape(word)}") as error:
        open_picture(url, (8, 8), PAGE)
    assert "\n" not in str(error.value)


def test_the_limit_of_pixels_is_the_pages_own() -> None:
    """A picture just within the limit that is refused, or one beyond it that is decoded."""
    limits = PageLimits(upload_pixels=100)
    open_picture(picture(10, 10), (8, 8), limits)
    with pytest.raises(ValueError, match="at most 100"):
        open_picture(picture(10, 11), (8, 8), limits)


@pytest.mark.parametrize("url", [None, 3, b"data:", ["data:"], ""])
def test_what_is_no_text_is_refused(url: Any) -> None:
    """An attribute of a text asked of what a program sends in its place."""
    with pytest.raises(ValueError, match="expected an uploaded image"):
        read_data_url(url, PAGE)


def test_previews_take_few_bytes() -> None:
    """Previews of large images that are PNGs of megabytes; small ones whose pixels are blurred."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    large, small = Image.fromarray(noise), Image.fromarray(noise[:JPEG_WIDTH, :JPEG_WIDTH])
    assert preview_url(large).startswith("data:image/jpeg")
    found = np.asarray(open_picture(preview_url(small), small.size, PageLimits()))
    np.testing.assert_array_equal(found, noise[:JPEG_WIDTH, :JPEG_WIDTH])


def test_data_urls_are_read_back() -> None:
    """Bytes that another length or alphabet of base 64 changes."""
    for length in range(70):
        data = bytes(range(200, 200 + length)) if length < 56 else bytes(length)
        assert read_data_url(data_url(data), PAGE) == data

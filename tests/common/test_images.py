"""Pixels to tensors and back; contact sheets: letters of any script that a system has fonts for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from dalle1.common import images
from dalle1.common.images import (
    contact_sheet,
    to_pil,
    to_tensor,
    to_uint8,
)


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
    monkeypatch.setattr(images, "FONTS", ("No-Such-Font.ttf",))
    plain = images._font("a red circle", 12)
    assert plain.getname() == ImageFont.load_default(size=12).getname()
    assert images._font("äöü красный", 12).getname() == plain.getname()
    assert images._font("", 12).getname() == plain.getname()


def test_pixels_to_tensors_and_back() -> None:
    """Values that are cut rather than rounded, that wrap around, or channels in another order."""
    pixels = np.arange(2 * 128 * 3, dtype=np.int64).reshape(2, 128, 3).astype(np.uint8)
    pixels[0, 1] = (255, 0, 7)
    tensor = to_tensor(pixels)
    assert tensor.shape == (3, 2, 128) and tensor.dtype == torch.float32
    assert tensor[:, 0, 1].tolist() == pytest.approx([1, 0, 7 / 255])
    assert np.array_equal(np.asarray(to_pil(tensor)), pixels)
    assert torch.equal(to_tensor(Image.fromarray(pixels)), tensor)
    odd = torch.tensor([-0.1, 0.499 / 255, 0.501 / 255, 254.6 / 255, 1.1])
    assert to_uint8(odd).tolist() == [0, 0, 1, 255, 255]


def test_sheet_in_two_groups() -> None:
    """Columns of the second group under the first one's title, or images that overlap."""
    colors = ["red", "blue", "lime"]
    row = [Image.new("RGB", (64, 64), color) for color in colors]
    sheet = np.asarray(contact_sheet([row], ["a"], ("one", "two"), columns_before_gap=1))
    found = [np.flatnonzero((sheet[40] == np.asarray(image)[0, 0]).all(-1)) for image in row]
    assert [len(x) for x in found] == [64, 64, 64]
    first, second, third = (int(x[0]) for x in found)
    assert second - first > third - second > 64
    text = (sheet[:22].min(axis=(0, 2)) < 128).nonzero()[0]
    assert first <= text[0] < second <= text[text >= second][0] < third
    with pytest.raises(ValueError, match="1 rows of images, 2 captions"):
        contact_sheet([row], ["a", "b"])

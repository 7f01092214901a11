"""Image files under our limit of pixels rather than PIL's, which is the program's own."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError, features

from dalle1.commands import rank, sample
from dalle1.common.image_files import TooManyPixels, open_encoded, open_image
from dalle1.data.transforms import FORMATS, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
SAVED: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95},
    "progressive JPEG": {"progressive": True},
    "MPO": {"save_all": True, "append_images": [Image.fromarray(PIXELS[:9, :9])]},
    "WEBP": {"lossless": True},
    "animated WEBP": {"save_all": True, "append_images": [Image.fromarray(PIXELS)]},
    "GIF": {},
    "GIF that is disposed of": {
        "save_all": True,
        "append_images": [Image.fromarray(PIXELS[::-1])],
        "disposal": 2,
    },
    "BMP": {},
    "TIFF": {},
    "packed TIFF": {"compression": "tiff_lzw"},
}


def saved(name: str) -> bytes:
    kind = next(word for word in name.split() if word in (*FORMATS, "MPO"))
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, **SAVED[name])
    return buffer.getvalue()


@pytest.mark.parametrize("limit", [479, 240, 100, 1])
@pytest.mark.parametrize("name", SAVED)
def test_our_limit_counts_and_not_pils(
    name: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`max_pixels` above PIL's own limit that does nothing, in one format or another: refused
    when opened, when decoded, or with a warning for each; PIL's limit changed for the program."""
    data = saved(name)
    if "TIFF" in name and "packed" in name and not features.check("libtiff"):
        pytest.skip("this Pillow has no libtiff")
    with Image.open(io.BytesIO(data)) as opened:
        wanted, kind = np.asarray(opened.convert("RGB")), opened.format
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ours in (480, 10**12, None):
            assert np.array_equal(read_image(data, ours), wanted)
            with open_encoded(data, ours) as image:
                assert image.format == kind and isinstance(image, Image.Image)
        with pytest.raises(TooManyPixels, match="24 x 20 pixels: expected at most 479"):
            open_encoded(data, 479)
    assert limit == Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises((Image.DecompressionBombError, Image.DecompressionBombWarning)):
            Image.open(io.BytesIO(data)).load()  # as before


def test_gif_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame larger than the canvas, which the plugin compares with PIL's limit by itself."""
    data = saved("GIF")
    small = data[:6] + b"\2\0\2\0" + data[10:]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_image(small, 480).shape == (20, 24, 3)
    with pytest.raises(TooManyPixels):
        open_encoded(small, 479)


def test_a_users_own_image_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback of PIL's for a panorama or a map that is given to `dalle1 rank`."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for i, name in enumerate(SAVED):
        path = tmp_path / str(i)
        path.write_bytes(saved(name))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert open_image(path).size == (24, 20)


@pytest.mark.parametrize("content", [b"", b"no image", saved("PNG")[:60], saved("WEBP")[:60], None])
def test_an_image_that_cannot_be_read_is_named(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, or a line that does not say which of the images it is."""
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
        with pytest.raises((UnidentifiedImageError, OSError, ValueError)):
            open_encoded(content).load()
    with pytest.raises(ValueError, match=r"^image .*x\.png: cannot be read"):
        open_image(path)
    assert rank.main(["a cat", str(path), "--model", str(tmp_path)]) == 2
    assert sample.main(["a cat", "--image", str(path), "--model", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith("error: ") for line in said)

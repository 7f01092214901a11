"""What people hand in as images: of any kind, one or many, or refused in one line."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle1.common.image_inputs import image_batches, read_images
from dalle1.common.images import to_tensor

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
TENSOR = to_tensor(PIXELS)
GRAY = PIXELS[..., 0]
OPAQUE = np.concatenate([PIXELS, np.full((5, 7, 1), 255, np.uint8)], axis=-1)
READ_ONLY = (PIXELS / 255).astype(np.float32)
READ_ONLY.flags.writeable = False


def floats(images: Any) -> Tensor:
    return torch.cat(list(image_batches(read_images(images))))


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(PIXELS),
        [Image.fromarray(PIXELS)],
        PIXELS,
        PIXELS[None],
        [PIXELS],
        PIXELS[::-1][::-1],
        OPAQUE,
        PIXELS / 255,
        (PIXELS / 255).astype(np.float32),
        (PIXELS / 255).astype(">f4"),
        (OPAQUE / 255)[None],
        READ_ONLY,
        TENSOR,
        TENSOR[None],
        (TENSOR,),
        [TENSOR[None]],
        TENSOR.double(),
        TENSOR.clone().requires_grad_(),
        iter([TENSOR]),
        np.array([Image.fromarray(PIXELS), None], dtype=object)[:1],
    ],
)
def test_an_image_of_any_kind(image: Any) -> None:
    """An array, a tensor or a single image that raises AttributeError, or is turned around."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of an array that cannot be written
        found = floats(image)
    assert found.shape == (1, 3, 5, 7) and found.dtype == torch.float32
    torch.testing.assert_close(found[0], TENSOR)
    assert not found.requires_grad


@pytest.mark.parametrize(
    "image", [GRAY, GRAY[..., None], GRAY[None, ..., None], GRAY / 255, TENSOR[0], TENSOR[:1],
              TENSOR[None, :1], Image.fromarray(GRAY), Image.fromarray(GRAY).convert("F"),
              Image.fromarray((GRAY / 255).astype(np.float32)), [GRAY], [TENSOR[:1]]]
)  # fmt: skip
def test_gray_pixels(image: Any) -> None:
    """Gray pixels that are refused, or become one of three channels; floats in [0, 1] that PIL
    holds taken for black."""
    torch.testing.assert_close(floats(image)[0], TENSOR[:1].expand(3, -1, -1))


def test_opacity_is_laid_on_white() -> None:
    """The fourth channel of an array taken for a color, or another background than a file's."""
    clear = OPAQUE.copy()
    clear[..., 3] = PIXELS[..., 1]
    torch.testing.assert_close(floats(clear), floats(clear / 255), rtol=0, atol=0.6 / 255)
    clear[..., 3] = 0
    assert bool((floats(clear) == 1).all() and (floats(clear / 255) == 1).all())


def test_files_and_many_images(tmp_path: Path) -> None:
    """A path that is read letter by letter; images of several sizes in another order."""
    path = tmp_path / "ü 1.png"
    Image.fromarray(PIXELS).save(path)
    for image in (path, str(path), np.str_(path), [path], np.array([str(path)])):
        assert torch.equal(floats(image)[0], TENSOR)
    mixed: list[Any] = [path, TENSOR, PIXELS[:3], GRAY, str(path), PIXELS[:3] / 255]
    batches = list(image_batches(read_images(mixed)))
    assert [list(batch.shape) for batch in batches] == [
        [2, 3, 5, 7], [1, 3, 3, 7], [2, 3, 5, 7], [1, 3, 3, 7],
    ]  # fmt: skip
    assert torch.equal(batches[2][1], TENSOR)
    many = torch.rand(150, 3, 2, 2)
    assert torch.equal(floats(many), many) and torch.equal(floats(list(many)), many)
    assert len(read_images(np.stack([PIXELS] * 4))) == 4


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "images: expected a PIL image, .*got NoneType"),
        (3, "got int"),
        (b"x.png", "got bytes"),
        ({"a": PIXELS}, "got dict"),
        ([], "images: expected at least one"),
        (np.zeros((0, 5, 7, 3), np.uint8), "images: expected at least one"),
        (torch.zeros(0, 3, 5, 7), "images: expected at least one"),
        ([PIXELS, None], r"images\[1\]: .*got NoneType"),
        ([[Image.fromarray(PIXELS)]], r"images\[0\]: .*got list"),  # Result.images
        ([torch.rand(2, 3, 5, 7)], r"images\[0\]: expected one image .*, got 2"),
        ("nowhere.png", "image nowhere.png: cannot be read"),
        ([Path("gone/x.jpg")], "image gone/x.jpg: cannot be read"),
        (PIXELS.astype(np.int64), "got an array of int64; make it uint8"),
        (PIXELS.astype(np.uint16), "got an array of uint16"),
        (PIXELS > 9, "got an array of bool"),
        (PIXELS.astype("S"), "got an array of"),
        (np.moveaxis(PIXELS, -1, 0), r"got an array \[3, 5, 7\]; in arrays the channels come last"),
        (PIXELS[:, :, :2], r"got an array \[5, 7, 2\]"),
        (PIXELS[None, None], r"got an array \[1, 1, 5, 7, 3\]"),
        (np.array(3.0), r"got an array \[\]"),
        (PIXELS[:0], r"got an array \[0, 7, 3\]"),
        (torch.rand(5, 7, 3), r"got a tensor \[5, 7, 3\]; in tensors the channels come first"),
        (torch.rand(2, 5, 7, 3), r"got a tensor \[2, 5, 7, 3\]; in tensors"),
        (torch.rand(2, 4, 5, 7), r"got a tensor \[2, 4, 5, 7\]"),
        (torch.rand(3), r"got a tensor \[3\]"),
        (torch.from_numpy(PIXELS).movedim(-1, 0), "got torch.uint8 .*divide by 255"),
        (2 * TENSOR - 1, r"images: expected floats .*from \[-1, 1\]"),
        (255 * TENSOR, r"from \[0, 255\]"),
        (TENSOR + np.nan, "got NaN"),
        (PIXELS / 127.5 - 1, r"from \[-1, 1\]"),
        (PIXELS.astype(np.float32), r"from \[0, 255\]"),
        ([TENSOR, 9 * TENSOR], r"images\[1\]: expected floats"),
        (Image.new("RGB", (0, 5)), "got 0x5 pixels"),
        (TENSOR.to_sparse(), r"images: expected floats .*got torch.sparse_coo"),
        (TENSOR.to("meta"), "got a tensor without values"),
        (memoryview(PIXELS), "got memoryview"),
        (Image.fromarray((2 * PIXELS[..., 0] / 255 - 1).astype(np.float32)), r"from \[-1, 1\]"),
        (Image.fromarray(np.full((5, 7), np.nan, np.float32)), "got NaN"),
        (Image.fromarray(np.full((5, 7), 65535, np.float32)), r"got values in \[65535, 65535\]"),
    ],
)
def test_what_is_no_image_is_refused(found: Any, message: str) -> None:
    """Something else that raises AttributeError, or pixels of another range that are clamped."""
    with pytest.raises(ValueError, match=message):
        read_images(found)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    """A decoder's own error, or one that does not name the file."""
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    Image.fromarray(PIXELS).resize((70, 50)).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    for name in ("text.png", "empty.jpg", "cut.png", "."):
        with pytest.raises(ValueError, match=rf"image .*{name}: cannot be read"):
            read_images([PIXELS, tmp_path / name])
    closed = Image.open(tmp_path / "cut.png")
    with pytest.raises(ValueError, match=r"images\[0\]: cannot be read"):
        read_images([closed])


def test_a_file_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `~` that no shell has expanded."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    assert torch.equal(floats("~/x.png")[0], TENSOR)

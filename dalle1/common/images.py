"""Images of any kind as RGB, pixels as tensors and back, contact sheets of images with captions.

Dimensions: b images, c channels, H W image height and width.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import groupby
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageDraw, ImageFont
from torch import Tensor

from dalle1.common.files import expand_home
from dvae.images import check_images

# What a person may hand in as an image; see `read_images`.
ImageLike = Image.Image | str | os.PathLike[str] | np.ndarray | Tensor
CHANNELS = (1, 3, 4)  # gray, RGB, RGB and opacity
BATCH = 64  # images that are put together in one tensor
# Contact sheets, in pixels. Narrower images are enlarged, each pixel to a square.
MIN_WIDTH = 64
GAP = 4
CAPTION_WIDTH = 190
TITLE_HEIGHT = 22
# Where PIL's own font lacks letters: what systems have, by the scripts that it covers.
FONTS = (
    *("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc"),
    *("NotoSans-Regular.ttf", "NotoSansArabic-Regular.ttf", "NotoSansDevanagari-Regular.ttf"),
)
TRANSPOSES = {  # what an EXIF orientation asks for
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as a viewer shows it, in mode RGB.

    It is turned as its EXIF says and laid on white where it is transparent; 16 bits are scaled to
    8; of several frames it is the first. An image that needs nothing of this is returned itself.
    """
    image.load()  # some formats have the EXIF behind the pixels
    transpose = TRANSPOSES.get(_orientation(image))
    if transpose is not None:
        kept: dict[Any, Any] = {k: v for k, v in image.info.items() if k == "transparency"}
        image = image.transpose(transpose)
        image.info = kept  # nothing that says to turn it again
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits of gray; PIL's conversion would clip at 255
        gray = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.round(gray / 257).clip(0, 255).astype(np.uint8))
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever rubbish its EXIF is, the pixels are good
        return None


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """An image file as RGB; ValueError that names it if it cannot be read."""
    try:
        with Image.open(expand_home(os.fspath(path))) as image:
            return to_rgb(image)
    except Exception as error:  # decoders raise whatever they like
        raise ValueError(f"image {path}: cannot be read: {error}") from error


def read_images(
    images: ImageLike | Iterable[ImageLike], name: str = "images"
) -> list[Image.Image | Tensor]:
    """What a person hands in as one or several images.

    Args:
        images: PIL images of any mode and size; image files; NumPy arrays [H, W], [H, W, c] or
            [b, H, W, c] of uint8, or of floats in [0, 1]; tensors [H, W], [c, H, W] or
            [b, c, H, W] of floats in [0, 1]. One of these, or a list of single ones. c is 3, or 1
            for gray; an array may also have 4, of which the last is opacity.
        name: of the argument, for messages.

    Returns:
        At least one: images of 8 bits as PIL images in mode RGB, others as float32 [3, H, W].

    Raises:
        ValueError: there are none, a file cannot be read, or something is no image.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind in "OU":  # of paths, say
        images = images.tolist()
    if isinstance(images, Image.Image | str | os.PathLike | np.ndarray | Tensor):
        found = _read(images, name)
    elif isinstance(images, Iterable) and not isinstance(images, bytes | Mapping | Set):
        found = [_read_one(image, f"{name}[{i}]") for i, image in enumerate(images)]
    else:
        raise _no_image(images, name)
    if not found:
        raise ValueError(f"{name}: expected at least one")
    return found


def _read_one(image: object, name: str) -> Image.Image | Tensor:
    found = _read(image, name)
    if len(found) != 1:
        raise ValueError(f"{name}: expected one image in each place of a list, got {len(found)}")
    return found[0]


def _read(images: object, name: str) -> list[Image.Image | Tensor]:
    if isinstance(images, Image.Image):
        if 0 in images.size:
            raise _no_image(images, name, f"{images.width}x{images.height} pixels")
        try:
            return [to_rgb(images)]
        except Exception as error:  # a file that was opened, and closed, or is cut short
            raise ValueError(f"{name}: cannot be read: {error}") from error
    if isinstance(images, str | os.PathLike):
        return [open_image(images)]
    if isinstance(images, np.ndarray):
        return _read_array(images, name)
    if isinstance(images, Tensor):
        return list(_read_floats(images, name).unbind())
    raise _no_image(images, name)


def _read_array(images: np.ndarray, name: str) -> list[Image.Image | Tensor]:
    """Images of an array [H, W], [H, W, c] or [b, H, W, c]."""
    shaped = images[..., None] if images.ndim == 2 else images
    shaped = shaped[None] if shaped.ndim == 3 else shaped
    floats = images.dtype.kind == "f"
    if not (floats or images.dtype == np.uint8):
        what = f"an array of {images.dtype}"
        raise _no_image(images, name, f"{what}; make it uint8, or floats in [0, 1]")
    if shaped.ndim != 4 or shaped.shape[-1] not in CHANNELS or 0 in shaped.shape[1:]:
        first = images.ndim > 2 and images.shape[-3] in CHANNELS
        hint = "; in arrays the channels come last: use np.moveaxis(x, -3, -1)" if first else ""
        raise _no_image(images, name, f"an array {list(images.shape)}{hint}")
    if not floats:
        squeezed = shaped[..., 0] if shaped.shape[-1] == 1 else shaped
        return [to_rgb(Image.fromarray(np.ascontiguousarray(image))) for image in squeezed]
    pixels = torch.from_numpy(np.ascontiguousarray(shaped, np.float32))
    pixels = rearrange(pixels, "b h w c -> b c h w")
    check_images(pixels, pixels.shape[1], name)
    if pixels.shape[1] == 4:
        opacity = pixels[:, 3:]
        pixels = pixels[:, :3] * opacity + (1 - opacity)  # on white, as `to_rgb`
    return list(_read_floats(pixels, name).unbind())


def _read_floats(images: Tensor, name: str) -> Tensor:
    """float32 [b, 3, H, W] of a tensor [H, W], [c, H, W] or [b, c, H, W]."""
    shaped = images[None] if images.ndim == 2 else images
    shaped = shaped[None] if shaped.ndim == 3 else shaped
    if shaped.ndim != 4 or shaped.shape[1] not in (1, 3) or 0 in shaped.shape[1:]:
        last = images.ndim > 2 and images.shape[-1] in CHANNELS
        hint = "; in tensors the channels come first: use x.movedim(-1, -3)" if last else ""
        raise _no_image(images, name, f"a tensor {list(images.shape)}{hint}")
    check_images(shaped, shaped.shape[1], name)
    return shaped.detach().float().expand(-1, 3, -1, -1)


def _no_image(images: object, name: str, what: str = "") -> ValueError:
    return ValueError(
        f"{name}: expected a PIL image, a file, an array, a tensor or a list of these, got "
        f"{what or type(images).__name__}"
    )


def image_batches(images: Sequence[Image.Image | Tensor]) -> Iterator[Tensor]:
    """What `read_images` gave, as float32 [b, 3, H, W] in [0, 1], in the same order.

    Neighbors of one size are put together, at most BATCH of them.
    """

    def size(i: int) -> tuple[object, ...]:
        image = images[i]
        if isinstance(image, Tensor):
            return (*image.shape[1:], image.device)
        return (image.height, image.width, torch.device("cpu"))

    for _, same in groupby(range(len(images)), size):
        numbers = list(same)
        for first in range(0, len(numbers), BATCH):
            some = [images[i] for i in numbers[first : first + BATCH]]
            yield torch.stack([x if isinstance(x, Tensor) else to_tensor(x) for x in some])


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """Pixels as float32 [3, H, W] in [0, 1]; the inverse of `to_pil`.

    Args:
        image: a PIL image of any mode, or uint8 [H, W, 3].
    """
    pixels = np.array(to_rgb(image)) if isinstance(image, Image.Image) else image
    return rearrange(torch.from_numpy(np.ascontiguousarray(pixels)), "h w c -> c h w").float() / 255


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [0, 1], of any shape, as uint8; rounded, and clamped where they lie outside."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """Floats [3, H, W] in [0, 1], on the CPU, as an 8-bit RGB image; the inverse of `to_tensor`."""
    return Image.fromarray(rearrange(to_uint8(image), "c h w -> h w c").numpy())


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    titles: Sequence[str] = (),
    columns_before_gap: int = 0,
) -> Image.Image:
    """A row of images for each caption, the caption on the left.

    Args:
        rows: images of one size.
        captions: one of each row.
        titles: texts above the columns, one each; or, where `columns_before_gap` splits the
            columns in two groups, one above each group.
        columns_before_gap: columns of the first group; 0: there is one group.

    Raises:
        ValueError: there are no images, or not as many rows as captions.
    """
    if len(rows) != len(captions) or not rows or not rows[0]:
        raise ValueError(f"contact_sheet: {len(rows)} rows of images, {len(captions)} captions")
    width, height = rows[0][0].size
    zoom = max(1, -(-MIN_WIDTH // width))
    width, height = width * zoom, height * zoom
    columns = max(len(row) for row in rows)
    group_gap = 3 * GAP if columns_before_gap else 0
    lefts = [
        CAPTION_WIDTH + i * (width + GAP) + (group_gap if i >= columns_before_gap else 0)
        for i in range(columns)
    ]
    top = TITLE_HEIGHT if titles else GAP
    right = CAPTION_WIDTH + columns * (width + GAP) + group_gap
    sheet = Image.new("RGB", (right, top + len(rows) * (height + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    font = _font("".join(titles), 12)
    titled = (0, columns_before_gap) if columns_before_gap else range(columns)
    for title, column in zip(titles, titled, strict=False):
        draw.text((lefts[column], 4), title, fill="black", font=font)
    for i, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        y = top + i * (height + GAP)
        _draw_caption(draw, caption, y, height)
        for left, image in zip(lefts, row, strict=False):
            sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, y))
    return sheet


def _draw_caption(draw: ImageDraw.ImageDraw, caption: str, y: int, height: int) -> None:
    """A caption in its column, wrapped and cut to the height of the row that begins at y."""
    lines = textwrap.wrap(caption, 30, max_lines=max(1, height // 14), placeholder=" ...")
    font = _font(caption, 12)
    draw.text((GAP, y + 2), "\n".join(lines), fill="black", font=font, spacing=2)


def _font(text: str, size: int) -> Any:
    """The font that has the most of a text's letters; PIL's own where it has all of them."""
    letters = {letter for letter in text if letter.isprintable()}
    best, fewest = ImageFont.load_default(size=size), len(letters) + 1
    for name in (None, *FONTS):
        try:
            font: Any = best if name is None else ImageFont.truetype(name, size)
        except OSError:  # not on this system
            continue
        missing_box = _bitmap(font, "\U0010ffff")  # what a font draws for a letter that it lacks
        missing = sum(_bitmap(font, letter) == missing_box for letter in letters)
        if missing < fewest:
            best, fewest = font, missing
        if not missing:
            break
    return best


def _bitmap(font: Any, letter: str) -> tuple[Any, bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)

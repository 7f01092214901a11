"""Images of any kind as RGB, pixels as tensors and back, contact sheets of images with captions.

Dimensions: H W image height and width.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageDraw, ImageFont
from torch import Tensor

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

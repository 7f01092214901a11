"""Images of any mode as RGB, pixels as tensors, contact sheets of images with their captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST = 64  # pixels; smaller images are shown enlarged, each pixel a square
GAP = 4
CAPTION_WIDTH = 190
# Where PIL's own font lacks letters: what systems have, by the scripts that it covers.
FONTS = (
    *("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc"),
    *("NotoSans-Regular.ttf", "NotoSansArabic-Regular.ttf", "NotoSansDevanagari-Regular.ttf"),
)
TURNS = {  # by the EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as a viewer shows it, in mode RGB: turned as its EXIF says, transparency laid on
    white, 16 bits scaled to 8, the first frame of several. The same image where that is all."""
    image.load()  # some formats have the EXIF behind the pixels
    turn = TURNS.get(_orientation(image))
    if turn is not None:
        kept: dict[Any, Any] = {k: v for k, v in image.info.items() if k == "transparency"}
        image = image.transpose(turn)
        image.info = kept  # nothing that says to turn it again
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits of grey; PIL's conversion would clip at 255
        grey = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.round(grey / 257).clip(0, 255).astype(np.uint8))
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever rubbish its EXIF is, the pixels are good
        return None


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """Pixels, float32 [3, H, W] in [0, 1], of an image of any mode, or of uint8 [H, W, 3]."""
    pixels = np.array(to_rgb(image)) if isinstance(image, Image.Image) else image
    return rearrange(torch.from_numpy(np.ascontiguousarray(pixels)), "h w c -> c h w").float() / 255


def to_uint8(images: Tensor) -> Tensor:
    """Pixels in [0, 1] as uint8, rounded; any shape."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """Pixels [3, H, W] in [0, 1] as an 8-bit RGB image."""
    return Image.fromarray(rearrange(to_uint8(image), "c h w -> h w c").numpy())


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    titles: Sequence[str] = (),
    columns_before_gap: int = 0,
) -> Image.Image:
    """A row of images for each caption, the caption on the left.

    titles: texts above the columns, one each; or, where `columns_before_gap` splits the columns in
    two groups, one above each group.
    """
    if len(rows) != len(captions) or not rows or not rows[0]:
        raise ValueError(f"contact_sheet: {len(rows)} rows of images, {len(captions)} captions")
    width, height = rows[0][0].size
    zoom = max(1, -(-SMALLEST // width))
    width, height = width * zoom, height * zoom
    columns = max(len(row) for row in rows)
    split = 3 * GAP if columns_before_gap else 0
    top = 22 if titles else GAP
    sheet = Image.new(
        "RGB",
        (CAPTION_WIDTH + columns * (width + GAP) + split, top + len(rows) * (height + GAP)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    font = _font("".join(titles), 12)

    def left(column: int) -> int:
        gap = split if columns_before_gap and column >= columns_before_gap else 0
        return CAPTION_WIDTH + column * (width + GAP) + gap

    starts = (0, columns_before_gap) if columns_before_gap else range(columns)
    for title, column in zip(titles, starts, strict=False):
        draw.text((left(column), 4), title, fill="black", font=font)
    for i, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        y = top + i * (height + GAP)
        lines = textwrap.wrap(caption, 30, max_lines=max(1, height // 14), placeholder=" ...")
        own = _font(caption, 12)
        draw.text((GAP, y + 2), "\n".join(lines), fill="black", font=own, spacing=2)
        for column, image in enumerate(row):
            shown = image.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(shown, (left(column), y))
    return sheet


def _font(text: str, size: int) -> Any:
    """The font that has the most of a text's letters; PIL's own where it has all of them."""
    letters = {letter for letter in text if letter.isprintable()}
    best, fewest = ImageFont.load_default(size=size), len(letters) + 1
    for name in (None, *FONTS):
        try:
            font: Any = best if name is None else ImageFont.truetype(name, size)
        except OSError:  # not on this system
            continue
        unknown = _drawn(font, "\U0010ffff")  # the box that stands for what a font lacks
        lacking = sum(_drawn(font, letter) == unknown for letter in letters)
        if lacking < fewest:
            best, fewest = font, lacking
        if not lacking:
            break
    return best


def _drawn(font: Any, letter: str) -> tuple[Any, bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)

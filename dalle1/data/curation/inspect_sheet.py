"""A contact sheet of the samples that an inspection has drawn."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageOps

from dalle1.common.images import contact_sheet

SIDE = 160  # pixels of an image
SHEET_ROWS = 8


def thumbnail(image: Image.Image) -> Image.Image:
    """All of an image in a square, on gray."""
    return ImageOps.pad(image, (SIDE, SIDE), color=(200, 200, 200))


def draw_contact_sheet(images: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """A contact sheet of a report's images, numbered from 1, their captions on the left.

    Raises:
        ValueError: there are none.
    """
    if not images:
        raise ValueError("a contact sheet needs images, and no good sample was found")
    columns = []
    for start in range(0, len(images), SHEET_ROWS):
        part = images[start : start + SHEET_ROWS]
        captions = [f"{number}: {text}" for number, (_, text) in enumerate(part, start + 1)]
        columns.append(contact_sheet([[image] for image, _ in part], captions))
    size = (sum(column.width for column in columns), max(column.height for column in columns))
    sheet = Image.new("RGB", size, "white")
    for i, column in enumerate(columns):
        sheet.paste(column, (i * columns[0].width, 0))
    return sheet

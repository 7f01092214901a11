"""The rows of a source of pairs: a folder of images and captions, or a table of paths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle1.common.files import expand_home, name_text
from dalle1.data.curation.tables import TABLES, TableRow, read_table
from dalle1.data.samples import NO_CAPTION, NO_IMAGE
from dalle1.data.shards.names import read_folder

SHOWN = 200  # characters of a value, in messages
SOURCES = f"a folder of images with a .txt for each, or a table ({', '.join(TABLES)})"
SHARDS = "shards and other addresses need no packing: training and the tools take them as `data`"


@dataclass(frozen=True)
class Row:
    """One pair of the source, not read yet."""

    number: int
    name: str  # for messages
    image: Path | None
    caption: Any  # the text, or the Path of a file that holds it
    columns: dict[str, Any]  # what the json keeps
    fault: str = ""  # why it cannot be used, where that is known already


def read_rows(source: Path, image_column: str, caption_column: str) -> Iterator[Row]:
    """The pairs of a folder or a table in their order, numbered from 0; no image is opened.

    Raises:
        ValueError: a source that cannot be read, or columns that are not there.
    """
    if source.is_dir():
        return _rows_of_folder(source)
    if not source.is_file():
        raise ValueError(f"source: {str(source)!r} does not exist; give {SOURCES}; {SHARDS}")
    if source.suffix.lower() not in TABLES:
        raise ValueError(f"source: {str(source)!r} must be {SOURCES}; {SHARDS}")
    columns, rows = read_table(source)
    for setting, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column not in columns:
            there = ", ".join(map(repr, columns))[: 5 * SHOWN] or "none"
            raise ValueError(
                f"{setting}: {column!r} is no column of {str(source)!r}; its columns: {there}"
            )
    return _rows_of_table(source.parent, rows, image_column, caption_column)


def _rows_of_folder(folder: Path) -> Iterator[Row]:
    found = read_folder(folder)
    for number, (image, text) in enumerate(found.images.items()):
        name = name_text(image.relative_to(folder))
        yield Row(number, repr(name), image, text, {"path": name}, "" if text else NO_CAPTION)
    for number, caption in enumerate(found.lonely, len(found.images)):
        name = name_text(caption.relative_to(folder))
        yield Row(number, repr(name), None, caption, {}, NO_IMAGE)


def _rows_of_table(
    folder: Path, rows: Iterator[TableRow], image_column: str, caption_column: str
) -> Iterator[Row]:
    for number, row in enumerate(rows):
        path = row.values.get(image_column)
        fault = row.fault
        if not fault and (not isinstance(path, str) or not path.strip()):
            fault = "no path"
        image = None if fault else folder / expand_home(str(path))
        name = f"row {number}, {row.detail or repr(path)[:SHOWN]}"
        yield Row(number, name, image, row.values.get(caption_column), row.values, fault)

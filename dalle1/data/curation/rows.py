"""The rows of a source of pairs: a folder of images and captions, or a table of paths."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dalle1.data.samples import NO_CAPTION, NO_IMAGE
from dalle1.data.shards.names import read_folder

TABLES = (".csv", ".tsv", ".parquet")


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
        raise ValueError(f"source: {str(source)!r} does not exist")
    if source.suffix.lower() not in TABLES:
        raise ValueError(
            f"source: {str(source)!r} must be a folder of images with a .txt for each, or a "
            f"table ({', '.join(TABLES)})"
        )
    rows = _rows_of_parquet if source.suffix.lower() == ".parquet" else _rows_of_csv
    return _rows_of_table(source, rows(source), image_column, caption_column)


def _rows_of_folder(folder: Path) -> Iterator[Row]:
    found = read_folder(folder)
    for number, (image, text) in enumerate(found.images.items()):
        name = image.relative_to(folder).as_posix()
        yield Row(number, repr(name), image, text, {"path": name}, "" if text else NO_CAPTION)
    for number, caption in enumerate(found.lonely, len(found.images)):
        name = caption.relative_to(folder).as_posix()
        yield Row(number, repr(name), None, caption, {}, NO_IMAGE)


def _rows_of_table(
    source: Path, rows: Iterator[dict[str, Any]], image_column: str, caption_column: str
) -> Iterator[Row]:
    columns = next(rows)  # the first says what there is
    for setting, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column not in columns:
            there = ", ".join(map(repr, columns)) or "none"
            raise ValueError(
                f"{setting}: {column!r} is no column of {str(source)!r}; its columns: {there}"
            )
    for number, row in enumerate(rows):
        path = row.get(image_column)
        fault = ""
        if len(row) != len(columns):
            fault = "row with more or fewer values than columns"
        elif not isinstance(path, str) or not path.strip():
            fault = "no path"
        image = None if fault else source.parent / str(path)
        yield Row(number, f"row {number}, {path!r}", image, row.get(caption_column), row, fault)


def _rows_of_csv(source: Path) -> Iterator[dict[str, Any]]:
    # utf-8-sig: spreadsheets put a mark in front, which would be part of the first column's name.
    with source.open(encoding="utf-8-sig", newline="") as file:
        dialect = "excel-tab" if source.suffix.lower() == ".tsv" else "excel"
        # Not strict, a lone quote would swallow the rows behind it without a word.
        table = csv.reader(file, dialect, strict=True)
        try:
            columns = next(table, [])
            if len(set(columns)) != len(columns):
                raise ValueError(f"source: {str(source)!r} has two columns of one name: {columns}")
            yield dict.fromkeys(columns)
            for values in table:
                if not values:  # an empty line
                    continue
                row: dict[Any, Any] = dict(zip(columns, values, strict=False))
                yield row if len(values) <= len(columns) else row | {None: values[len(columns) :]}
        except csv.Error as error:
            raise ValueError(
                f"source: {str(source)!r}, line {table.line_num}: {error} (values with separators, "
                "quotes or line ends stand in quotes, and quotes inside of them are doubled)"
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"source: {str(source)!r} is not UTF-8: {error}") from error


def _rows_of_parquet(source: Path) -> Iterator[dict[str, Any]]:
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(
            f"source: {str(source)!r} needs pyarrow: pip install 'dalle1[parquet]'"
        ) from error
    try:
        with parquet.ParquetFile(source) as file:
            yield dict.fromkeys(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (import_module("pyarrow").ArrowException, OSError) as error:
        raise ValueError(f"source: {str(source)!r} cannot be read: {error}") from error

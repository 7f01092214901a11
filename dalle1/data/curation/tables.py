"""The rows of a table: a .csv, .tsv or .parquet of any encoding, whatever single rows hold.

A row that cannot be read comes with its fault, and the rows behind it are read all the same.
"""

from __future__ import annotations

import codecs
import csv
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any, TextIO

TABLES = (".csv", ".tsv", ".parquet")
MAX_ROW = 2**24  # characters of a value or a line; a quote that is not closed swallows no more
BATCH = 128  # rows of a parquet at a time, as their values may be long
NO_CSV, RAGGED = "row that is no csv", "row with more or fewer values than columns"
NO_VALUES = "row that cannot be read"
QUOTES = (
    "values with separators, quotes or line ends stand in quotes, and quotes inside of them are "
    "doubled"
)
ENCODINGS = (  # by their marks; that of UTF-16 is the beginning of one of UTF-32
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Without a mark, by the zeros among the first four bytes: a header begins with ASCII.
ZEROS: dict[tuple[bool, ...], str] = {
    (False, True, False, True): "utf-16-le",
    (True, False, True, False): "utf-16-be",
    (False, True, True, True): "utf-32-le",
    (True, True, True, False): "utf-32-be",
}
_csv_limit = Lock()  # csv's limit is one number for the whole program


@dataclass(frozen=True)
class TableRow:
    """A row by column, or why it cannot be used."""

    values: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    detail: str = ""  # of the fault


def read_table(source: Path) -> tuple[list[str], Iterator[TableRow]]:
    """The columns of a table and its rows, in order.

    Raises:
        ValueError: it is no table, or has two columns of one name.
    """
    if source.suffix.lower() == ".parquet":
        columns, rows = _parquet(source)
    else:
        columns, rows = _csv(source)
    if len(set(columns)) != len(columns):
        twice = sorted({name for name in columns if columns.count(name) > 1})
        raise ValueError(f"source: {str(source)!r} has two columns of one name: {twice}")
    return columns, rows


# csv.


def _csv(source: Path) -> tuple[list[str], Iterator[TableRow]]:
    rows = _csv_rows(source)
    columns = next(rows).values["columns"]
    return columns, rows


def _csv_rows(source: Path) -> Iterator[TableRow]:
    """The first has the columns."""
    encoding = _encoding(source)
    # In UTF-8, what is none stays what it is: a file may be called so, and of a caption it is said.
    errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
    with source.open(encoding=encoding, errors=errors, newline="") as file:
        lines = _Lines(file)
        dialect = "excel-tab" if source.suffix.lower() == ".tsv" else "excel"
        # Not strict, a lone quote would swallow the rows behind it without a word.
        table = csv.reader(lines, dialect, strict=True)
        try:
            columns = _next(table) or []
        except csv.Error as error:
            raise ValueError(
                f"source: {str(source)!r}, line {lines.number}: {error} ({QUOTES})"
            ) from error
        yield TableRow({"columns": columns})
        while True:
            lines.begin()
            try:
                values = _next(table)
            except csv.Error as error:
                detail = f"line {lines.number}: {error} ({QUOTES})"
                lines.skip_one()
                yield TableRow({}, NO_CSV, detail)
                continue
            if values is None:
                return
            if not values:  # an empty line
                continue
            fault = "" if len(values) == len(columns) else RAGGED
            yield TableRow(dict(zip(columns, values, strict=False)), fault)


def _next(table: Any) -> list[str] | None:
    """The next row, whatever limit the program has for its own tables; None: there is none."""
    with _csv_limit:
        limit = csv.field_size_limit(MAX_ROW)
        try:
            row: list[str] | None = next(table, None)
        finally:
            csv.field_size_limit(limit)
    return row


class _Lines:
    """The lines of a table. After a row that is none, reading goes on with its second line: what a
    quote that is not closed has swallowed may be good rows."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._row: list[str] = []  # the lines of the row that is being read
        self._again: deque[str] = deque()
        self.number = 0  # of the last line, from 1

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._file.readline(MAX_ROW)
        if not line:
            raise StopIteration
        self.number += 1
        self._row.append(line)
        if len(line) == MAX_ROW and not _ended(line):
            while (rest := self._file.readline(MAX_ROW)) and not _ended(rest):
                pass
            raise csv.Error(f"a line of more than {MAX_ROW:,} characters")
        return line

    def begin(self) -> None:
        """A row begins with the next line."""
        self._row = []

    def skip_one(self) -> None:
        """All lines of the row but the first are read again."""
        self.number -= len(self._row) - 1
        self._again.extendleft(reversed(self._row[1:]))


def _ended(line: str) -> bool:
    return line.endswith(("\n", "\r"))


def _encoding(source: Path) -> str:
    with source.open("rb") as file:
        head = file.read(4)
    for mark, encoding in ENCODINGS:
        if head.startswith(mark):
            return encoding
    # utf-8-sig: spreadsheets put a mark in front, which would be part of the first column's name.
    return ZEROS.get(tuple(not byte for byte in head), "utf-8-sig")


# Parquet.


def _parquet(source: Path) -> tuple[list[str], Iterator[TableRow]]:
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(
            f"source: {str(source)!r} needs pyarrow: pip install 'dalle1[parquet]'"
        ) from error
    try:
        with parquet.ParquetFile(source) as file:
            columns = list(file.schema_arrow.names)
    except (import_module("pyarrow").ArrowException, OSError) as error:
        raise ValueError(f"source: {str(source)!r} cannot be read: {error}") from error
    return columns, _parquet_rows(source, parquet)


def _parquet_rows(source: Path, parquet: Any) -> Iterator[TableRow]:
    arrow: type[Exception] = import_module("pyarrow").ArrowException
    unreadable = (arrow, OSError, ValueError, OverflowError, MemoryError)
    with parquet.ParquetFile(source) as file:
        for group in range(file.num_row_groups):
            rest = file.metadata.row_group(group).num_rows
            batches = file.iter_batches(BATCH, row_groups=[group])
            while rest > 0:
                try:
                    batch = next(batches, None)
                except unreadable as error:  # a damaged part of the file
                    detail = " ".join(str(error).split()) or type(error).__name__
                    yield from (TableRow({}, NO_VALUES, detail) for _ in range(rest))
                    break
                if batch is None:
                    break
                rest -= batch.num_rows
                yield from _rows_of_batch(batch, unreadable)


def _rows_of_batch(batch: Any, unreadable: tuple[type[Exception], ...]) -> Iterator[TableRow]:
    try:
        yield from [TableRow(values) for values in batch.to_pylist()]
        return
    except unreadable:
        pass  # of a single value, perhaps
    for i in range(batch.num_rows):
        row = batch.slice(i, 1)
        try:
            yield TableRow({name: _value(row, name) for name in row.schema.names})
        except unreadable as error:
            yield TableRow({}, NO_VALUES, " ".join(str(error).split()) or type(error).__name__)


def _value(row: Any, name: str) -> Any:
    """A value, as a text where Python has nothing like it: nanoseconds, the year 30,000."""
    value = row.column(name)[0]
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        return value.cast("string").as_py()

"""Pictures and captions as WebDataset shards: from a folder of pairs, or from a table of paths.

A sample is `<key>.jpg` (or .png, .webp: what the bytes are), `<key>.txt` and `<key>.json`. Its key
is its running number in the source, so that keys are unique by construction and depend neither on
the shuffle nor on which rows are bad; the json says where the picture came from.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from dalle1.common.files import flush, replacing, saying_what_is_missing, size_text
from dalle1.data.samples import IMAGE_KEYS
from dalle1.data.shards.index import write_stats

# A camera's JPEG with a preview behind it is an MPO to PIL; any viewer shows it as a JPEG.
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
TABLES = (".csv", ".tsv", ".parquet")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Row:
    """One pair of the source, not read yet."""

    number: int
    name: str  # for messages
    picture: Path | None
    caption: Any  # the text, or the Path of a file that holds it
    columns: dict[str, Any]  # what the json keeps
    fault: str = ""  # why it cannot be used, where that is known already


@dataclass(frozen=True)
class Sample:
    """The files of a sample by name, in the order in which the shard has them."""

    files: dict[str, bytes]

    @property
    def size(self) -> int:
        """Bytes in the tar."""
        return sum(_in_tar(len(data)) for data in self.files.values())


@dataclass
class Packed:
    """What was packed and what was not."""

    shards: list[Path] = field(default_factory=list)
    samples: int = 0
    bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # rows by cause
    first: dict[str, str] = field(default_factory=dict)  # the first such row of each cause

    def faults(self) -> list[str]:
        """A line for each cause, the commonest first."""
        return [
            f"{count:,} x {cause} (first: {self.first[cause]})"
            for cause, count in self.skipped.most_common()
        ]


def pack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    shard_size: int = 1000,
    max_bytes: int = 10**9,
    image_column: str = "path",
    caption_column: str = "caption",
    seed: int | None = None,
    workers: int = 4,
    progress: bool = False,
) -> Packed:
    """Writes `000000.tar`, `000001.tar` ... of a folder of pairs or of a table into `out`.

    A folder is searched to any depth for pictures with a `.txt` of the same name beside each. A
    table is a .csv, .tsv or .parquet with a header; its paths are absolute or relative to it, and
    the json of a sample keeps the whole row. Pictures are copied byte for byte; captions become
    UTF-8 without space around them. With a seed, rows are shuffled, which reads the whole table
    into memory; without, the order is that of the table or of the sorted paths. Beside each shard
    lies a `000000_stats.json` with the rows that went into it and those left out, by cause.

    A shard is written beside its place, flushed and renamed, so that each is whole or not there;
    after an error the finished ones stay. Shards have at most `shard_size` samples and, where a
    single sample is not larger, `max_bytes` bytes, and are the same bytes every time.

    Raises:
        ValueError: a setting out of range, a source that cannot be read or has no usable row,
            columns that are not there, an `out` that holds shards, or too little space for all.
        OSError: the disk is full after all; says how much is missing.
    """
    source, out = Path(source), Path(out)
    for name, value, least in (
        ("shard_size", shard_size, 1),
        ("max_bytes", max_bytes, 1),
        ("workers", workers, 1),
        ("seed", seed, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or more, not {value}")
    _check_unused(out)

    def rows() -> Iterator[Row]:
        return read_rows(source, image_column, caption_column)

    count, expected = 0, 0
    for _, size in _in_threads(_expected_size, rows(), workers):
        count, expected = count + 1, expected + size
    _check_space(out, expected)

    packed = Packed()
    bar = tqdm(total=count, unit="row", desc="packing", disable=not progress)
    stream = _in_threads(_read, _shuffled(rows(), seed), workers)
    status: Counter[str] = Counter()  # of the shard in work

    def following() -> Sample | None:
        for row, result in stream:
            bar.update()
            if isinstance(result, Sample):
                return result
            status[result] += 1
            packed.skipped[result] += 1
            packed.first.setdefault(result, row.name)
        return None

    with bar:
        sample = following()
        if sample is None:
            found = "; ".join(packed.faults()) or _what_was_expected(source)
            raise ValueError(f"source: no usable row in {str(source)!r}: {found}")
        out.mkdir(parents=True, exist_ok=True)
        while sample is not None:
            path = out / f"{len(packed.shards):06d}.tar"
            done = len(packed.shards)
            hint = f"; {done} finished shards stay there, delete them before the next try"
            rest = max(expected - packed.bytes, 0)
            with saying_what_is_missing(out, "the rest", rest, hint):
                with replacing(path) as beside, beside.open("wb") as file:
                    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                        used = 0
                        while sample is not None and (
                            used == 0
                            or (
                                status["success"] < shard_size
                                and _closed_tar(used + sample.size) <= max_bytes
                            )
                        ):
                            _add(tar, sample)
                            used += sample.size
                            status["success"] += 1
                            sample = following()
                    flush(file)
                write_stats(path, status)
            packed.shards.append(path)
            packed.samples += status["success"]
            packed.bytes += path.stat().st_size
            status.clear()
    return packed


def read_rows(source: Path, image_column: str, caption_column: str) -> Iterator[Row]:
    """The pairs of a folder or a table in their order, numbered from 0; no picture is opened."""
    if source.is_dir():
        return _rows_of_folder(source)
    if not source.is_file():
        raise ValueError(f"source: {str(source)!r} does not exist")
    if source.suffix.lower() not in TABLES:
        raise ValueError(
            f"source: {str(source)!r} must be a folder of pictures with a .txt beside each, or a "
            f"table ({', '.join(TABLES)})"
        )
    rows = _rows_of_parquet if source.suffix.lower() == ".parquet" else _rows_of_csv
    return _rows_of_table(source, rows(source), image_column, caption_column)


def _rows_of_folder(folder: Path) -> Iterator[Row]:
    paths = sorted(folder.rglob("*"))
    pictures = [path for path in paths if path.suffix[1:].lower() in IMAGE_KEYS]
    captions = {path for path in paths if path.suffix == ".txt"}
    for number, picture in enumerate(pictures):
        caption = picture.with_suffix(".txt")
        name = picture.relative_to(folder).as_posix()
        fault = "" if caption in captions else "picture without a .txt"
        yield Row(number, repr(name), picture, caption, {"path": name}, fault)
    lonely = captions - {picture.with_suffix(".txt") for picture in pictures}
    for number, caption in enumerate(sorted(lonely), len(pictures)):
        name = caption.relative_to(folder).as_posix()
        yield Row(number, repr(name), None, caption, {}, ".txt without a picture")


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
        picture = None if fault else source.parent / str(path)
        yield Row(number, f"row {number}, {path!r}", picture, row.get(caption_column), row, fault)


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


def _shuffled(rows: Iterator[Row], seed: int | None) -> Iterable[Row]:
    if seed is None:
        return rows
    listed = list(rows)
    return (listed[i] for i in np.random.default_rng(seed).permutation(len(listed)))


def _in_threads(
    work: Callable[[Row], Result], rows: Iterable[Row], workers: int
) -> Iterator[tuple[Row, Result]]:
    """Rows with what `work` makes of each, in order; threads, as the time goes into waiting."""
    rows = iter(rows)
    with ThreadPoolExecutor(workers) as pool:
        while block := list(islice(rows, 4 * workers)):
            yield from zip(block, pool.map(work, block), strict=True)


def _read(row: Row) -> Sample | str:
    """The sample of a row, or what is wrong with it."""
    if row.fault:
        return row.fault
    assert row.picture is not None
    caption = row.caption
    if isinstance(caption, Path):
        try:
            caption = caption.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            return "caption is not UTF-8"
        except OSError as error:
            return f"caption cannot be read ({type(error).__name__})"
    if caption is not None and not isinstance(caption, str):
        return f"caption is no text but {type(caption).__name__}"
    if not caption or not caption.strip():
        return "empty caption"
    try:
        data = row.picture.read_bytes()
    except FileNotFoundError:
        return "missing file"
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        return f"file cannot be read ({type(error).__name__})"
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = str(image.format)
    except Exception:  # whatever a decoder raises on dirt costs one row
        return "unreadable picture"
    if kind not in SUFFIXES:
        return f"picture is a {kind}, not a {', '.join(sorted(set(SUFFIXES.values())))}"
    key = f"{row.number:09d}"
    return Sample(
        {
            f"{key}.{SUFFIXES[kind]}": data,
            f"{key}.txt": caption.strip().encode(),
            f"{key}.json": _json(row),
        }
    )


def _json(row: Row) -> bytes:
    # Dates and the like become text. ASCII: file names need not be valid Unicode.
    return json.dumps(row.columns, default=str).encode()


def _expected_size(row: Row) -> int:
    """Bytes that a row takes in a shard if it is good; captions are taken to be short."""
    if row.fault or row.picture is None or not row.caption:
        return 0
    try:
        return _in_tar(row.picture.stat().st_size) + _in_tar(1) + _in_tar(len(_json(row)))
    except (OSError, ValueError):
        return 0


def _in_tar(size: int) -> int:
    """Bytes of a file in a tar: its header and its data, in blocks."""
    return tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))


def _closed_tar(used: int) -> int:
    """Bytes of a tar with its end mark."""
    return -(-(used + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _add(tar: tarfile.TarFile, sample: Sample) -> None:
    for name, data in sample.files.items():
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))


def _check_unused(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {str(out)!r} is a file; give a folder for the shards")
    former = sorted([*out.glob("*.tar"), *out.glob("*_stats.json")])
    if former:
        raise ValueError(
            f"out: {str(out)!r} already holds {former[0].name} ({len(former)} files of shards): "
            "delete them or give another folder; a reader would mix the two sets"
        )


def _check_space(out: Path, expected: int) -> None:
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < expected:
        raise ValueError(
            f"out: the shards need about {size_text(expected)} and {str(there)!r} has "
            f"{size_text(free)} free: {size_text(expected - free)} are missing"
        )


def _what_was_expected(source: Path) -> str:
    if source.is_dir():
        return f"it has no pictures ({', '.join(IMAGE_KEYS)}) with a .txt of the same name beside"
    return "it has a header alone"

"""Images and captions as WebDataset shards: of a folder of pairs, a table, MS-COCO or CUB.

A sample is `<key>.jpg` (or .png, .webp: what the bytes are), `<key>.txt` and `<key>.json`. Its key
is its running number in the source, so that keys are unique by construction and depend neither on
the shuffle nor on which rows are bad; the json says where the image came from.
"""

from __future__ import annotations

import json
import stat
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dalle1.common.files import (
    add_file,
    check_space,
    check_writable,
    expand_home,
    flush,
    replacing,
    saying_what_is_missing,
)
from dalle1.common.progress import progress_bar
from dalle1.data.curation.rows import SHARDS, SOURCES, Row
from dalle1.data.curation.sources import AnyPath, row_reader
from dalle1.data.samples import (
    CAPTION_TOO_LARGE,
    IMAGE_KEYS,
    IMAGE_TOO_LARGE,
    MAX_TEXT,
    NOT_UTF8,
    BadSample,
    caption_of,
)
from dalle1.data.shards.explain import explain_folder
from dalle1.data.shards.index import find_shards
from dalle1.data.shards.names import TAR, shards_in
from dalle1.data.shards.stats import write_stats
from dalle1.data.shards.tar import MAX_BYTES, is_remote
from dalle1.data.transforms import opened_image

# A camera's JPEG with a preview behind it is an MPO to PIL; any viewer shows it as a JPEG.
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
Result = TypeVar("Result")


@dataclass(frozen=True)
class SampleFiles:
    """The files of a sample by name, in the order in which the shard has them."""

    files: dict[str, bytes]

    @property
    def size(self) -> int:
        """Bytes in the tar."""
        return sum(_in_tar(len(data)) for data in self.files.values())


@dataclass
class WrittenShards:
    """The shards that were written, and the rows that were left out."""

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


def write_shards(
    source: AnyPath,
    out: AnyPath,
    shard_size: int = 1000,
    max_bytes: int = 10**9,
    image_column: str = "path",
    caption_column: str = "caption",
    seed: int | None = None,
    workers: int = 4,
    progress: bool = False,
    coco: AnyPath | None = None,
    cub: AnyPath | None = None,
    captions: str | None = None,
    split: str | None = None,
    classes: AnyPath | None = None,
) -> WrittenShards:
    """Writes `000000.tar`, `000001.tar` ... of a folder of pairs, a table, MS-COCO or CUB.

    Images are copied byte for byte; captions become UTF-8 without space around them. Next to each
    shard is a `000000_stats.json` with the rows that went into it and those left out, by cause. A
    shard is written to a temporary file, flushed and renamed, so that it is complete or not there;
    after an error the finished ones stay. The same arguments give the same bytes.

    Args:
        source: a folder that is searched to any depth for images, each with a `.txt` of the same
            name; or a .csv, .tsv or .parquet with a header, whose paths are absolute or relative to
            it. The json of a sample keeps the row of a table. With coco or cub, the folder of the
            pictures.
        out: folder for the shards.
        shard_size: most samples of a shard.
        max_bytes: most bytes of a shard, unless a single sample is larger.
        image_column: of a table.
        caption_column: of a table.
        seed: shuffles the rows, for which a table is read into memory; None: the order of the table
            or of the sorted paths.
        workers: threads that read.
        progress: whether a bar is shown.
        coco: MS-COCO's caption annotations, see `coco.read_coco`.
        cub: the folder of CUB's captions, see `cub.read_cub`. With coco or cub, the txt of a sample
            has its first caption and the json all of them, as `captions`.
        captions: with coco or cub, which of a picture's captions stay: "all" (None), "first", or
            "one", which the seed chooses.
        split: with cub, "train" or "test"; None: both.
        classes: with cub, a file with the names of the classes that stay; None: all.

    Raises:
        ValueError: a setting out of range, a source that cannot be read or has no usable row,
            columns that are not there, an `out` that holds shards, or too little space for all.
        OSError: the disk is full after all; says how much is missing.
    """
    given = expand_home(source)
    if is_remote(given) or not given:
        raise ValueError(f"source: expected {SOURCES}, got {given!r}; {SHARDS}")
    source, out = Path(given), Path(expand_home(out))
    _check_least(1, shard_size=shard_size, max_bytes=max_bytes, workers=workers)
    _check_least(0, seed=seed)
    check_writable(out, "out")
    _check_unused(out)
    rows = row_reader(
        source, image_column, caption_column, seed, coco, cub, captions, split, classes
    )
    count, expected = 0, 0
    for _, size in _in_threads(_expected_size, rows(), workers):
        count, expected = count + 1, expected + size
    check_space(out, expected, "out")
    written = WrittenShards()
    with (
        warnings.catch_warnings(),  # threads that open images would leave the filters changed
        progress_bar(total=count, unit="row", desc="writing", disable=not progress) as bar,
    ):
        samples = _Samples(_in_threads(_read, _shuffled(rows(), seed), workers), written, bar)
        if samples.next is None:
            listed = coco is not None or cub is not None
            found = "; ".join(written.faults()) or _what_was_expected(source, listed)
            names = explain_folder(source) if source.is_dir() and not listed else ""
            raise ValueError(f"source: no usable row in {str(source)!r}: {found}{names}")
        out.mkdir(parents=True, exist_ok=True)
        while samples.next is not None:
            done = len(written.shards)
            path = out / f"{done:06d}.tar"
            hint = f"; {done} finished shards stay there, delete them before the next try"
            rest = max(expected - written.bytes, 0)
            with saying_what_is_missing(out, "the rest", rest, hint):
                _write_shard(path, samples, shard_size, max_bytes)
                write_stats(path, samples.status)
            written.shards.append(path)
            written.samples += samples.status["success"]
            written.bytes += path.stat().st_size
            samples.status.clear()
    return written


class _Samples:
    """The good samples of a source, one after the other; counts the rows that are none."""

    def __init__(
        self, rows: Iterator[tuple[Row, SampleFiles | str]], written: WrittenShards, bar: Any
    ) -> None:
        self._rows, self._written, self._bar = rows, written, bar
        self.status: Counter[str] = Counter()  # rows of the shard that is being written
        self.next: SampleFiles | None = None  # None: there are no more
        self.advance()

    def advance(self) -> None:
        """Reads on to the next good sample."""
        for row, result in self._rows:
            self._bar.update()
            if isinstance(result, SampleFiles):
                self.next = result
                return
            self.status[result] += 1
            self._written.skipped[result] += 1
            self._written.first.setdefault(result, row.name)
        self.next = None


def _write_shard(path: Path, samples: _Samples, shard_size: int, max_bytes: int) -> None:
    """Writes the next samples, as many as a shard may hold, and at least one."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            used = 0
            while (sample := samples.next) is not None:
                full = samples.status["success"] == shard_size
                if used and (full or _closed_tar(used + sample.size) > max_bytes):
                    break
                _add(tar, sample)
                used += sample.size
                samples.status["success"] += 1
                samples.advance()
        flush(file)


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


def _read(row: Row) -> SampleFiles | str:
    """The sample of a row, or what is wrong with it."""
    if row.fault:
        return row.fault
    try:
        caption = _read_caption(row.caption)
        data, kind = _read_image(row.image)
        columns = _json(row)
        if len(columns) > MAX_BYTES:
            raise _BadRow("row too large")
    except _BadRow as error:
        return str(error)
    key = f"{row.number:09d}"
    return SampleFiles(
        {
            f"{key}.{SUFFIXES[kind]}": data,
            f"{key}.txt": caption.encode(),
            f"{key}.json": columns,
        }
    )


class _BadRow(ValueError):
    """A row that cannot be used, and why."""


def _read_caption(caption: Any) -> str:
    """A row's caption, of its file if that is where it is. Raises _BadRow."""
    data = b""
    try:
        if isinstance(caption, Path):
            if caption.stat().st_size > MAX_TEXT:
                raise _BadRow(CAPTION_TOO_LARGE)
            data = caption.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        elif isinstance(caption, str):
            data = caption.encode(errors="surrogateescape")  # as it stands in the table
        elif caption is not None:
            raise _BadRow(f"caption is no text but {type(caption).__name__}")
        return caption_of({"txt": data}, "txt")
    except BadSample as error:
        raise _BadRow(error.cause) from error
    except UnicodeEncodeError as error:  # half a surrogate pair
        raise _BadRow(NOT_UTF8) from error
    except OSError as error:
        raise _BadRow(f"caption cannot be read ({type(error).__name__})") from error


def _read_image(path: Path | None) -> tuple[bytes, str]:
    """A row's encoded image and its format, one of SUFFIXES. Raises _BadRow."""
    assert path is not None  # or the row has a fault
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise _BadRow("no file")  # a pipe, say, which is waited for for ever
        if status.st_size > MAX_BYTES:
            raise _BadRow(IMAGE_TOO_LARGE)
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise _BadRow("missing file") from error
    except _BadRow:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise _BadRow(f"file cannot be read ({type(error).__name__})") from error
    try:
        with opened_image(data, max_pixels=None, max_aspect=None) as image:
            kind = str(image.format)
    except BadSample as error:
        raise _BadRow(error.cause) from error
    if kind not in SUFFIXES:
        kinds = ", ".join(sorted(set(SUFFIXES.values())))
        raise _BadRow(f"image is a {kind}, not a {kinds}")
    return data, kind


def _json(row: Row) -> bytes:
    # Dates and the like become text. ASCII: file names need not be valid Unicode.
    return json.dumps(row.columns, default=str).encode()


def _expected_size(row: Row) -> int:
    """Bytes that a row takes in a shard if it is good; captions are taken to be short."""
    if row.fault or row.image is None or not row.caption:
        return 0
    try:
        return _in_tar(row.image.stat().st_size) + _in_tar(1) + _in_tar(len(_json(row)))
    except (OSError, ValueError):
        return 0


def _in_tar(size: int) -> int:
    """Bytes of a file in a tar: its header and its data, in blocks."""
    return tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))


def _closed_tar(used: int) -> int:
    """Bytes of a tar with its end mark."""
    return -(-(used + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _add(tar: tarfile.TarFile, sample: SampleFiles) -> None:
    for name, data in sample.files.items():
        add_file(tar, name, data)


def _check_least(least: int, **settings: int | None) -> None:
    for name, value in settings.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or more, not {value}")


def _check_unused(out: Path) -> None:
    former = sorted(Path(p).name for end in (TAR, "_stats.json") for p in shards_in(out, end))
    if former:
        raise ValueError(
            f"out: {str(out)!r} already holds {former[0]} ({len(former)} files of shards): "
            "delete them or give another folder; a reader would mix the two sets"
        )


def _what_was_expected(source: Path, listed: bool) -> str:
    if listed:
        return "the list has no images, or none of those that were asked for"
    if source.is_dir():
        images = f"it has no images ({', '.join(IMAGE_KEYS)}) with a .txt of the same name"
        return f"{images}; {SHARDS}" if find_shards(str(source)) else images
    return "it has a header alone"

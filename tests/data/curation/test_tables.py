"""Tables as they come: long values, any encoding, damage; no row ends the packing of the others."""

from __future__ import annotations

import csv
import json
import os
import random
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from dalle1.commands.data import shard
from dalle1.data.curation import tables
from dalle1.data.curation.write_shards import WrittenShards, write_shards
from dalle1.data.samples import CAPTION_TOO_LARGE, MAX_TEXT, NOT_UTF8, RawSample
from dalle1.data.shards.index import raw_samples
from tests.data.images import encoded

LONG = 131_072  # characters of a value: the limit of Python's csv, for the whole program


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    return tmp_path


def packed(table: Path, **settings: Any) -> tuple[list[RawSample], WrittenShards]:
    """What is written of a table; all of its rows are packed, or left out and counted."""
    limit = csv.field_size_limit()
    out = table.parent / "out"
    written = write_shards(table, out, **settings)
    assert csv.field_size_limit() == limit
    counts: Counter[str] = Counter()
    for path in out.glob("*_stats.json"):
        counts.update(json.loads(path.read_text())["status_dict"])
    assert counts == Counter(success=written.samples) + written.skipped
    return list(raw_samples(str(out))), written


def captions(samples: list[RawSample]) -> list[str]:
    return [sample["txt"].decode() for sample in samples]


@pytest.mark.parametrize("length", [LONG + 1, 5 * LONG, MAX_TEXT])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("column", ["caption", "notes"])
def test_long_values_are_packed(folder: Path, suffix: str, length: int, column: str) -> None:
    """One value above the limit of Python's csv that ends the packing of a whole table."""
    separator = "\t" if suffix == ".tsv" else ","
    long = "x" * (length - 2) + "\n" + "y"
    rows = [["path", "caption", "notes"], ["0.png", "before", "n"]]
    rows += [["1.png", *((long, "n") if column == "caption" else ("a", long))]]
    rows += [["2.png", "behind", "n"]]
    with (folder / f"t{suffix}").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    samples, written = packed(folder / f"t{suffix}")
    assert not written.skipped and [json.loads(s["json"])["notes"] for s in samples] == [
        row[2] for row in rows[1:]
    ]
    assert captions(samples) == [row[1] for row in rows[1:]]


@pytest.mark.parametrize("limit", [5, 1000])
def test_the_limit_of_the_program_is_its_own(folder: Path, limit: int) -> None:
    """Rows lost to a small limit that a program has for tables of its own, or a limit that ours
    replaces for good, after errors too."""
    (folder / "t.csv").write_text('path,caption\n0.png,a longer caption\n1.png,"a"b\n2.png,c\n')
    before = csv.field_size_limit(limit)
    try:
        samples, written = packed(folder / "t.csv")
    finally:
        assert csv.field_size_limit(before) == limit
    assert captions(samples) == ["a longer caption", "c"]
    assert written.skipped == {tables.NO_CSV: 1}


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ('1.png,"not closed', tables.NO_CSV),
        ('1.png,"closed" too early', tables.NO_CSV),
        ('1.png,"ends\nin a later line"x', tables.NO_CSV),
        ("1.png", tables.RAGGED),
        ("1.png,a,b", tables.RAGGED),
        ("1.png,", "empty caption"),
        ("1.png,\0\0", "empty caption"),
        ("1\0.png,a", "file cannot be read (ValueError)"),
        ("1.png,a b\udce4r", NOT_UTF8),
        ("1.png," + "x" * (MAX_TEXT + 1), CAPTION_TOO_LARGE),
        ("1.png,a," + "x" * 2**10, tables.RAGGED),
        (",a", "no path"),
        ("/dev/zero,a", "no file"),
        ("x" * 10**4 + ",a", "file cannot be read (OSError)"),
        ("gone.png,a", "missing file"),
    ],
)
def test_a_bad_row_is_counted_and_the_others_are_packed(
    folder: Path, line: str, cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that ends the packing, that takes the good ones behind it along, or is not counted."""
    if "\0" in line and sys.version_info < (3, 11):
        cause = tables.NO_CSV  # its csv refuses NUL
    text = f"path,caption\n0.png,before\n{line}\n2.png,behind\n3.png,last\n"
    (folder / "t.csv").write_bytes(text.encode(errors="surrogateescape"))
    samples, written = packed(folder / "t.csv")
    assert captions(samples) == ["before", "behind", "last"]
    assert written.skipped[cause] == 1
    more = line.count("\n")  # the second line of what was no row is one by itself
    assert written.skipped.total() == 1 + more
    assert len(written.first[cause]) < 500 and written.first[cause].startswith("row 1, ")
    assert shard.main([str(folder / "t.csv"), str(folder / "again")]) == 0
    assert cause in capsys.readouterr().out


def test_a_fifo_is_not_waited_for(folder: Path) -> None:
    """A path of a table that leads to a pipe, from which nothing ever comes."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    os.mkfifo(folder / "1.fifo")
    (folder / "t.csv").write_text("path,caption\n0.png,a\n1.fifo,b\n")
    assert packed(folder / "t.csv")[1].skipped == {"no file": 1}


@pytest.mark.parametrize("quoted", [True, False])
def test_what_is_beyond_the_limit_of_a_row(
    folder: Path, quoted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quote that is not closed and swallows the rest of the table; a line that fills the memory;
    a value that is cut without a word."""
    monkeypatch.setattr(tables, "MAX_ROW", 200)
    lines = ["path,caption", "0.png,before"]
    lines += ['1.png,"not closed' if quoted else "1.png," + "x" * 401]
    lines += ["2.png,behind", *(["gone.png,filling the table"] * 20), "3.png,last"]
    (folder / "t.csv").write_text("\n".join(lines))
    samples, written = packed(folder / "t.csv")
    assert captions(samples) == ["before", "behind", "last"]
    assert written.skipped == {tables.NO_CSV: 1, "missing file": 20}
    exact = "x" * (200 - len("1.png,\n"))
    (folder / "u.csv").write_text(f"path,caption\n1.png,{exact}\n2.png,b\n")
    assert write_shards(folder / "u.csv", folder / "exact").samples == 2


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(
    "encoding",
    [
        *("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"),
        *("utf-32", "utf-32-le", "utf-32-be", "utf-16-be with a mark"),
    ],
)
def test_encodings_of_spreadsheets(folder: Path, suffix: str, encoding: str) -> None:
    """A table that a spreadsheet has saved as Unicode text, refused or taken for rubbish."""
    texts = ["a red cat", "一只红色的猫", "🐈 ünï\nin two lines"]
    separator = "\t" if suffix == ".tsv" else ","
    lines = [separator.join(("path", "caption"))]
    lines += [separator.join((f"{i}.png", f'"{text}"')) for i, text in enumerate(texts)]
    name = encoding.split()[0]
    mark = b"\xfe\xff" if "mark" in encoding else b""
    (folder / f"t{suffix}").write_bytes(mark + "\r\n".join(lines).encode(name))
    samples, written = packed(folder / f"t{suffix}")
    assert captions(samples) == texts and not written.skipped


def test_a_table_of_a_single_byte_encoding(folder: Path) -> None:
    """A table of another encoding refused as a whole for some of its rows."""
    lines = ["path,caption", "0.png,a bear", "1.png,B\xe4r", "2.png,\xe9t\xe9", "3.png,plain"]
    (folder / "t.csv").write_bytes("\n".join(lines).encode("latin-1"))
    samples, written = packed(folder / "t.csv")
    assert captions(samples) == ["a bear", "plain"] and written.skipped == {NOT_UTF8: 2}


@pytest.mark.parametrize("size", [10, MAX_TEXT, MAX_TEXT + 1])
def test_long_captions_in_files(folder: Path, size: int) -> None:
    """A book beside an image that is packed, and that every reader refuses then."""
    (folder / "0.txt").write_text("x" * size)
    (folder / "1.txt").write_bytes(b"\xef\xbb\xbftwo\r\nlines\r\n")
    written = write_shards(folder, folder / "out")
    assert written.skipped[CAPTION_TOO_LARGE] == (size > MAX_TEXT)
    assert captions(list(raw_samples(str(folder / "out"))))[-1] == "two\nlines"


# Parquet.


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    arrow: Any = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), path, **options)
    return path


def test_long_values_of_parquet(folder: Path) -> None:
    """A long value that ends the packing, or takes the memory of all its neighbors."""
    texts = ["a", "x" * MAX_TEXT, "x" * (MAX_TEXT + 1), "d"]
    table = {"path": [f"{i}.png" for i in range(4)], "caption": texts, "n": ["y" * 2**21] * 4}
    samples, written = packed(write_parquet(folder / "t.parquet", table))
    assert captions(samples) == [texts[0], texts[1], texts[3]]
    assert written.skipped == {CAPTION_TOO_LARGE: 1}


def test_values_of_parquet_that_python_has_not(folder: Path) -> None:
    """A column of nanoseconds or of bytes that are no UTF-8 that ends the packing, though nothing
    but a caption may keep a row out."""
    arrow: Any = pytest.importorskip("pyarrow")
    bad = arrow.array([b"ok", b"B\xe4r", b"ok", b"ok"]).view(arrow.utf8())
    table = {
        "path": [f"{i}.png" for i in range(4)],
        "caption": bad,
        "nanoseconds": arrow.array([1, 10**18 + 1, 3, None], arrow.timestamp("ns")),
        "far": arrow.array([10**6 * i for i in range(4)], arrow.date32()),
        "day": [datetime(2021, 2, 24)] * 4,
        "raw": [b"\xff"] * 4,
        "nested": [[{"a": [1, None]}]] * 4,
    }
    samples, written = packed(write_parquet(folder / "t.parquet", table))
    assert captions(samples) == ["ok"] * 3 and written.skipped == {tables.NO_VALUES: 1}
    for sample in samples:
        assert json.loads(sample["json"])["nested"] == [{"a": [1, None]}]


def test_a_damaged_part_of_a_parquet(folder: Path) -> None:
    """Rows behind a damaged part lost without a count, or all of them."""
    count, size = 40, 10
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh", k=200)) for _ in range(count)]
    table = {"path": ["0.png"] * count, "caption": texts}
    path = write_parquet(folder / "t.parquet", table, row_group_size=size, use_dictionary=False)
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    with parquet.ParquetFile(path) as file:
        column = file.metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    samples, written = packed(path)
    assert captions(samples) == texts[:size] + texts[2 * size :]
    assert written.skipped == {tables.NO_VALUES: size}


def test_two_columns_of_one_name(folder: Path) -> None:
    """One of two columns that wins by chance."""
    arrow: Any = pytest.importorskip("pyarrow")
    table = arrow.table([["0.png"], ["a"], ["b"]], names=["path", "caption", "caption"])
    pytest.importorskip("pyarrow.parquet").write_table(table, folder / "t.parquet")
    (folder / "t.csv").write_text("path,caption,caption\n0.png,a,b\n")
    for name in ("t.parquet", "t.csv"):
        with pytest.raises(ValueError, match=r"two columns of one name: \['caption'\]"):
            write_shards(folder / name, folder / "out")


def test_paths_of_rows_know_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row lost as "missing file" whose path begins with `~`."""
    monkeypatch.setenv("HOME", str(folder))
    (folder / "below").mkdir()
    (folder / "below" / "t.csv").write_text("path,caption\n~/1.png,a\n../2.png,b\n")
    samples, written = packed(folder / "below" / "t.csv")
    assert captions(samples) == ["a", "b"] and not written.skipped

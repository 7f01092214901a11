"""Packing: what goes into shards, what is left out, and what stays after a failure."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalle1.commands.data import shard
from dalle1.data.curation import write_shards as packing
from dalle1.data.curation.write_shards import WrittenShards, write_shards
from dalle1.data.samples import image_of
from dalle1.data.shards.index import raw_samples
from dalle1.data.shards.loader import Batches
from dalle1.data.transforms import augment_dalle

CAPTIONS = [
    "a red cat",
    "Красный круг\nнад синим квадратом",  # noqa: RUF001
    "一只红色的猫",
    "قطة حمراء",
    "🐈 — “ünï”, \\ and \ttabs",
    "लाल बिल्ली",
]
NAMES = [
    "plain.jpg",
    "with space .png",
    "dots.v1.2.jpg",
    "ünï 猫.webp",
    "deep/er/UPPER.PNG",
    "deep/plain.jpeg",
]
ENCODERS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}


def encoded(number: int, kind: str = "PNG", side: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (number * 20 % 256,) * 3).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "pairs"
    for i, (name, caption) in enumerate(zip(NAMES, CAPTIONS, strict=True)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i, ENCODERS[path.suffix[1:].lower()]))
        path.with_suffix(".txt").write_text(f" {caption}\n", encoding="utf-8")
    return folder


def many(folder: Path, count: int, side: int = 16) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03d}.png").write_bytes(encoded(i, side=side))
        (folder / f"{i:03d}.txt").write_text(f"number {i}")
    return folder


def samples(out: Path) -> list[dict[str, Any]]:
    return list(raw_samples(str(out)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_folder_to_shards_and_back(pairs: Path, tmp_path: Path) -> None:
    """Images that are encoded anew or go with another's caption; names with dots, spaces or any
    script that end a key early; captions garbled on the way."""
    written = write_shards(pairs, tmp_path / "out", shard_size=4)
    assert [path.name for path in written.shards] == ["000000.tar", "000001.tar"]
    assert written.samples == 6 and not written.skipped
    assert written.bytes == sum(path.stat().st_size for path in written.shards)
    read = samples(tmp_path / "out")
    found = {json.loads(sample["json"])["path"]: sample for sample in read}
    assert found.keys() == set(NAMES)
    for name, caption in zip(NAMES, CAPTIONS, strict=True):
        assert found[name]["txt"].decode() == caption
        assert image_of(found[name]) == (pairs / name).read_bytes()
    batches = Batches(str(tmp_path / "out"), 6, 16, augment_dalle, seed=0)
    batch = next(batches.loader())
    assert sorted(batch.captions) == sorted(CAPTIONS) and not batch.dropped
    for image, text in zip(batch.images, batch.captions, strict=True):
        assert abs(float(image.float().mean()) - 20 * CAPTIONS.index(text)) < 3


def test_two_images_of_one_stem_are_two_samples(pairs: Path, tmp_path: Path) -> None:
    """a.jpg and a.png under one key, of which readers keep one or refuse both."""
    (pairs / "plain.png").write_bytes(encoded(9))
    write_shards(pairs, tmp_path / "out")
    read = samples(tmp_path / "out")
    assert len({sample["__key__"] for sample in read}) == len(read) == 7
    paths = [json.loads(s["json"])["path"] for s in read if s["txt"] == b"a red cat"]
    assert sorted(paths) == ["plain.jpg", "plain.png"]


def test_keys_and_bytes_are_those_of_the_source(tmp_path: Path) -> None:
    """Keys that name another image after a shuffle, a bad neighbor or another shard size; shards
    that differ from run to run, or by the number of threads."""
    source = many(tmp_path / "source", 30)

    def keys(out: Path) -> dict[str, str]:
        return {s["__key__"]: s["txt"].decode() for s in samples(out)}

    write_shards(source, tmp_path / "a", workers=1)
    write_shards(source, tmp_path / "b", workers=7)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    plain = keys(tmp_path / "a")
    assert list(plain.values()) == [f"number {i}" for i in range(30)]
    (source / "004.txt").write_text("")
    write_shards(source, tmp_path / "c", shard_size=7, seed=1)
    shuffled = keys(tmp_path / "c")
    assert list(shuffled) != sorted(shuffled)
    assert shuffled.items() == plain.items() - {("000000004", "number 4")}
    write_shards(source, tmp_path / "d", shard_size=7, seed=1)
    assert contents(tmp_path / "c") == contents(tmp_path / "d")


@pytest.mark.parametrize("limit", ["shard_size", "max_bytes"])
def test_limits_of_a_shard(tmp_path: Path, limit: str) -> None:
    """Shards beyond the limit, samples lost between two of them, an empty shard at the end, or a
    packer that never gets past a sample larger than the limit."""
    source = many(tmp_path / "source", 24, side=64)
    large = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(large).save(source / "010.png")  # some 50 kB, the others 0.2
    bounds = {limit: 8 if limit == "shard_size" else 20480}
    written = write_shards(source, tmp_path / "out", **bounds)  # type: ignore[arg-type]
    assert [s["txt"].decode() for s in samples(tmp_path / "out")] == [
        f"number {i}" for i in range(24)
    ]
    counts = []
    for path in written.shards:
        with tarfile.open(path) as tar:
            counts.append(len(tar.getmembers()) // 3)
    if limit == "shard_size":
        assert counts == [8, 8, 8]
    else:
        assert min(counts) == 1 and max(counts) > 1
        beyond = [n for n, path in zip(counts, written.shards, strict=True) if _size(path) > 20480]
        assert beyond == [1]  # the large one, alone


def _size(path: Path) -> int:
    return path.stat().st_size


def write_table(path: Path, rows: list[list[str]], mark: str = "") -> Path:
    separator = "\t" if path.suffix == ".tsv" else ","
    quoted = [['"' + value.replace('"', '""') + '"' for value in row] for row in rows]
    text = mark + "\r\n".join(separator.join(row) for row in quoted)
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tables_of_text(pairs: Path, tmp_path: Path, suffix: str, mark: str) -> None:
    """Captions cut at separators, quotes or line ends; a spreadsheet's mark in a column's name;
    paths taken from the working directory; other columns lost."""
    paths = [NAMES[0], *(str(pairs / name) for name in NAMES[1:])]
    captions = ['a "red", cat', *CAPTIONS[1:]]
    rows = [["file", "text", "licence"]]
    rows += [
        [path, text, f"l{i}"] for i, (path, text) in enumerate(zip(paths, captions, strict=True))
    ]
    table = write_table(pairs / f"table{suffix}", rows, mark)
    write_shards(table, tmp_path / "out", image_column="file", caption_column="text")
    read = samples(tmp_path / "out")
    assert [sample["txt"].decode() for sample in read] == captions
    for i, sample in enumerate(read):
        assert image_of(sample) == (pairs / NAMES[i]).read_bytes()
        row = {"file": paths[i], "text": captions[i], "licence": f"l{i}"}
        assert json.loads(sample["json"]) == row


def test_parquet(pairs: Path, tmp_path: Path) -> None:
    """Values that json has no form for, which end the packing; nulls that become the text None."""
    arrow: Any = pytest.importorskip("pyarrow")
    table = arrow.table(
        {
            "path": [*NAMES, None, "plain.jpg"],
            "caption": [*CAPTIONS, "no path", None],
            "day": [date(2021, 2, 24)] * 8,
            "likes": [*range(7), None],
        }
    )
    pytest.importorskip("pyarrow.parquet").write_table(table, pairs / "t.parquet")
    written = write_shards(pairs / "t.parquet", tmp_path / "out")
    assert written.skipped == {"no path": 1, "empty caption": 1}
    read = samples(tmp_path / "out")
    assert [sample["txt"].decode() for sample in read] == CAPTIONS
    first = json.loads(read[0]["json"])
    assert first == {"path": NAMES[0], "caption": CAPTIONS[0], "day": "2021-02-24", "likes": 0}
    with pytest.raises(ValueError, match="its columns: 'path', 'caption', 'day', 'likes'"):
        write_shards(pairs / "t.parquet", tmp_path / "other", image_column="url")
    (pairs / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="cannot be read"):
        write_shards(pairs / "t.parquet", tmp_path / "other")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback where one package is missing."""
    (tmp_path / "t.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'dalle1\[parquet\]'"):
        write_shards(tmp_path / "t.parquet", tmp_path / "out")


def test_bad_rows_are_left_out_and_counted(pairs: Path, tmp_path: Path) -> None:
    """One bad row that ends the packing, or vanishes from the count."""
    (pairs / "broken.jpg").write_bytes(b"<html>not found</html>")
    Image.new("RGB", (8, 8)).save(pairs / "moving.gif")
    (pairs / "folder.jpg").mkdir()
    (pairs / "empty.png").write_bytes(b"")
    rows = [["path", "caption"], *([name, "good"] for name in NAMES)]
    rows += [["gone.jpg", "x"], ["gone2.jpg", "x"], ["broken.jpg", "x"], ["moving.gif", "x"]]
    rows += [["folder.jpg", "x"], ["empty.png", "x"], ["plain.jpg", " \u3000"], ["", "x"]]
    rows += [["plain.jpg"], ["plain.jpg", "x", "y"], ["nul\0.jpg", "x"]]
    if sys.version_info < (3, 11):  # its csv refuses NUL
        rows.pop()
    written = write_shards(write_table(pairs / "t.csv", rows), tmp_path / "out", shard_size=4)
    wanted = {
        "missing file": 2,
        "unreadable image": 2,
        "image is a GIF, not a jpg, png, webp": 1,
        "file cannot be read (IsADirectoryError)": 1,
        "empty caption": 1,
        "no path": 1,
        "row with more or fewer values than columns": 2,
    }
    if sys.version_info >= (3, 11):
        wanted["file cannot be read (ValueError)"] = 1
    assert written.skipped == wanted and written.samples == 6
    assert "2 x missing file (first: row 6, 'gone.jpg')" in written.faults()
    stats = [
        json.loads((tmp_path / "out" / f"{i:06d}_stats.json").read_text())
        for i in range(len(written.shards))
    ]
    assert [s["successes"] for s in stats] == [4, 2]
    assert [s["failed"] for s in stats] == [0, sum(wanted.values())]
    assert all(s["count"] == sum(s["status_dict"].values()) for s in stats)
    assert stats[1]["status_dict"] == {"success": 2, **wanted}


def test_bad_pairs_of_a_folder(pairs: Path, tmp_path: Path) -> None:
    """Lonely images and captions skipped in silence; a caption in another encoding."""
    (pairs / "lonely.jpg").write_bytes(encoded(1, "JPEG"))
    (pairs / "readme.txt").write_text("not a caption")
    (pairs / "latin.png").write_bytes(encoded(1))
    (pairs / "latin.txt").write_bytes("Bär".encode("latin-1"))
    (pairs / "marked.png").write_bytes(encoded(1))
    (pairs / "marked.txt").write_bytes(b"\xef\xbb\xbfmarked")
    written = write_shards(pairs, tmp_path / "out")
    assert written.skipped == {
        "no caption": 1,
        "no image": 1,
        "caption is not UTF-8": 1,
    }
    assert written.first["no caption"] == "'lonely.jpg'"
    assert b"marked" in {sample["txt"] for sample in samples(tmp_path / "out")}


def test_the_bytes_say_what_an_image_is(tmp_path: Path) -> None:
    """A camera's JPEG with a preview behind it refused as MPO; a wrong extension carried on."""
    red = Image.new("RGB", (32, 32), "red")
    red.save(tmp_path / "a.png", "JPEG")
    red.save(tmp_path / "b.jpg", "MPO", save_all=True, append_images=[red])
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.format == "MPO"
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    write_shards(tmp_path, tmp_path / "out")
    assert [sorted(s.keys() & {"jpg", "png", "mpo"}) for s in samples(tmp_path / "out")] == [
        ["jpg"],
        ["jpg"],
    ]


def test_a_name_that_is_no_unicode(pairs: Path, tmp_path: Path) -> None:
    """A name in another encoding, of an old archive say, that ends the packing or its report."""
    try:
        for suffix, data in ((b".png", encoded(1)), (b".txt", b"x")):
            (pairs / os.fsdecode(b"b\xe4r" + suffix)).write_bytes(data)
        (pairs / os.fsdecode(b"lonely\xe4.png")).write_bytes(encoded(1))
    except OSError:
        pytest.skip("the file system takes Unicode alone")
    written = write_shards(pairs, tmp_path / "out")
    assert written.samples == 7
    "\n".join(written.faults()).encode()
    paths = [json.loads(s["json"])["path"] for s in samples(tmp_path / "out")]
    assert os.fsdecode(b"b\xe4r.png") in paths


@pytest.mark.parametrize("name", ["000007.tar", "000000_stats.json"])
def test_shards_that_are_there_stay(pairs: Path, tmp_path: Path, name: str) -> None:
    """Two sets mixed in one folder, or one written over."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.md").touch()
    (out / name).touch()
    with pytest.raises(ValueError, match=rf"already holds {name}.*delete"):
        write_shards(pairs, out)
    (out / name).unlink()
    assert write_shards(pairs, out).samples == 6


def breaks(text: str, name: str = "t.csv") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(text.encode("latin-1"))
        return folder / name

    return write


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda _: Path("nowhere"), {}, "'nowhere' does not exist"),
        (lambda folder: folder / NAMES[0], {}, r"\.csv, \.tsv, \.parquet"),
        (breaks("url,text\na,b\n"), {}, "image_column: 'path'.* its columns: 'url', 'text'"),
        (breaks("path,text\na,b\n"), {}, "caption_column: 'caption'.*: 'path', 'text'"),
        (breaks(""), {}, "its columns: none"),
        (breaks("path,caption\n"), {}, "no usable row .* header alone"),
        (breaks("path,caption\nno.jpg,x\n"), {}, "no usable row .*1 x missing file .*no.jpg"),
        (breaks("path,path,caption\na,b,c\n"), {}, "two columns of one name"),
        (breaks('path,caption\na,"b\nc,d\n'), {}, "line 3: .*doubled"),
        (breaks("path,caption\na,B\xe4r\n"), {}, "not UTF-8"),
        (lambda folder: folder, {"shard_size": 0}, "shard_size must be 1 or more, not 0"),
        (lambda folder: folder, {"max_bytes": 0}, "max_bytes must be 1"),
        (lambda folder: folder, {"workers": 0}, "workers must be 1"),
        (lambda folder: folder, {"seed": -1}, "seed must be 0"),
    ],
)
def test_mistakes_are_named(
    pairs: Path,
    tmp_path: Path,
    make: Callable[[Path], Path],
    settings: dict[str, int],
    message: str,
) -> None:
    """A mistake that ends in a traceback, in an empty set or in half of one."""
    with pytest.raises(ValueError, match=message):
        write_shards(make(pairs), tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_empty_folder_and_a_file_as_out(pairs: Path, tmp_path: Path) -> None:
    """A set of no samples; shards that are to be written below a file."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        write_shards(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="is a file"):
        write_shards(pairs, pairs / NAMES[0])


def test_too_little_space_is_known_before(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of packing that end on a disk which never had the room."""
    written = write_shards(pairs, tmp_path / "first")
    with tarfile.open(written.shards[0]) as tar:
        blocks = sum(512 + -(-member.size // 512) * 512 for member in tar.getmembers())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=blocks - 2000))
    with pytest.raises(ValueError, match=r"need about .* kB and .* free: 2\.0 kB are missing"):
        write_shards(pairs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=blocks))
    assert write_shards(pairs, tmp_path / "out").samples == 6


def interrupted(
    source: Path, out: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs shards of 8; the write of the 20th sample's image fails with half of it written."""
    add = packing._add

    def failing(tar: tarfile.TarFile, sample: packing.SampleFiles) -> None:
        if "000000019.txt" in sample.files:
            assert tar.fileobj is not None
            tar.fileobj.write(b"half of it")
            raise error
        add(tar, sample)

    monkeypatch.setattr(packing, "_add", failing)
    write_shards(source, out, shard_size=8)


WHOLE = [f"00000{i}{end}" for i in range(2) for end in (".tar", "_stats.json")]


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a shard under a whole one's name, or one that keeps the disk full; an error that does
    not say how much is missing."""
    source, out = many(tmp_path / "source", 30), tmp_path / "out"
    free = iter([10**9, 5000])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free)))
    with pytest.raises(OSError, match=r"is full: .* 5\.0 kB are free: .* missing; 2 fin") as caught:
        interrupted(source, out, OSError(errno.ENOSPC, "No space left on device"), monkeypatch)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(path.name for path in out.iterdir()) == WHOLE
    assert len(samples(out)) == 16


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "a broken disk")])
def test_other_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Ctrl-C that leaves half a shard; any failure told as a full disk."""
    source, out = many(tmp_path / "source", 30), tmp_path / "out"
    with pytest.raises(type(error)) as caught:
        interrupted(source, out, error, monkeypatch)
    assert caught.value is error
    assert sorted(path.name for path in out.iterdir()) == WHOLE


def test_the_command(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags that do nothing, rows left out without a word, and mistakes with a traceback."""
    (pairs / "lonely.jpg").touch()
    out = str(tmp_path / "out")
    flags = ["--shard-size", "5", "--max-bytes", "1e6", "--seed", "3", "--workers", "2"]
    assert shard.main([str(pairs), out, *flags]) == 0
    said = capsys.readouterr().out
    assert "6 samples in 2 shards" in said and f"data={out}" in said
    assert "left out 1 of 7" in said and "no caption (first: 'lonely.jpg')" in said
    write_shards(pairs, tmp_path / "same", 5, 10**6, seed=3)
    assert contents(tmp_path / "out") == contents(tmp_path / "same")
    assert shard.main([str(pairs), out]) == 2
    assert "already holds" in capsys.readouterr().err
    table = write_table(pairs / "t.csv", [["p", "c"], [NAMES[0], "x"]])
    flags = ["--image-column", "p", "--caption-column", "c"]
    assert shard.main([str(table), str(tmp_path / "third"), *flags]) == 0


def test_the_command_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback where one line says what to do."""

    def full(*_: object, **__: object) -> WrittenShards:
        raise OSError(errno.ENOSPC, "'out' is full: 2 GB are missing")

    monkeypatch.setattr(shard, "write_shards", full)
    assert shard.main(["source", "out"]) == 1
    assert capsys.readouterr().err == "error: 'out' is full: 2 GB are missing\n"

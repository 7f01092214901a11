"""Samples of one tar: order, groups, offsets, damage, streams."""

from __future__ import annotations

import errno
import functools
import gc
import gzip
import http.server
import io
import os
import shutil
import signal
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from webdataset.gopen import gopen

from dalle1.data.samples import RawSample
from dalle1.data.shards import tar as tars
from dalle1.data.shards.tar import Shard
from tests.data.mutations import changed, headers, member, pax, record, signed, sparse

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
BLOCK = 512
Members = list[tuple[str, bytes]]


def written(members: Members, mode: str = "w", format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=format) as tar:  # type: ignore[call-overload]
        for name, data in members:
            entry = tarfile.TarInfo(name.rstrip("/"))
            entry.size = len(data)
            if name.endswith("/"):
                entry.type = tarfile.DIRTYPE
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def pairs(count: int, size: int = 700) -> Members:
    """Two files each, the first of which is longer than a block."""
    return [
        file
        for i in range(count)
        for file in ((f"{i}.png", bytes([i + 1]) * size), (f"{i}.txt", f"number {i}".encode()))
    ]


def raws(shard: Shard) -> list[RawSample]:
    return [sample.raw() for sample in shard]


def by_webdataset(address: str) -> list[RawSample]:
    samples = wds.DataPipeline(wds.SimpleShardList([address]), wds.tarfile_to_samples())
    ours = ("__url__", "__local_path__")
    return [{name: data for name, data in s.items() if name not in ours} for s in samples]


STRANGE: Members = [
    ("b.png", b"1"),
    ("b.txt", b"2"),
    ("a.TXT", b"capitals"),
    ("a.seg.png", b"two dots"),
    ("a.", b"no extension"),
    ("dir/", b""),
    ("dir/a.txt", b"in a folder"),
    ("a.txt", b"again, not beside the others"),
    ("README", b"no dot"),
    ("__meta__", b"meta"),
    ("__meta__/x.txt", b"meta"),
    ("a.png", b"behind members that are no part of a sample"),
    ("__a__.txt", b"a sample after all"),
    (".hidden.png", b"no key"),
    ("d.o.t/e.png", b"a folder with dots"),
    ("d.o.t/e.txt", b""),
    ("./e.png", b"x" * 511),
    ("e.png", b"x" * 512),
    ("e.txt", b"x" * 513),
    ("Kätzchen 猫.png", b"not ASCII"),
    ("Kätzchen 猫.txt", b"y" * 5000),
]
LONG: Members = [
    (f"{'folder/' * 20}{'k' * 150}.{extension}", extension.encode() * 300)
    for extension in ("png", "txt", "json")
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("end", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "pipe", "pipe gz"])
def test_agrees_with_webdataset(tmp_path: Path, format: int, end: str) -> None:
    """Samples that are grouped, ordered or named otherwise than everybody's readers do it."""
    members = STRANGE if format == tarfile.USTAR_FORMAT else STRANGE + LONG + pairs(3)
    kind = end.rpartition(".")[2].rpartition(" ")[2]
    mode = {"gz": "w:gz", "tgz": "w:gz", "bz2": "w:bz2", "xz": "w:xz"}.get(kind, "w")
    path = tmp_path / ("a.tar" if "pipe" in end else f"a.{end}")
    path.write_bytes(written(members, mode, format))
    shard = Shard(f"pipe:cat {path}" if "pipe" in end else str(path))
    wanted = by_webdataset(str(path))
    assert raws(shard) == wanted and len(wanted) >= 9
    assert raws(shard) == wanted  # a shard can be read again
    assert (shard.damage, shard.cut) == ("", "")


def test_what_is_no_part_of_a_sample(tmp_path: Path) -> None:
    """Links followed, folders and devices taken for files, or any of them splitting a sample."""
    data = member("a.png", b"1")
    for i, kind in enumerate((b"1", b"2", b"3", b"4", b"5", b"6", b"Z")):
        data += changed(member(f"a.{i}", b"", kind), link=b"a.png")
    data += member("a.txt", b"2") + member("v7/", b"", tarfile.AREGTYPE) + bytes(2 * BLOCK)
    (tmp_path / "a.tar").write_bytes(data)
    assert raws(Shard(str(tmp_path / "a.tar"))) == [{"__key__": "a", "png": b"1", "txt": b"2"}]


def test_repeated_extensions(tmp_path: Path) -> None:
    """A second image in place of the first, or one that is not counted."""
    members = [("a.jpg", b"1"), ("a.txt", b"2"), ("a.JPG", b"3"), ("a.jpg", b"4"), ("b.jpg", b"5")]
    (tmp_path / "a.tar").write_bytes(written(members))
    first, second = Shard(str(tmp_path / "a.tar"))
    assert first.raw() == {"__key__": "a", "jpg": b"1", "txt": b"2"} and first.repeated() == 2
    assert second.repeated() == 0


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """Keys that end a run when they are printed, or neighbors that become one sample."""
    names = [f"caf{letter}.{end}".encode("latin-1") for letter in "éè" for end in ("png", "txt")]
    data = b"".join(changed(member("x", b"")[:BLOCK], name=name) for name in names)
    (tmp_path / "a.tar").write_bytes(data + bytes(2 * BLOCK))
    keys = [sample.key.encode() for sample in Shard(str(tmp_path / "a.tar"))]
    assert keys == [b"caf\\xe9", b"caf\\xe8"]


@pytest.mark.parametrize("format", FORMATS)
def test_offsets(tmp_path: Path, format: int) -> None:
    """A resumed run that reads on behind a long name's header, or with another sample."""
    members = STRANGE if format == tarfile.USTAR_FORMAT else LONG + STRANGE + LONG[:2] + pairs(4)
    path = tmp_path / "a.tar"
    path.write_bytes(written(members, format=format))
    whole = list(Shard(str(path)))
    assert whole[0].offset == 0 and len(whole) >= 9
    for i, sample in enumerate(whole):
        rest = Shard(str(path), sample.offset)
        assert [(s.offset, s.raw()) for s in rest] == [(s.offset, s.raw()) for s in whole[i:]]
        assert not rest.damage
    behind = Shard(str(path), len(path.read_bytes()))
    assert list(behind) == [] and behind.damage


@pytest.mark.parametrize("end", ["tar", "tar.gz", "pipe"])
def test_headers_alone(tmp_path: Path, end: str) -> None:
    """Counts and offsets that are other ones than reading gives."""
    members = LONG + STRANGE + pairs(3)
    path = tmp_path / ("a.tar.gz" if end == "tar.gz" else "a.tar")
    path.write_bytes(written(members, "w:gz" if end == "tar.gz" else "w"))
    address = f"pipe:cat {path}" if end == "pipe" else str(path)
    read, named = list(Shard(address)), list(Shard(address, headers_alone=True))
    assert [(s.key, s.offset, len(s.files)) for s in named] == [
        (s.key, s.offset, len(s.files)) for s in read
    ]
    assert [list(s.raw()) for s in named] == [list(s.raw()) for s in read]
    assert not any(data for s in named for _, data in s.files)


def test_large_files_are_not_read(tmp_path: Path) -> None:
    """Gigabytes read for the names alone, or into memory although they are too many."""
    path, size = tmp_path / "a.tar", 2**34
    with path.open("wb") as file:
        file.write(member("a.png", b"1") + member("a.mp4", b"", claimed=size))
        file.seek(size, os.SEEK_CUR)  # a hole, no blocks on the disk
        file.write(member("a.txt", b"2") + member("b.png", b"3") + bytes(2 * BLOCK))
    start = time.monotonic()
    first, second = Shard(str(path))
    assert first.too_large and not second.too_large
    assert [data for _, data in first.files] == [b"1", b"", b"2"] and second.raw()["png"] == b"3"
    assert [s.key for s in Shard(str(path), headers_alone=True)] == ["a", "b"]
    assert time.monotonic() - start < 5


def test_most_bytes(tmp_path: Path) -> None:
    """A limit that is off by one, or that sparse files pass under: a few bytes claim to be many."""
    few = [(0, 5), (1000, 3)]
    data = member("a.bin", b"x" * 1003) + sparse("b.bin", b"hellobye", few, 1003)
    data += member("c.bin", b"x" * 1004) + sparse("d.bin", b"hellobye", few, 1004)
    data += sparse("e.bin", b"hellobye", few, 2**60) + member("f.bin", b"") + bytes(2 * BLOCK)
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    for address in (str(path), f"pipe:cat {path}"):
        shard = Shard(address, max_bytes=1003)
        found = {sample.key: sample for sample in shard}
        assert not shard.damage and "".join(found) == "abcdef"
        assert [key for key in found if found[key].too_large] == ["c", "d", "e"]
        assert found["a"].raw()["bin"] == b"x" * 1003
        assert found["b"].raw()["bin"] == b"hello" + bytes(995) + b"bye"
        assert [found[key].raw()["bin"] for key in "cdef"] == [b""] * 4


def cuts(data: bytes) -> list[int]:
    """Each border of blocks, and places next to it."""
    near = [place + i for place in range(0, len(data), BLOCK) for i in (-1, 0, 1, 200)]
    return sorted({place for place in near if 0 <= place < len(data)})


def test_truncation_anywhere(tmp_path: Path) -> None:
    """A shard that was cut short: an exception, half a sample taken for a whole one, whole ones
    lost, or not a word of it."""
    members, path = pairs(4), tmp_path / "a.tar"
    data = written(members, format=tarfile.USTAR_FORMAT)
    path.write_bytes(data)
    whole = raws(Shard(str(path)))
    with tarfile.open(path) as tar:
        ends = [entry.offset_data + entry.size for entry in tar]
    last = -(-ends[-1] // BLOCK) * BLOCK  # all behind it is the end mark and padding
    for cut in cuts(data):
        path.write_bytes(data[:cut])
        shard = Shard(str(path))
        found = raws(shard)
        done = sum(end <= cut for end in ends)
        wanted = whole[: done // 2]
        if done == 1 and cut < 4 * BLOCK:  # nothing says yet that samples have two files
            wanted = [{name: whole[0][name] for name in ("__key__", "png")}]
        assert found == wanted, cut
        assert bool(shard.damage) == (cut < last + BLOCK), cut
        if done % 2 == 1 and done > 1:
            assert shard.cut == str(done // 2)
        headers_alone = Shard(str(path), headers_alone=True)
        names = [sample.key for sample in headers_alone]
        assert names[: len(found)] == [raw["__key__"] for raw in found]
        assert len(names) <= len(found) + 1 and bool(headers_alone.damage) == bool(shard.damage)


def test_truncated_streams_are_truncated_files(tmp_path: Path) -> None:
    """Damage that a stream hides, or that costs more samples of one than of a file."""
    path = tmp_path / "a.tar"
    data = written(pairs(4), format=tarfile.USTAR_FORMAT)
    for cut in [place for place in cuts(data) if place < 9000][::3]:
        path.write_bytes(data[:cut])
        file, stream = Shard(str(path)), Shard(f"pipe:cat {path}")
        assert raws(stream) == raws(file) and stream.cut == file.cut, cut
        assert bool(stream.damage) == bool(file.damage)


def test_empty_and_missing_files(tmp_path: Path) -> None:
    """A file that is not there, or a disk that fails, taken for a damaged tar without samples."""
    path = tmp_path / "a.tar"
    for content, damaged in ((b"", True), (bytes(BLOCK), False), (bytes(10240), False)):
        path.write_bytes(content)
        for address in (str(path), f"pipe:cat {path}"):
            shard = Shard(address)
            assert list(shard) == [] and bool(shard.damage) == damaged
    for name in ("none.tar", "none.tar.gz"):
        with pytest.raises(FileNotFoundError):
            list(Shard(str(tmp_path / name)))
    with pytest.raises(IsADirectoryError):
        (tmp_path / "folder.tar").mkdir()
        list(Shard(str(tmp_path / "folder.tar")))


def test_a_failing_disk_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that another try may not have, counted as lost samples."""

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 2000:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    data = written(pairs(4), format=tarfile.USTAR_FORMAT)
    monkeypatch.setattr(tars, "open", lambda *_: Failing(data), raising=False)
    with pytest.raises(OSError, match="Input/output error"):
        list(Shard("a.tar"))


@pytest.mark.parametrize("which", range(8))
@pytest.mark.parametrize("what", ["noise", "zeros", "ones", "a flipped bit"])
def test_rubbish_in_a_header(tmp_path: Path, what: str, which: int) -> None:
    """Rubbish, or zeros that a crash left in a file, taken for the end of the tar."""
    path = tmp_path / "a.tar"
    data = written(pairs(4), format=tarfile.USTAR_FORMAT)
    path.write_bytes(data)
    whole, at = raws(Shard(str(path))), headers(data)[which]
    rng = np.random.default_rng(which)
    block = {
        "noise": rng.integers(0, 256, BLOCK, np.uint8).tobytes(),
        "zeros": bytes(BLOCK),
        "ones": b"\xff" * BLOCK,
        "a flipped bit": bytes([data[at] ^ 4]) + data[at + 1 : at + BLOCK],
    }[what]
    path.write_bytes(data[:at] + block + data[at + BLOCK :])
    for address in (str(path), f"pipe:cat {path}"):
        shard = Shard(address)
        found = raws(shard)
        assert shard.damage
        if which == 1:
            assert [raw["__key__"] for raw in found] == ["0"]
        else:
            assert found == whole[: which // 2] and shard.cut == (
                str(which // 2) if which % 2 else ""
            )


def test_each_bit_of_a_header(tmp_path: Path) -> None:
    """A flipped bit that passes unnoticed, or raises what is not caught."""
    path = tmp_path / "a.tar"
    data = written(pairs(2), format=tarfile.USTAR_FORMAT)
    path.write_bytes(data)
    whole, at = raws(Shard(str(path))), headers(data)[2]
    unnoticed = 0
    for bit in range(0, 8 * BLOCK, 3):
        place = at + bit // 8
        flipped = data[:place] + bytes([data[place] ^ 1 << bit % 8]) + data[place + 1 :]
        path.write_bytes(flipped)
        shard = Shard(str(path))
        found = raws(shard)
        assert found[0] == whole[0]
        if not shard.damage:
            assert found == whole
            unnoticed += 1
    assert unnoticed < 16  # spaces and zeros of the checksum itself


def test_flipped_bits_of_files_cost_nothing_else(tmp_path: Path) -> None:
    """Samples lost or moved by damage that only their images have."""
    path = tmp_path / "a.tar"
    data = written(pairs(3), format=tarfile.USTAR_FORMAT)
    path.write_bytes(data)
    whole, at = raws(Shard(str(path))), headers(data)[2] + BLOCK
    path.write_bytes(data[:at] + bytes(255 - b for b in data[at : at + 700]) + data[at + 700 :])
    shard = Shard(str(path))
    found = raws(shard)
    assert not shard.damage and found[1].pop("png") == b"\xfd" * 700
    assert found == [whole[0], {k: v for k, v in whole[1].items() if k != "png"}, whole[2]]


def test_more_behind_the_end(tmp_path: Path) -> None:
    """A second tar behind the first skipped without a word, or long padding called damage."""
    path = tmp_path / "a.tar"
    data = written(pairs(2))
    for more, damaged in ((data, True), (b"rubbish", True), (bytes(10**6), False)):
        path.write_bytes(data + more)
        for address in (str(path), f"pipe:cat {path}", f"pipe:gzip -c {path}"):
            shard = Shard(address)
            assert [raw["__key__"] for raw in raws(shard)] == ["0", "1"]
            assert bool(shard.damage) == damaged and not shard.cut


ABSURD = {
    "to itself": member("b.png", b"", claimed=-BLOCK),
    "to the one before": member("b.png", b"", claimed=-3 * BLOCK),
    "far back": member("b.png", b"", claimed=-(2**70)),
    "no file holds it": member("b.png", b"", claimed=2**55),
    "no offset holds it": member("b.png", b"", claimed=2**85),
    "a device": member("b.png", b"", b"Z", 2**60),
    "a folder": member("b.png", b"", tarfile.DIRTYPE, -BLOCK),
    "a long name": member("b.png", b"", tarfile.GNUTYPE_LONGNAME, 2**40),
    "a long name to itself": member("b.png", b"", tarfile.GNUTYPE_LONGNAME, -BLOCK),
    "an extended header": pax(b"", claimed=2**60),
    "extended: to itself": pax(record("size", str(-2 * BLOCK))) + member("b.png", b""),
    "extended: huge": pax(record("size", "9" * 30)) + member("b.png", b""),
    "extended: no number": pax(record("GNU.sparse.size", "x")) + member("b.png", b""),
    "extended: for all": pax(record("size", "-1024"), tarfile.XGLTYPE) + member("b.png", b"1"),
    "extended: a map": pax(record("GNU.sparse.map", "-9,x")) + member("b.png", b"1"),
    "extended: a length": pax(b"0 path=b.txt\n") + member("b.png", b""),
    "many names": member("b.png", b"", tarfile.GNUTYPE_LONGNAME) * 3000,
    "a map that goes on": signed(sparse("b.png", b"", [], 9)[:482] + b"\1" + bytes(29)),
    "a map of places before the file": sparse("b.png", b"", [(0, -(2**50)), (0, 9)], 9),
    "a map of places behind the file": sparse("b.png", b"", [(-(2**50), 2**50), (0, 9)], 9),
    "less than nothing": sparse("b.png", b"", [], -9),
}


@pytest.mark.parametrize("name", ABSURD)
@pytest.mark.parametrize("how", ["file", "headers", "pipe", "pipe headers", "gz"])
def test_absurd_headers(tmp_path: Path, name: str, how: str) -> None:
    """A header with a right checksum that is followed for ever, into memory, or out of the tar."""
    path = tmp_path / ("a.tar.gz" if how == "gz" else "a.tar")
    good = member("a.png", b"1") + member("a.txt", b"2")
    data = good + ABSURD[name] + member("c.png", b"3") + member("c.txt", b"4") + bytes(2 * BLOCK)
    if how == "gz":
        data = gzip.compress(data)
    path.write_bytes(data)
    address = f"pipe:cat {path}" if "pipe" in how else str(path)
    shard = Shard(address, headers_alone="headers" in how)
    start = time.monotonic()
    samples = []
    for sample in shard:
        samples.append(sample)
        assert len(samples) < 5 and len(sample.files) <= 2
    assert time.monotonic() - start < 20
    assert samples[0].key == "a" and len(samples[0].files) == 2
    # Where the pieces of a sparse file lie is looked at where it is read; gzip's file is lenient.
    assert shard.damage or ("of places" in name and how not in ("file", "pipe"))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("claimed", [-1, -BLOCK, 2**20, 2**28])
def test_long_headers_are_not_read(tmp_path: Path, kind: bytes, claimed: int) -> None:
    """A name of gigabytes, or of less than nothing, that is read into memory."""
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(member("a.png", b"1") + member("x", b"", kind, claimed))
        file.truncate(2**28)  # a hole
    tracemalloc.start()
    try:
        shard = Shard(str(path))
        assert [sample.key for sample in shard] == ["a"] and "claims" in shard.damage
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def patched_gopen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The streams that are opened from here on."""
    opened: list[Any] = []

    def recorded(address: str) -> Any:
        opened.append(gopen(address))
        return opened[-1]

    monkeypatch.setattr(tars, "gopen", recorded)
    return opened


def ended(process: Any) -> bool:
    """Whether a child has ended and nothing is left of it."""
    if process.returncode is None:
        return False
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    return True


@pytest.mark.parametrize(
    ("command", "found", "damage"),
    [
        ("cat {}", 20, ""),
        ("gzip -c {}", 20, ""),
        ("false", 0, "exit status 1"),
        ("no-such-command 2>/dev/null", 0, "exit status 127"),
        ("true", 0, "empty header"),
        ("echo this is no tar", 0, "header"),
        ("cat {}; exit 3", 20, "exit status 3"),
        ("head -c 10000 {}; exit 4", 4, "exit status 4"),
        ("head -c 10000 {}", 4, "end"),
        ("head -c 9728 {}", 3, "end"),
        ("cat {}; yes", 20, "more behind it"),
    ],
)
def test_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, found: int, damage: str
) -> None:
    """A download that fails and nobody hears of it; samples that are lost, by chance some times,
    because the command has failed by the time they are read; or processes left behind."""
    path, opened = tmp_path / "a.tar", patched_gopen(monkeypatch)
    path.write_bytes(written(pairs(20), format=tarfile.USTAR_FORMAT))
    whole = raws(Shard(str(path)))
    for _ in range(3):
        shard = Shard("pipe:" + command.format(path))
        assert raws(shard) == whole[:found]
        assert damage in shard.damage and bool(damage) == bool(shard.damage)
    assert len(opened) == 3 and all(ended(stream.proc) for stream in opened)


def test_abandoned_streams_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that pile up, one for each shard of which only some samples were wanted; also in
    workers, which ignore signals, as then do the commands that they start."""
    path, opened = tmp_path / "a.tar", patched_gopen(monkeypatch)
    path.write_bytes(written(pairs(20, 50_000)))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    start = time.monotonic()
    try:
        for rest in ("sleep 1000", "cat", "exec sleep 1000"):
            samples: Iterator[Any] = iter(Shard(f"pipe:cat {path}; {rest} <&1"))
            assert next(samples).key == "0" and not ended(opened[-1].proc)
            samples.close()  # type: ignore[attr-defined]
            assert ended(opened[-1].proc)
        samples = iter(Shard(f"pipe:cat {path} | cat"))
        next(samples)
        del samples
        gc.collect()
        assert ended(opened[-1].proc)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - start < 20


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if not self.path.startswith("/half"):
            super().do_GET()
            return
        data = Path(self.directory, "a.tar").read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:10_000])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    if shutil.which("curl") is None:
        pytest.skip("curl is missing")
    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_http(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses that are taken for files, an error page for a tar, or a connection that breaks off
    for the end."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    members = pairs(20)
    (tmp_path / "a.tar").write_bytes(written(members, format=tarfile.USTAR_FORMAT))
    (tmp_path / "b.tar.gz").write_bytes(written(members, "w:gz"))
    whole = raws(Shard(str(tmp_path / "a.tar")))
    for name in ("a.tar", "b.tar.gz"):
        shard = Shard(f"{server}/{name}")
        assert raws(shard) == whole and not shard.damage
    for name, found, status in (("none.tar", 0, 22), ("half.tar", 4, 18)):
        shard = Shard(f"{server}/{name}")
        assert raws(shard) == whole[:found] and f"exit status {status}" in shard.damage


def test_damaged_compression(tmp_path: Path) -> None:
    """Errors of decompressors that end a run, or samples before the damage that are lost."""
    path = tmp_path / "a.tar.gz"
    rng = np.random.default_rng(0)
    members = [(f"{i}.png", rng.integers(0, 256, 20_000, np.uint8).tobytes()) for i in range(9)]
    data = written(members, "w:gz")
    whole = [{"__key__": name[0], "png": content} for name, content in members]
    for cut in (0, 5, 500, len(data) // 2, len(data) - 9, len(data) - 1):
        for rest in (b"", bytes(100), b"\xff" * 100):
            path.write_bytes(data[:cut] + rest)
            for address in (str(path), f"pipe:cat {path}"):
                shard = Shard(address)
                found = raws(shard)
                assert found == whole[: len(found)]
                assert len(found) >= 9 * cut // len(data) - 2
                # tarfile does not compare the checksum of a stream.
                unseen = address != str(path) and len(found) == 9
                assert shard.damage or unseen or (data[:cut] + rest).startswith(data)

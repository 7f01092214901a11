"""The format of token shards: what is written is read, whole or in parts, and nothing else is."""

from __future__ import annotations

import errno
import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from dalle1.data.samples import CAUSES
from dalle1.data.shards import token_shard as format
from dalle1.data.shards.token_shard import (
    FORMAT,
    HEADER,
    SourceShard,
    TokenSettings,
    TokenShard,
    write_token_shard,
)

SETTINGS = TokenSettings(codebook_size=8192, grid=4, views=2, augmented=True, dvae="abc", seed=3)
SOURCE = SourceShard("00000.tar", 12345, {"empty caption": 2}, "unexpected end of data")


def draws(count: int, settings: TokenSettings = SETTINGS) -> np.ndarray:
    rng = np.random.default_rng(0)
    shape = (count, settings.views, settings.grid**2)
    return rng.integers(0, settings.codebook_size, shape, dtype=np.uint16)


def texts(count: int) -> tuple[list[str], list[list[str]]]:
    keys = [f"{i:09d}" for i in range(count)]
    return keys, [[f"number {i}", *["second"] * (i % 3)] for i in range(count)]


def write(path: Path, count: int, settings: TokenSettings = SETTINGS) -> Path:
    write_token_shard(path, *texts(count), draws(count, settings), settings, SOURCE)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Views or positions in another order, captions lost but the first, codes above 255 or 32,767
    cut off; settings or counts that the header does not keep."""
    settings = replace(SETTINGS, codebook_size=2**16, caption_key="alt", max_aspect=2.5)
    shard = TokenShard(write(tmp_path / "0.safetensors", 7, settings))
    assert (shard.count, shard.settings, shard.source) == (7, settings, SOURCE)
    keys, captions = texts(7)
    assert (shard.keys(), shard.captions(), shard.captions(2)) == (keys, captions, captions[:2])
    found = shard.read(0, 7)
    assert [(s.key, s.captions) for s in found] == list(zip(keys, captions, strict=True))
    assert found[0].tokens.dtype == np.uint16
    wanted = draws(7, settings)
    assert wanted.max() > 2**15 and np.array_equal(np.stack([s.tokens for s in found]), wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["0.safetensors"]


@pytest.mark.parametrize(
    ("first", "last", "wanted"),
    [(0, 1, 1), (2, 5, 3), (6, 7, 1), (4, 99, 3), (0, 0, 0), (3, 3, 0), (7, 9, 0), (5, 2, 0)],
)
def test_ranges(tmp_path: Path, first: int, last: int, wanted: int) -> None:
    """Another sample's key with tokens, an error or a crash for a range that is empty or goes
    beyond the end."""
    shard = TokenShard(write(tmp_path / "0.safetensors", 7))
    found = shard.read(first, last)
    assert [s.key for s in found] == shard.keys()[first : first + wanted]
    for i, sample in enumerate(found, first):
        assert np.array_equal(sample.tokens, draws(7)[i])


def test_no_samples(tmp_path: Path) -> None:
    """A shard of bad samples alone, that cannot be written or read."""
    shard = TokenShard(write(tmp_path / "0.safetensors", 0))
    assert (shard.count, shard.keys(), shard.captions(), shard.read(0, 5)) == (0, [], [], [])


def test_a_range_costs_its_own_bytes(tmp_path: Path) -> None:
    """A shard that is read into memory for each sample."""
    settings = replace(SETTINGS, grid=32, views=8)
    count = 4000
    path = tmp_path / "0.safetensors"
    tokens = np.zeros((count, 8, 1024), np.uint16)
    tokens[-1] = 7
    write_token_shard(path, *texts(count), tokens, settings)
    del tokens
    assert path.stat().st_size > 64e6
    before = psutil.Process().memory_info().rss
    shard = TokenShard(path)
    assert shard.read(count - 1, count)[0].tokens.min() == 7
    assert not shard.read(17, 20)[0].tokens.any()
    assert psutil.Process().memory_info().rss - before < 16e6


def test_the_same_content_is_the_same_bytes(tmp_path: Path) -> None:
    """Entries of the header in an order that changes from file to file, as safetensors has it."""
    written = {write(tmp_path / f"{i}.safetensors", 3).read_bytes() for i in range(8)}
    assert len(written) == 1


@pytest.mark.parametrize("key", ["\udcff\udc80", "\ud83d", "é/ü", "𝄞", "a\0b", '"'])
def test_keys_need_not_be_unicode(tmp_path: Path, key: str) -> None:
    """A run of hours ended by one file name of the web."""
    path = tmp_path / "0.safetensors"
    write_token_shard(path, [key], [["a 𝄞 caption"]], draws(1), SETTINGS)
    assert TokenShard(path).read(0, 1)[0].key == key
    assert TokenShard(path).captions() == [["a 𝄞 caption"]]


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="numpy") as file:
        return dict(json.loads(file.metadata()[HEADER]))


def contents(**changes: np.ndarray) -> dict[str, np.ndarray]:
    texts = {name: np.frombuffer(b"[]", np.uint8) for name in ("keys", "captions")}
    return {"tokens": np.zeros((0, 2, 16), np.uint16), **texts, **changes}


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("missing", ""),
        ("empty", ""),
        ("cut", ""),
        ("rubbish", ""),
        ("weights", "format None"),
        ("version", "format 'dalle1-tokens-2'"),
        ("settings", "unknown"),
        ("views", r"U16 \[0, 3, 16\]"),
        ("type", r"I32 \[0, 2, 16\]"),
        ("no tokens", "tokens"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, damage: str, why: str) -> None:
    """Weights, half a copy or a later version's file taken for tokens; a traceback that does not
    say which file."""
    path = write(tmp_path / "0.safetensors", 0 if damage in ("views", "type") else 5)
    header, data = header_of(path), path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "rubbish":
        path.write_bytes(struct.pack("<Q", 2**62) + data[8:])
    elif damage == "weights":
        save_file({"w": np.zeros(3, np.float32)}, path)
    else:
        changed = contents()
        if damage == "version":
            header["format"] = FORMAT[:-1] + "2"
        elif damage == "settings":
            header["settings"]["unknown"] = 1
        elif damage == "views":
            changed = contents(tokens=np.zeros((0, 3, 16), np.uint16))
        elif damage == "type":
            changed = contents(tokens=np.zeros((0, 2, 16), np.int32))
        else:
            del changed["tokens"]
        save_file(changed, path, {HEADER: json.dumps(header)})
    with pytest.raises(ValueError, match=rf"^data: .*0\.safetensors is no token shard: .*{why}"):
        TokenShard(path)


@pytest.mark.parametrize("keys", [None, b"[1", b"\xff", b"7", b'["a", "b"]'])
def test_damaged_texts_are_named(tmp_path: Path, keys: bytes | None) -> None:
    """Captions with other images' tokens, or an error of JSON that does not say where."""
    path = write(tmp_path / "0.safetensors", 0)
    header, changed = header_of(path), contents()
    if keys is None:
        del changed["keys"]
    else:
        changed["keys"] = np.frombuffer(keys, np.uint8)
    save_file(changed, path, {HEADER: json.dumps(header)})
    for read in (TokenShard(path).keys, TokenShard(path).captions):
        with pytest.raises(ValueError, match=r"0\.safetensors is damaged"):
            read()


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        (np.full((1, 2, 16), 8192), SETTINGS, "from 8192 to 8192: the codebook has 8192"),
        (np.full((1, 2, 16), -1), SETTINGS, "from -1 to -1"),
        (np.zeros((1, 2, 16)), replace(SETTINGS, codebook_size=2**16 + 1), "16 bits hold 65,536"),
        (np.zeros((1, 1, 16)), SETTINGS, r"expected \[1, 2, 16\]"),
        (np.zeros((1, 2, 4, 4)), SETTINGS, r"expected \[1, 2, 16\]"),
        (np.zeros((2, 2, 16)), SETTINGS, "1 keys"),
    ],
)
def test_what_does_not_fit_is_not_written(
    tmp_path: Path, tokens: np.ndarray, settings: TokenSettings, message: str
) -> None:
    """Codes that wrap around to others in 16 bits; tokens of another shape or number."""
    with pytest.raises(ValueError, match=message):
        write_token_shard(tmp_path / "0.safetensors", ["a"], [["b"]], tokens, settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Half a shard left behind, which keeps the disk full; a message without a size."""

    def full(file: Any) -> None:
        raise OSError(number, "no room")

    path = write(tmp_path / "0.safetensors", 3)
    before = path.read_bytes()
    monkeypatch.setattr(format, "flush", full)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(
        OSError,
        match=r"is full: 0\.safetensors needs about 1.\.. kB, 1\.0 kB are free: .* kB are missing",
    ) as caught:
        write(path, 99)
    assert caught.value.errno == number
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def test_other_failures_are_not_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken disk told as a full one."""

    def broken(file: Any) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(format, "flush", broken)
    with pytest.raises(OSError, match="broken"):
        write(tmp_path / "0.safetensors", 3)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_disk_that_is_full_indeed(small_disk: Path) -> None:
    """What a kernel says of a full disk not understood, or a file that cannot be made after room
    was made."""
    settings = replace(SETTINGS, grid=32, views=1)
    write(small_disk / "0.safetensors", 300, settings)
    with pytest.raises(OSError, match=r"is full: .* are free: [\d.]+ kB are missing") as caught:
        write(small_disk / "1.safetensors", 300, settings)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in small_disk.iterdir()] == ["0.safetensors"]
    (small_disk / "0.safetensors").unlink()
    assert TokenShard(write(small_disk / "1.safetensors", 300, settings)).count == 300


def test_former_words_for_bad_samples(tmp_path: Path) -> None:
    """A shard of before this release that does not open, or whose counts vanish from the report."""
    former = {"no picture": 1, "absurd aspect ratio": 2, "json cannot be read": 3, "no caption": 4}
    path = tmp_path / "0.safetensors"
    source = SourceShard("0.tar", 1, former, "")
    write_token_shard(path, *texts(3), draws(3), SETTINGS, source)
    wanted = {"no image": 1, "extreme aspect ratio": 2, "invalid json": 3, "no caption": 4}
    assert TokenShard(path).source == SourceShard("0.tar", 1, wanted, "")
    assert wanted.keys() <= set(CAUSES)

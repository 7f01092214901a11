"""Files of flax, written by the msgpack package as flax does; and files that are hostile."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from dalle1.published.msgpack import MAX_VALUES, read_msgpack

from .dalle_mini_files import flax_bytes, packed_array


def arrays() -> dict[str, Any]:
    g = np.random.default_rng(0)
    types = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
    held: dict[str, Any] = {
        f"of.type.{name}": (10 * g.standard_normal((3, 5))).astype(name) for name in types
    }
    held["of.type.bfloat16"] = torch.randn(2, 3, generator=torch.manual_seed(0)).bfloat16()
    held["number"] = np.full((), 2.5, dtype="float32")
    held["empty"] = np.zeros((0, 4), dtype="float32")
    held["long" + "g" * 60] = g.standard_normal((40, 300)).astype("float32")  # longer lengths
    return held


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(content)
    return path


def test_arrays_of_every_type(tmp_path: Path) -> None:
    """A type taken for another, a shape turned, a length of one byte where there are four."""
    expected = arrays()
    found = read_msgpack(write(tmp_path, flax_bytes(expected)))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        want = value if isinstance(value, torch.Tensor) else torch.from_numpy(value)
        assert found[name].shape == want.shape and found[name].dtype == want.dtype
        assert torch.equal(found[name](), want), name


def test_one_row_alone(tmp_path: Path) -> None:
    """A layer of a stack that is another one."""
    value = np.arange(60, dtype="float32").reshape(3, 4, 5)
    for chunk in (2**30, 44):  # whole, and in parts that end within rows
        array = read_msgpack(write(tmp_path, flax_bytes({"a": value}, chunk)))["a"]
        assert torch.equal(array(), torch.from_numpy(value))
        for i in range(3):
            assert torch.equal(array.row(i), torch.from_numpy(value[i]))


def test_names_in_bytes(tmp_path: Path) -> None:
    """Files of older flax, which packed texts as bytes."""
    content = msgpack.packb({b"kernel": packed_array(np.ones(3, "float32"))}, use_bin_type=True)
    assert read_msgpack(write(tmp_path, content))["kernel"]().tolist() == [1, 1, 1]


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    """A file that is copied into memory as it is opened."""
    value = np.zeros((2**21,), dtype="float32")
    path = write(tmp_path, flax_bytes({"a": value, "b": value}))
    tracemalloc.start()
    read_msgpack(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def map1(name: str, value: bytes) -> bytes:
    return b"\x81" + msgpack.packb(name) + value


def extension(payload: bytes, code: int = 1, claimed: int | None = None) -> bytes:
    size = len(payload) if claimed is None else claimed
    return b"\xc9" + struct.pack(">Ib", size, code) + payload


def array(shape: Any, dtype: Any, content: bytes) -> bytes:
    return extension(msgpack.packb((shape, dtype, content), use_bin_type=True))


def deep(levels: int) -> bytes:
    return b"\x81\xa1a" * levels + b"\x80"


HOSTILE: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "empty": (b"", "got an empty file"),
    "no map": (b"\x93\x01\x02\x03", "byte 0 is 0x93, of no type that flax writes"),
    "a number": (b"\x07", "begins with no map of names"),
    "no arrays": (b"\x80", "holds no arrays"),
    "claims 4 GB of an extension": (
        map1("a", extension(b"", claimed=2**32 - 1)),
        r"'a': 4,294,967,295 bytes are to follow byte 9, and 0 do",
    ),
    "claims 10 GB of numbers": (
        lambda: map1("a", array((50_000, 50_000), "float32", b"1234")),
        r"'a': 4 bytes for a shape of \[50000, 50000\] in float32",
    ),
    "claims bytes that it lacks": (
        map1("a", extension(b"\x93\x91\x01\xa7float32\xc6\xff\xff\xff\xff1234")),
        r"'a': 4,294,967,295 bytes for a shape of \[1\]",
    ),
    "numbers that leave the extension": (
        map1("a", extension(b"\x93\x91\x02\xa7float32\xc4\x081234", claimed=16)) + b"5678",
        "its numbers end elsewhere",
    ),
    "claims many names": (b"\xdf\xff\xff\xff\xff", "1 bytes are to follow byte 5, and 0 do"),
    "a name of 4 GB": (b"\x81\xdb\xff\xff\xff\xff", "expected a name, got byte 0xdb"),
    "many dimensions": (map1("a", array([1] * 9, "float32", b"1234")), "an array of 9 dimensions"),
    "sizes below zero": (map1("a", array((-1, -1), "float32", b"1234")), "a size of -1"),
    "a size that is no number": (map1("a", array((True,), "float32", b"1234")), "a size of True"),
    "sizes beyond 64 bits": (
        map1("a", array((2**63, 2**63), "float32", b"")), r"0 bytes for a shape of \[9223372036854"
    ),
    "no numbers of a huge size": (
        map1("a", array((2**62, 0), "float32", b"")), r"'a': no numbers for a shape of \[4611686"
    ),
    "a type that is not known": (map1("a", array((1,), "object", b"12345678")), "type 'object'"),
    "a type without a name": (map1("a", array((1,), 3, b"1234")), "expected a name"),
    "another extension": (map1("a", extension(b"1234", code=2)), "got extension 2"),
    "a date": (map1("a", extension(b"1234", code=-1)), "got extension -1"),
    "an extension of one byte": (map1("a", extension(b"\x01")), "expected array, got byte 0x01"),
    "an array of two": (map1("a", extension(b"\x92\x01\x01")), "shape, type and numbers"),
    "a text as a leaf": (map1("a", b"\xa1b"), "of no type that flax writes"),
    "a number as a leaf": (map1("step", b"\x07"), "'step': expected an array, got 7"),
    "nil": (map1("a", b"\xc0"), "0xc0, of no type"),
    "names within names": (deep(17), "more than 16 names within names"),
    "a tower of names": (deep(100_000), "more than 16 names within names"),
    "a name twice": (b"\x82\xa1a\x80\xa1a\x80", "'a': a name that is there twice"),
    "a name with a dot": (map1("a.b", b"\x80"), r"'a\.b': a name that"),
    "a name that is no text": (b"\x81\xa2\xff\xfe\x80", "a name that is no UTF-8"),
    "a long name": (b"\x81\xd9\xff" + b"a" * 255 + b"\x80", "holds no arrays"),
    "more behind the end": (
        map1("a", array((1,), "float32", b"1234")) + b"\x00", "1 bytes follow the end"
    ),
    "far too many values": (
        lambda: b"\xdf" + struct.pack(">I", MAX_VALUES) + b"".join(
            msgpack.packb(str(i)) + b"\x80" for i in range(MAX_VALUES)
        ),
        "more than 131,072 values",
    ),
    "a pointer of Git LFS": (b"version https://git-lfs", "git lfs pull"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files(what: str, tmp_path: Path) -> None:
    """A crash, gigabytes taken on a file's word, or numbers from beyond the file."""
    content, message = HOSTILE[what]
    path = write(tmp_path, content() if callable(content) else content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"flax_model\.msgpack: .*{message}"):
        read_msgpack(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (2**26 if what == "far too many values" else 2**22)


def chunked(**changes: Any) -> dict[str, Any]:
    parts = {str(i): packed_array(np.full(2, i, "float32")) for i in range(3)}
    usual = {"__msgpack_chunked_array__": True, "shape": {"0": 3, "1": 2}, "chunks": parts}
    return {name: value for name, value in (usual | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": {"0": 3, "1": 3}}, r"6 numbers in chunks for a shape of \[3, 3\]"),
        ({"shape": {"0": -3, "1": -2}}, "for a shape of"),
        ({"shape": {"0": 3, "2": 2}}, "expected keys 0, 1"),
        ({"shape": {"0": True, "1": 6}}, "expected sizes"),
        ({"shape": None}, "expected a shape and chunks"),
        ({"shape": {str(i): 1 for i in range(9)}}, "an array of 9 dimensions"),
        (
            {"shape": {"0": 2**62, "1": 0}, "chunks": {"0": packed_array(np.zeros(0))}},
            "no numbers for a shape of",
        ),
        ({"chunks": {}}, "expected arrays as chunks"),
        ({"chunks": {"0": 7}}, "expected arrays as chunks"),
        (
            {"chunks": {"0": packed_array(np.zeros(3)), "1": packed_array(np.zeros(3, "int8"))}},
            "chunks of several types",
        ),
        ({"more": packed_array(np.zeros(3))}, "expected a shape and chunks, got"),
    ],
)
def test_chunks_that_do_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """An array that is put together wrongly, or reads past its parts."""
    assert read_msgpack(write(tmp_path, msgpack.packb({"a": chunked()})))["a"]().tolist() == [
        [0, 0], [1, 1], [2, 2],
    ]  # fmt: skip
    path = write(tmp_path, msgpack.packb({"a": chunked(**changes)}))
    with pytest.raises(ValueError, match=f"'a.*{message}"):
        read_msgpack(path)


def test_cut_short_anywhere(tmp_path: Path) -> None:
    """A file whose transfer broke off, which reads as a smaller one."""
    content = flax_bytes({"a.b": np.ones((2, 3), "float32"), "c": np.ones(2, "int8")})
    for size in range(1, len(content)):
        with pytest.raises(ValueError, match="no readable msgpack of flax"):
            read_msgpack(write(tmp_path, content[:size]))


def test_missing(tmp_path: Path) -> None:
    """A traceback for a path that is mistyped."""
    with pytest.raises(ValueError, match=r"nothing\.msgpack: No such file"):
        read_msgpack(tmp_path / "nothing.msgpack")
    with pytest.raises(ValueError, match="Is a directory"):
        read_msgpack(tmp_path)

"""Damage of all kinds for shards: to the bytes of a tar, and to the images and captions in it.

Much of it is to headers, and leaves their checksum right, so that absurd things are claimed by what
is formally a good tar.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from dalle1.common.files import add_file
from dalle1.data.shards.names import is_data
from tests.data.clutter import Members, clutter

BLOCK = 512
T = TypeVar("T")
Files = dict[str, bytes]  # of a sample, by extension
Rng = np.random.Generator
Mutation = Callable[[bytes, Rng], bytes]
FIELDS = {  # of a header: where they begin, how long they are
    "name": (0, 100),
    "mode": (100, 8),
    "owner": (108, 16),
    "size": (124, 12),
    "time": (136, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "device": (329, 16),
    "prefix": (345, 155),
}
OTHER_ENDINGS = (
    *("jpg", "PNG", "webp", "gif", "txt", "json", "x.png", "TXT", "Json", "JpEg"),
    *("input.jpg", "outputs.txt", "en.txt", "0", "", "jpg.", ".jpg"),
)
TYPES = b"\x00" + b"0123456789gxXLKSVMND"
SIZES = (
    *(-(2**80), -(2**31), -1024, -512, -1, 0, 1, 511, 513, 2**20, 2**28, 2**33, 2**50, 2**62),
    *(2**63 - 1, 2**63, 2**64, 2**90),
)
NAMES = (
    *(b"", b".", b"..", b"a", b"a.", b".a", b"a.b.c.txt", b"/a.txt", b"a//b.txt", b"a.txt/"),
    *(b"__meta__", b"__a__/b.txt", b"\xff\xfe.txt", b"a\n.txt", b"\x1b[2J.png", b"../../x.txt"),
    *(b"x" * 99, b"a.__key__", "e\u0301.\u00e9".encode()),
    *(b"._0.png", b"a/._0.txt", b"__MACOSX/._0.png", b"a/Thumbs.db", b".DS_Store", b"0.PNG"),
    *(b"0.input.jpg", b"0.outputs.txt", b"a/.x.y", b"./._"),
)


def number(value: int, length: int = 12) -> bytes:
    """A number as headers have it: octal, or base 256 where it is negative or too large."""
    if 0 <= value < 8 ** (length - 1):
        return b"%0*o\0" % (length - 1, value)
    sign = b"\xff" if value < 0 else b"\x80"
    rest: int = value % 256 ** (length - 1)
    return sign + rest.to_bytes(length - 1, "big")


def signed(header: bytes) -> bytes:
    """A header with the right checksum."""
    start, length = FIELDS["checksum"]
    total = sum(header) - sum(header[start : start + length]) + length * ord(" ")
    return header[:start] + b"%06o\0 " % total + header[start + length :]


def changed(header: bytes, **fields: bytes) -> bytes:
    """A header with other values of some FIELDS, and the right checksum."""
    for name, value in fields.items():
        start, length = FIELDS[name]
        header = header[:start] + value[:length].ljust(length, b"\0") + header[start + length :]
    return header if "checksum" in fields else signed(header)


def headers(data: bytes) -> list[int]:
    """Where headers lie, if they lie at blocks."""
    return [
        i for i in range(0, len(data) - BLOCK + 1, BLOCK) if data[i + 257 : i + 262] == b"ustar"
    ]


def padded(data: bytes) -> bytes:
    """Whole blocks."""
    return data + bytes(-len(data) % BLOCK)


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE, claimed: Any = None) -> bytes:
    """A member of a tar, whose header claims a size of its own."""
    header = changed(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT), type=kind)
    return changed(header, size=number(len(data) if claimed is None else claimed)) + padded(data)


def sparse(name: str, data: bytes, parts: list[tuple[int, int]], size: int) -> bytes:
    """A member of GNU's old sparse format: up to 4 (offset, length) of the file that are not zeros,
    whose bytes are `data`, and the file's size."""
    header = member(name, data, tarfile.GNUTYPE_SPARSE)
    listed = b"".join(number(start) + number(length) for start, length in parts)
    table = listed.ljust(4 * 24, b"\0") + b"\0" + number(size)
    return signed(header[:386] + table + header[386 + len(table) : BLOCK]) + header[BLOCK:]


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE, claimed: Any = None) -> bytes:
    """An extended header in front of a member."""
    return member("./PaxHeaders/x", records, kind, claimed)


def record(key: str, value: str | bytes) -> bytes:
    """A record of an extended header."""
    value = value.encode() if isinstance(value, str) else value
    rest = b" %s=%s\n" % (key.encode(), value)
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length += 1
    return str(length).encode() + rest


# What is done to the bytes of a tar.


def _one(rng: Rng, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def _place(data: bytes, rng: Rng) -> int:
    return int(rng.integers(len(data) + 1))


def _border(data: bytes, rng: Rng) -> int:
    return BLOCK * int(rng.integers(len(data) // BLOCK + 1))


def _header(data: bytes, rng: Rng) -> int | None:
    found = headers(data)
    return _one(rng, found) if found else None


def _filling(length: int, rng: Rng) -> bytes:
    noise = rng.integers(0, 256, length, np.uint8).tobytes()
    digits = rng.integers(ord("0"), ord("9") + 1, length, np.uint8).tobytes()
    octal = rng.integers(ord("0"), ord("7") + 1, length, np.uint8).tobytes()
    return _one(rng, [bytes(length), b"\xff" * length, noise, digits, octal])


def _flipped(data: bytes, low: int, high: int, rng: Rng) -> bytes:
    bits = np.frombuffer(data, np.uint8).copy()
    for place in rng.integers(low, high, int(rng.integers(1, 9))) if high > low else ():
        bits[place] ^= 1 << int(rng.integers(8))
    return bits.tobytes()


def _flip(data: bytes, rng: Rng) -> bytes:
    return _flipped(data, 0, len(data), rng)


def _flip_header(data: bytes, rng: Rng) -> bytes:
    at = _header(data, rng)
    return data if at is None else _flipped(data, at, at + BLOCK, rng)


def _flip_signed(data: bytes, rng: Rng) -> bytes:
    at = _header(data, rng)
    if at is None:
        return data
    data = _flipped(data, at, at + 500, rng)
    return data[:at] + signed(data[at : at + BLOCK]) + data[at + BLOCK :]


def _overwrite(data: bytes, rng: Rng) -> bytes:
    at, length = _place(data, rng), int(2 ** rng.uniform(0, 13))
    return data[:at] + _filling(min(length, len(data) - at), rng) + data[at + length :]


def _overwrite_blocks(data: bytes, rng: Rng) -> bytes:
    found, length = _header(data, rng), BLOCK * int(rng.integers(1, 9))
    at = _border(data, rng) if found is None or rng.random() < 0.5 else found
    return data[:at] + _filling(min(length, len(data) - at), rng) + data[at + length :]


def _cut(data: bytes, rng: Rng) -> bytes:
    return data[: _one(rng, (_place, _border))(data, rng)]


def _cut_end(data: bytes, rng: Rng) -> bytes:
    return data[: len(data.rstrip(b"\0")) + int(rng.integers(0, 1600))]


def _insert(data: bytes, rng: Rng) -> bytes:
    at = _place(data, rng)
    return data[:at] + _filling(int(rng.integers(1, 700)), rng) + data[at:]


def _insert_blocks(data: bytes, rng: Rng) -> bytes:
    at, copied = _border(data, rng), _border(data, rng)
    length = BLOCK * int(rng.integers(1, 4))
    new = data[copied : copied + length] if rng.random() < 0.5 else _filling(length, rng)
    return data[:at] + new + data[at:]


def _delete(data: bytes, rng: Rng) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + int(rng.integers(1, 1500)) :]


def _delete_blocks(data: bytes, rng: Rng) -> bytes:
    at = _border(data, rng)
    return data[:at] + data[at + BLOCK * int(rng.integers(1, 5)) :]


def _members(data: bytes) -> list[bytes]:
    starts = headers(data)
    ends = [*starts[1:], len(data)]
    return [data[: starts[0]], *(data[a:b] for a, b in zip(starts, ends, strict=True))]


def _order(data: bytes, rng: Rng) -> bytes:
    """Members that are repeated, swapped or left out."""
    if not headers(data):
        return data
    parts = _members(data)
    i, k = (int(n) for n in rng.integers(0, len(parts), 2))
    what = rng.integers(3)
    if what == 0:
        parts.insert(i, parts[k])
    elif what == 1:
        parts[i], parts[k] = parts[k], parts[i]
    else:
        del parts[i]
    return b"".join(parts)


def _change(data: bytes, rng: Rng, **fields: bytes) -> bytes:
    at = _header(data, rng)
    if at is None:
        return data
    return data[:at] + changed(data[at : at + BLOCK], **fields) + data[at + BLOCK :]


def _size(data: bytes, rng: Rng) -> bytes:
    near = int(rng.integers(0, 2 * len(data) + 1))
    rubbish = _filling(12, rng)
    back = number(-BLOCK * int(rng.integers(1, 3)))  # to this header, or one before it
    value = _one(rng, [rubbish, number(near), back, back, *map(number, SIZES)])
    return _change(data, rng, size=value)


def _type(data: bytes, rng: Rng) -> bytes:
    value = bytes([_one(rng, TYPES) if rng.random() < 0.8 else int(rng.integers(256))])
    fields = {"type": value}
    if rng.random() < 0.3:
        fields["size"] = number(_one(rng, SIZES))
    return _change(data, rng, **fields)


def _name(data: bytes, rng: Rng) -> bytes:
    value = _one(rng, [*NAMES, _filling(int(rng.integers(1, 101)), rng)])
    fields = {"name": value}
    if rng.random() < 0.3:
        fields["prefix"] = _filling(int(rng.integers(1, 156)), rng)
    return _change(data, rng, **fields)


def _checksum(data: bytes, rng: Rng) -> bytes:
    return _change(data, rng, checksum=_filling(8, rng))


def _other_field(data: bytes, rng: Rng) -> bytes:
    name = _one(rng, ["mode", "owner", "time", "magic", "device"])
    return _change(data, rng, **{name: _filling(FIELDS[name][1], rng)})


def _link(data: bytes, rng: Rng) -> bytes:
    kind = _one(rng, [tarfile.LNKTYPE, tarfile.SYMTYPE])
    return _change(data, rng, type=kind, link=_one(rng, [*NAMES, _filling(100, rng)]))


def _records(rng: Rng) -> bytes:
    size = str(_one(rng, SIZES))
    lists = ",".join(str(_one(rng, SIZES)) for _ in range(int(rng.integers(1, 7))))
    choices = [
        record("size", size),
        record("path", _one(rng, NAMES)),
        record("path", "y" * int(2 ** rng.uniform(1, 14)) + ".txt"),
        record("GNU.sparse.map", lists) + record("GNU.sparse.size", size),
        record("GNU.sparse.size", size),
        record("GNU.sparse.realsize", size) + record("GNU.sparse.name", "a.txt"),
        record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0"),
        record("hdrcharset", "BINARY") + record("path", b"\xff.txt"),
        record("hdrcharset", _filling(9, rng)),
        record("mtime", "1e999") + record("uid", "x"),
        b"0 a=b\n",
        b"999999 path=z.txt\n",
        b"5 a=b",
        b"9" * int(2 ** rng.uniform(1, 13)),
        _filling(int(rng.integers(1, 1500)), rng),
    ]
    return b"".join(_one(rng, choices) for _ in range(int(rng.integers(1, 4))))


def _longer_header(data: bytes, rng: Rng) -> bytes:
    """An extended header in front of a member, or many."""
    at = _header(data, rng)
    if at is None:
        return data
    claimed = _one(rng, SIZES) if rng.random() < 0.25 else None
    if rng.random() < 0.3:
        kind = _one(rng, [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
        name = _one(rng, [*NAMES, b"z/" * 700 + b"a.txt\0", _filling(700, rng)])
        new = member("././@LongLink", name, kind, claimed)
    else:
        kind = _one(rng, [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE])
        new = pax(_records(rng), kind, claimed)
    times = 1 if rng.random() < 0.95 else int(rng.integers(2, 1500))
    return data[:at] + new[: 2 * BLOCK if times > 1 else None] * times + data[at:]


def _sparse(data: bytes, rng: Rng) -> bytes:
    """A sparse member in front of another one, or in its place."""
    at = _header(data, rng)
    if at is None:
        return data

    def anything() -> int:
        return int(rng.integers(0, 2000)) if rng.random() < 0.5 else _one(rng, SIZES)

    parts = [(anything(), anything()) for _ in range(int(rng.integers(0, 5)))]
    new = sparse(f"s{rng.integers(9)}.txt", _filling(int(rng.integers(0, 900)), rng), parts, 0)
    new = signed(new[:483] + number(anything()) + new[495:BLOCK]) + new[BLOCK:]
    if rng.random() < 0.2:  # as if blocks with more of the map came
        new = signed(new[:482] + b"\1" + new[483:BLOCK]) + new[BLOCK:]
    return data[:at] + new + data[at + BLOCK * int(rng.integers(2)) :]


def _splice(data: bytes, rng: Rng) -> bytes:
    """A part of another file."""
    strange = member("strange.txt", b"of another tar") + member("strange.jpg", b"\xff\xd8\xff\xe0")
    page = b"<html><head><title>503 Service Unavailable</title></head></html>\n"
    other = _one(rng, [strange, page, zlib.compress(strange), b"\x1f\x8b\x08\x00" + bytes(600)])
    at, begin = _place(data, rng), int(rng.integers(len(other)))
    if rng.random() < 0.5:
        at, begin = _border(data, rng), 0
    return data[:at] + other[begin:] + (data[at:] if rng.random() < 0.5 else b"")


def _clutter(data: bytes, rng: Rng) -> bytes:
    """Files that are no part of the data between two members."""
    at = _header(data, rng)
    if at is None:
        return data
    name = data[at : at + FIELDS["name"][1]].rstrip(b"\0").decode(errors="replace")[:60]
    files = clutter(name if is_data(name) else "a.png", _filling(300, rng), rng)
    return data[:at] + b"".join(member(*file) for file in files) + data[at:]


def _repeat(data: bytes, rng: Rng) -> bytes:
    """The tar behind itself, with or without an end mark between the two."""
    return (data if rng.random() < 0.5 else padded(data.rstrip(b"\0"))) + data


TAR: dict[Mutation, int] = {  # and how often they are taken
    **{_flip: 2, _flip_header: 3, _flip_signed: 5, _overwrite: 3, _overwrite_blocks: 4},
    **{_cut: 4, _cut_end: 2, _insert: 2, _insert_blocks: 3, _delete: 2, _delete_blocks: 3},
    **{_order: 3, _size: 6, _type: 5, _name: 4, _checksum: 1, _other_field: 2, _link: 2},
    **{_longer_header: 8, _sparse: 5, _splice: 3, _repeat: 1, _clutter: 3},
}


def _drawn(mutations: dict[Mutation, int], rng: Rng) -> Mutation:
    chances = np.array(list(mutations.values()), float)
    return list(mutations)[int(rng.choice(len(mutations), p=chances / chances.sum()))]


def mutate(data: bytes, rng: Rng) -> bytes:
    """The bytes of a tar with one to a few mutations."""
    for _ in range(int(rng.choice([1, 1, 1, 2, 3, 6]))):
        data = _drawn(TAR, rng)(data, rng)
    return data


# What is done to the files of a sample.


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiny_png(width: int, height: int, depth: int = 8, color: int = 2, rows: bytes = b"") -> bytes:
    """A PNG with the size that its header claims, and whatever pixels."""
    size = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + pixels + chunk(b"IEND", b"")


def _resized(data: bytes, rng: Rng) -> bytes:
    """Another width and height in the header."""
    some = (0, 1, 3, 200, 7000, 16383, 60000, 65535)
    w, h = int(_one(rng, some)), int(_one(rng, some))
    if data.startswith(b"\x89PNG"):
        return data[:8] + chunk(b"IHDR", struct.pack(">II", w, h) + data[24:29]) + data[33:]
    frames = [i for mark in (b"\xff\xc0", b"\xff\xc2") if (i := data.find(mark)) > 0]
    if data.startswith(b"\xff\xd8") and frames:
        at = frames[0] + 5
        return data[:at] + struct.pack(">HH", h, w) + data[at + 4 :]
    if data.startswith(b"RIFF"):
        return data[:20] + _filling(10, rng) + data[30:]
    if data.startswith(b"GIF"):
        return data[:6] + struct.pack("<HH", w, h) + data[10:]
    return _flip(data, rng)


def _flip_front(data: bytes, rng: Rng) -> bytes:
    return _flipped(data, 0, min(len(data), int(rng.choice([16, 64, 700]))), rng)


def _no_image(data: bytes, rng: Rng) -> bytes:
    canvas = b"WEBPVP8X\x0a\0\0\0" + b"\x02\0\0\0" + b"\xff" * 6  # 2^24 pixels wide and high
    choices = [
        *(b"", bytes(900), b"<html>404</html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        *(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", b"%PDF-1.4\n"),
        *(data[:2], b"GIF89a", b"BM" + bytes(60), b"II*\0" + b"\xff" * 40, b"P6 9 9 255\n"),
        *(data + data, data[::-1], tiny_png(60_000, 60_000), tiny_png(7_000, 7_000)),
        *(tiny_png(0, 0), tiny_png(1, 7_000), tiny_png(9, 9, 16, 0), tiny_png(9, 9, 3, 5)),
        b"RIFF\xff\xff\xff\xff" + canvas + bytes(40),
    ]
    return _one(rng, choices)


IMAGE: dict[Mutation, int] = {
    **{_flip: 2, _flip_front: 4, _overwrite: 2, _cut: 3, _insert: 1, _delete: 2},
    **{_resized: 4, _no_image: 5},
}


def caption_rubbish(rng: Rng) -> bytes:
    """A caption that is strange, or none."""
    words = [
        "a red cat",
        "漢字の説明",
        "قطة حمراء",
        "लाल बिल्ली",
        "🐈‍⬛ 🟥",
        "\ufeffmark",
        "\u200b",
        "x\0y",
    ]
    text = _one(rng, words)
    choices = [
        *(b"", b" \r\n\t", b"\0\0\0", b"\xff\xfe", b"B\xe4r", b"\xed\xa0\x80", b"\xf0\x9f"),
        *(text.encode(), text.encode("utf-16"), text.encode("utf-8-sig")),
        text.encode() * int(2 ** rng.uniform(0, 12)),
        _filling(int(rng.integers(1, 200)), rng),
    ]
    return _one(rng, choices)


def json_rubbish(rng: Rng) -> bytes:
    """A json that is strange, or none."""
    deep = int(2 ** rng.uniform(1, 17))
    values: list[Any] = [None, 7, True, "", [], [[]], ["a", 7, ""], {"caption": "x"}, float("nan")]
    choices = [
        *(b"", b"{", b"null", b"[1, 2]", b'"caption"', b"NaN", b"\xff", b'{"caption": }'),
        *(b"[" * deep, b'{"caption":' * deep, b'{"caption": ' + b"9" * 6000 + b"}"),
        *(b'{"caption": "\\ud83d"}', b'{"caption": "\\ud83d\\ude00"}', b'{"caption": "\\u0000"}'),
        json.dumps({"caption": _one(rng, values)}).encode(),
        json.dumps({"caption": "latin"}).encode("utf-16"),
        b'\xef\xbb\xbf{"caption": "mark"}',
        _filling(int(rng.integers(1, 200)), rng),
    ]
    return _one(rng, choices)


def mutated_sample(files: Files, rng: Rng) -> Files:
    """A sample with one of its files damaged, renamed, left out or repeated."""
    files = dict(files)
    name = _one(rng, list(files))
    what = rng.random()
    if what < 0.06:
        del files[name]
    elif what < 0.12:
        files[str(_one(rng, OTHER_ENDINGS))] = files.pop(name)
    elif what < 0.15:
        files[name.upper()] = files[name]
    elif name == "txt":
        files[name] = caption_rubbish(rng)
    elif name == "json":
        files[name] = json_rubbish(rng)
    else:
        files[name] = _drawn(IMAGE, rng)(files[name], rng)
    return files


def tar_of(samples: dict[str, Files], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """The bytes of a tar with these samples."""
    members = [
        (f"{key}.{end}", data) for key, files in samples.items() for end, data in files.items()
    ]
    return tar_of_members(members, format)


def tar_of_members(members: Members, format: int = tarfile.USTAR_FORMAT) -> bytes:
    """The bytes of a tar with these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            add_file(tar, name, data)
    return buffer.getvalue()

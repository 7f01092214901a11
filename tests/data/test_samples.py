"""What is wrong with samples, by cause; images of every kind as RGB; captions of every script."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import struct
import subprocess
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalle1.common.images import to_rgb
from dalle1.data.samples import (
    CAPTION_TOO_LARGE,
    CAUSES,
    DAMAGED,
    DUPLICATE_KEY,
    EMPTY_CAPTION,
    EXTREME_ASPECT,
    IMAGE_KEYS,
    IMAGE_TOO_LARGE,
    INVALID_JSON,
    MAX_PIXELS,
    MAX_TEXT,
    MISSING,
    NO_CAPTION,
    NO_IMAGE,
    NOT_UTF8,
    UNREADABLE,
    BadSample,
    RawSample,
    caption_keys,
    caption_of,
    captions_of,
    image_of,
)
from dalle1.data.transforms import read_image
from tests.data.mutations import chunk, tiny_png

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refusal(read: Callable[[], Any]) -> str:
    with pytest.raises(BadSample) as caught:
        read()
    assert str(caught.value) == caught.value.cause
    return caught.value.cause


GOOD = encoded(NOISE)
JPEG = encoded(NOISE, "JPEG")


def with_txt(txt: bytes) -> tuple[RawSample, str]:
    return {"__key__": "a", "png": GOOD, "txt": txt}, "txt"


def with_json(content: Any, key: str = "alt") -> tuple[RawSample, str]:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return {"__key__": "a", "png": GOOD, "json": data}, key


def with_image(data: bytes, extension: str = "png") -> tuple[RawSample, str]:
    return {"__key__": "a", extension: data, "txt": b"a red cat"}, "txt"


BAD = [
    (NO_IMAGE, {"__key__": "a", "txt": b"a red cat"}, "txt"),
    (NO_IMAGE, *with_image(GOOD, "gif")),
    (NO_IMAGE, *with_image(GOOD, "seg.png")),
    (UNREADABLE, *with_image(b"")),
    (UNREADABLE, *with_image(bytes(5000))),
    (UNREADABLE, *with_image(b"<html>404</html>", "jpg")),
    (UNREADABLE, *with_image(JPEG[: len(JPEG) // 2], "jpg")),
    (UNREADABLE, *with_image(tiny_png(9, 9))),
    (IMAGE_TOO_LARGE, *with_image(tiny_png(60_000, 60_000))),
    (IMAGE_TOO_LARGE, *with_image(tiny_png(8_000, 8_000))),
    (EXTREME_ASPECT, *with_image(encoded(np.zeros((2, 99, 3), np.uint8)))),
    (EXTREME_ASPECT, *with_image(encoded(np.zeros((99, 2, 3), np.uint8)))),
    (NO_CAPTION, {"__key__": "a", "png": GOOD}, "txt"),
    (NO_CAPTION, {"__key__": "a", "png": GOOD, "txt": b"x"}, "alt"),
    *((NO_CAPTION, *with_json(text)) for text in (b"{}", b"[]", b'["alt"]', b"7", b'"alt"')),
    *((NO_CAPTION, *with_json(text)) for text in (b"null", b"true", b"NaN")),
    (NO_CAPTION, *with_json({"alt": "x"}, "title")),
    *(
        (EMPTY_CAPTION, *with_txt(text))
        for text in (b"", b" ", b" \r\n\t\f ", b"\0\0\0", b"\n\0 \0")
    ),
    *(
        (EMPTY_CAPTION, *with_txt(text.encode()))
        for text in ("\ufeff", "\ufeff \n", "\u00a0\u2003\u3000")
    ),
    *(
        (EMPTY_CAPTION, *with_json({"alt": value}))
        for value in (None, "", " \n", 7, [], [7, ""], {"a": 1})
    ),
    (EMPTY_CAPTION, *with_json(b'{"alt": NaN}')),
    *((NOT_UTF8, *with_txt(text)) for text in (b"B\xe4r", b"\xed\xa0\x80", b"a\xff", b"\xf0\x9f")),
    (NOT_UTF8, *with_txt("a red cat".encode("utf-16"))),
    (NOT_UTF8, *with_json(b'{"alt": "B\xe4r"}')),
    *(
        (INVALID_JSON, *with_json(text))
        for text in (b"", b"{", b"{'alt': 'x'}", b'{"alt": "x"} {}')
    ),
    (INVALID_JSON, *with_json(b"[" * 10**5)),
    (INVALID_JSON, *with_json(b'{"alt": ' * 10**5)),
    (CAPTION_TOO_LARGE, *with_txt(b"x" * (MAX_TEXT + 1))),
    (CAPTION_TOO_LARGE, *with_json({"alt": "x", "exif": "x" * MAX_TEXT})),
]


def cause_of(sample: RawSample, caption_key: str) -> str:
    """Why the reader skips it."""

    def read() -> None:
        captions_of(sample, caption_key)
        read_image(image_of(sample), MAX_PIXELS, max_aspect=10)

    return refusal(read)


@pytest.mark.parametrize(("cause", "sample", "caption_key"), BAD)
def test_causes(cause: str, sample: RawSample, caption_key: str) -> None:
    """A bad sample that ends a run, is trained on, or is counted under another name."""
    assert cause_of(sample, caption_key) == cause


def test_every_cause_is_tested() -> None:
    """A cause that nothing raises, or one that is not counted as it is not listed."""
    of_shards = {DUPLICATE_KEY, DAMAGED, MISSING}
    assert {cause_of(sample, key) for _, sample, key in BAD} | of_shards == set(CAUSES)
    assert len(CAUSES) == len(set(CAUSES))


# Images.


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.asarray(share * pixels + (1 - share) * 255)


def close(found: np.ndarray, wanted: np.ndarray, most: float = 0) -> bool:
    assert found.dtype == np.uint8 and found.shape == (*wanted.shape[:2], 3)
    return bool(np.abs(found - np.asarray(wanted, float)).max() <= most)


GREY, ALPHA = NOISE[..., 0], NOISE[..., 1]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
def test_grey(kind: str) -> None:
    """Grey images refused, or with levels that moved."""
    assert close(read_image(encoded(GREY, kind)), GREY[..., None])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_one_bit(kind: str) -> None:
    """Black and white as 0 and 1."""
    bits = GREY > 128
    image = Image.fromarray(bits)
    assert image.mode == "1"
    assert close(read_image(encoded(image, kind)), 255 * bits[..., None])


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_palettes(kind: str) -> None:
    """Indices taken for levels."""
    palette = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(GREY, "L")
    image = image.convert("P")
    image.putpalette(palette.tobytes())
    assert close(read_image(encoded(image, kind)), palette[GREY])


@pytest.mark.parametrize(
    ("kind", "transparency"),
    [("PNG", 3), ("GIF", 3), ("PNG", bytes([255, 0, 100, 0, 255]))],
)
def test_palettes_with_transparency(kind: str, transparency: int | bytes) -> None:
    """A transparent background in whatever color lies under it, black most of the time."""
    palette = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
    indices = GREY % 5
    image = Image.fromarray(indices, "L").convert("P")
    image.putpalette(palette.tobytes())
    alphas = np.full(256, 255)
    if isinstance(transparency, int):
        alphas[transparency] = 0
    else:
        alphas[: len(transparency)] = list(transparency)
    found = read_image(encoded(image, kind, transparency=transparency, optimize=False))
    assert close(found, on_white(palette[indices], alphas[indices]), 1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_transparency(kind: str) -> None:
    """Transparent parts in black, or alpha dropped."""
    rgba = np.concatenate([NOISE, ALPHA[..., None]], axis=2)
    lossless: Any = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert close(read_image(encoded(rgba, kind, **lossless)), on_white(NOISE, ALPHA), 1)
    if kind != "WEBP":  # which has no grey
        both = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
        assert close(read_image(encoded(both, kind)), on_white(GREY[..., None], ALPHA), 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_a_transparent_color(mode: str) -> None:
    """PNG's transparency of images without alpha overlooked."""
    image = Image.fromarray(NOISE).convert(mode)
    plain = np.asarray(image.convert("RGB"))
    key: Any = image.getpixel((5, 7))
    found = read_image(encoded(image, transparency=key))
    seen = np.where((plain == plain[7, 5]).all(2, keepdims=True), 255, plain)
    assert close(found, seen) and (found[7, 5] == 255).all()


INKS = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 200, 90, 0), (30, 60, 90, 120), (0, 0, 0, 255)]


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk(ink: tuple[int, int, int, int], adobe: bool) -> None:
    """Negatives: the inks of JPEGs are stored inverted, as Adobe's programs do."""
    data = encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
    mark = data.index(b"\xff\xee\x00\x0eAdobe")
    if not adobe:
        data = data[:mark] + data[mark + 16 :]
    paper = 255 - np.array(ink)
    assert close(read_image(data), np.full((16, 16, 3), paper[:3] * paper[3] / 255), 2)
    tiff = encoded(Image.new("CMYK", (16, 16), ink), "TIFF")
    assert close(read_image(tiff), np.full((16, 16, 3), paper[:3] * paper[3] / 255), 1)


def test_ycck() -> None:
    """Adobe's other CMYK: three of the inks as brightness and color, inverted as well."""
    # What is stored is 255 - ink, here brightness 200, no color, 255 - black.
    data = encoded(Image.new("CMYK", (16, 16), (55, 127, 127, 0)), "JPEG", quality=100)
    place = data.index(b"Adobe") + 11
    assert data[place] == 0
    found = read_image(data[:place] + b"\2" + data[place + 1 :])
    assert close(found, np.full((16, 16, 3), 55), 2)


def test_sixteen_bits_of_grey() -> None:
    """All that is brighter than 255 of 65,535 in white."""
    values = np.linspace(0, 65535, 24 * 20).astype(">u2").reshape(20, 24)
    values[0, :4] = [0, 255, 257, 65535]
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    found = read_image(tiny_png(24, 20, depth=16, color=0, rows=rows))
    assert close(found, np.round(values.astype(float) / 257)[..., None])
    tiff = encoded(Image.fromarray(values.astype(np.uint16)), "TIFF")
    assert close(read_image(tiff), np.round(values.astype(float) / 257)[..., None])


def test_sixteen_bits_of_color() -> None:
    """The low bytes taken for the high ones."""
    values = RNG.integers(0, 65536, (20, 24, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    found = read_image(tiny_png(24, 20, depth=16, color=2, rows=rows))
    assert close(found, values.astype(float) / 257, 1)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations(kind: str) -> None:
    """The last frame, a mix of several, or frames stacked."""
    colors = ("red", "green", "blue")
    first, *rest = (Image.new("RGB", (16, 12), color) for color in colors)
    options: Any = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=rest, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3  # type: ignore[attr-defined]
    assert close(read_image(data), np.full((12, 16, 3), [255, 0, 0]))


def with_exif(orientation: Any) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),  # clockwise
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "TIFF", "grey PNG"])
def test_exif_orientations(kind: str, orientation: int) -> None:
    """Photographs that lie on their side, or are mirrored, or turned twice."""
    pixels = NOISE
    if kind == "JPEG":  # smooth, so that little is lost
        y, x = np.mgrid[:48, :64]
        pixels = np.stack([5 * y, 3 * x, 0 * x], axis=2).astype(np.uint8)
    image = Image.fromarray(GREY if kind == "grey PNG" else pixels)
    options: Any = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    options |= {"lossless": True} if kind == "WEBP" else {}
    data = encoded(image, kind.rpartition(" ")[2], exif=with_exif(orientation), **options)
    wanted = np.asarray(image.convert("RGB"))
    assert close(read_image(data), TURNED[orientation](wanted), 8 if kind == "JPEG" else 0)
    with Image.open(io.BytesIO(data)) as opened:
        once = to_rgb(opened)
    assert close(np.asarray(to_rgb(once)), np.asarray(once))  # as where a caller has done it


@pytest.mark.parametrize("orientation", [0, 9, 65535, None])
def test_orientations_that_are_none(orientation: Any) -> None:
    """An image lost because its EXIF says nonsense; copies of images that need no turning."""
    exif = Image.Exif() if orientation is None else with_exif(orientation)
    data = encoded(NOISE, exif=exif.tobytes())
    assert close(read_image(data), NOISE)
    with Image.open(io.BytesIO(data)) as image:
        assert to_rgb(image) is image
    assert close(np.asarray(image), NOISE)  # also after the file is closed


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"rubbish", b"II*\0\xff\xff\xff\xff", b"MM\0*"])
def test_rubbish_for_exif(kind: str, exif: bytes) -> None:
    """A good image lost because of what nobody looks at."""
    flat = np.full((16, 16, 3), 77, np.uint8)
    data = encoded(flat, kind, exif=exif)
    assert exif in data and close(read_image(data), flat, 2)


def test_names_say_nothing() -> None:
    """Images refused, or read wrongly, where the ending is another format's."""
    kinds: list[tuple[str, Any]] = [("PNG", {}), ("WEBP", {"lossless": True}), ("GIF", {})]
    kinds += [("BMP", {}), ("TIFF", {}), ("JPEG", {"quality": 95})]
    flat = np.full((16, 12, 3), [255, 0, 0], np.uint8)
    for kind, options in kinds:
        data = encoded(flat, kind, **options)
        for extension in IMAGE_KEYS:
            sample = {"__key__": "a", "txt": b"x", extension: data}
            assert close(read_image(image_of(sample)), flat, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "progressive JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_images(kind: str) -> None:
    """Half an image, grey below, trained on; or an error that is not BadSample."""
    options: Any = {"progressive": True} if "progressive" in kind else {}
    data = encoded(NOISE, kind.rpartition(" ")[2], **options)
    assert read_image(data).shape == NOISE.shape
    for length in {*range(0, 60, 7), *range(60, len(data) * 9 // 10, 61)}:
        assert refusal(partial(read_image, data[:length])) == UNREADABLE, length


def test_limits_are_inclusive() -> None:
    """Images of exactly the size that is allowed refused, or larger ones let through."""
    data = encoded(NOISE)
    assert read_image(data, 480, 1.2).shape == (20, 24, 3)
    assert refusal(lambda: read_image(data, max_pixels=479)) == IMAGE_TOO_LARGE
    assert refusal(lambda: read_image(data, max_aspect=1.19)) == EXTREME_ASPECT
    tall = encoded(NOISE.transpose(1, 0, 2))
    assert read_image(tall, 480, 1.2).shape == (24, 20, 3)
    assert refusal(lambda: read_image(tall, max_aspect=1.19)) == EXTREME_ASPECT


def test_limits_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings for each large image, or a limit of ours that PIL's smaller one makes useless."""
    data = encoded(NOISE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for limit in (300, 200, 1, None):
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            assert close(read_image(data), NOISE)
            assert refusal(lambda: read_image(data, max_pixels=479)) == IMAGE_TOO_LARGE
            assert limit == Image.MAX_IMAGE_PIXELS


def bombs() -> dict[str, bytes]:
    """A few bytes that claim to be an image of billions of pixels."""
    size = struct.pack("<HH", 60_000, 60_000)
    canvas = b"VP8X" + struct.pack("<IB3x", 10, 2) + b"\x5f\xea\0" * 2
    webp = canvas + b"ANIM" + struct.pack("<I6x", 6)
    bitmap = struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    frame = struct.pack(">BHHB", 8, 60_000, 60_000, 3) + b"\1\x11\0\2\x11\1\3\x11\1"
    jpeg = encoded(NOISE, "JPEG")
    at = jpeg.index(b"\xff\xc0")
    tiff = encoded(NOISE, "TIFF")
    for tag in (256, 257):  # width and height
        place = tiff.index(struct.pack("<HHI", tag, 4, 1))
        tiff = tiff[: place + 8] + struct.pack("<I", 60_000) + tiff[place + 12 :]
    whole = tiny_png(60_000, 60_000, rows=bytes(10**6))
    return {
        "PNG": whole,
        "PNG with text first": whole[:33] + chunk(b"tEXt", b"a\0b") + whole[33:],
        "GIF": b"GIF89a" + size + b"\0\0\0,\0\0\0\0" + size + b"\0\2\2D\1\0;",
        "BMP": b"BM" + struct.pack("<IHHI", 99, 0, 0, 54) + bitmap + bytes(99),
        "JPEG": jpeg[:at] + b"\xff\xc0\0\x11" + frame + jpeg[at + 19 :],
        "TIFF": tiff,
        "WEBP": b"RIFF" + struct.pack("<I", len(webp) + 4) + b"WEBP" + webp,
    }


def _refused_in_little_memory(data: bytes, causes: set[str]) -> None:
    """Ends the process with 0 if the image is refused though hardly any memory is left."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
    try:
        for limit in (MAX_PIXELS, None):
            assert refusal(partial(read_image, data, limit)) in causes
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
@pytest.mark.parametrize("name", bombs())
def test_decompression_bombs(name: str) -> None:
    """A hundred bytes that take all memory, and the run with it."""
    # A decoder that asked for the memory would get none: UNREADABLE. WebP's asks by itself.
    causes = {IMAGE_TOO_LARGE, UNREADABLE} if name == "WEBP" else {IMAGE_TOO_LARGE}
    arguments = (bombs()[name], causes)
    process = multiprocessing.get_context("fork").Process(
        target=_refused_in_little_memory, args=arguments
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    "data",
    [
        EPS,
        b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"P6 2 2 255\n" + bytes(12),
        encoded(NOISE, "ICO"),
        encoded(NOISE, "TGA"),
    ],
)
def test_other_formats(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs started by what lies in an image's place: Pillow hands EPS to Ghostscript."""

    def started(*_: Any, **__: Any) -> None:
        raise SystemExit("a program was started")

    for module, name in ((subprocess, "Popen"), (os, "system"), (os, "posix_spawn")):
        monkeypatch.setattr(module, name, started)
    assert refusal(lambda: read_image(data)) == UNREADABLE
    with Image.open(io.BytesIO(EPS)) as image:  # it would be opened, were it not refused
        assert image.format == "EPS"


# Captions.

SCRIPTS = [
    "一只红色的猫坐在垫子上",
    "قطة حمراء على السجادة",  # right to left
    "\u202bقطة\u202c a cat",  # with marks of direction
    "एक लाल बिल्ली क्षत्रिय",  # conjuncts
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 🇩🇪 👍🏽",  # joiners, flags, skin tones
    "e\u0301 and é",  # not composed, and composed
    'quotes " and \\ and \t and <b>',
    "two\nlines",
    "\x1b[2J and \x7f and \ufffd",
]


@pytest.mark.parametrize("text", SCRIPTS)
def test_captions_are_kept_exactly(text: str) -> None:
    """Captions that are normalized, cut at bytes, escaped or turned around."""
    for spaced in (text, f" \r\n{text}\t\n", f"\ufeff{text}", f"{text}\0\0"):
        assert captions_of({"txt": spaced.encode()}, "txt") == [text]
    for ascii_alone in (True, False):
        content = json.dumps({"alt": text}, ensure_ascii=ascii_alone)
        assert captions_of({"json": content.encode()}, "alt") == [text]
        assert captions_of({"json": content.encode("utf-8-sig")}, "alt") == [text]


def test_a_mark_inside_is_kept() -> None:
    """Every U+FEFF taken out, and not the one at the beginning alone."""
    assert caption_of({"txt": "\ufeffa\ufeffb".encode()}, "txt") == "a\ufeffb"


def test_half_surrogates() -> None:
    """Text that no tokenizer, log or terminal takes, from JSON's escapes."""
    for escaped, text in ((r"a \ud83d", "a ?"), (r"\ude00 b", "? b"), (r"\ud83d\ude00", "😀")):
        found = caption_of({"json": b'{"alt": "%s"}' % escaped.encode()}, "alt")
        assert found == text and found.encode().decode() == found


def test_lists_and_lines() -> None:
    """The first of several captions alone, empty ones and numbers among them, or one caption split
    at U+2028 as if it were several."""
    listed = {"json": json.dumps({"alt": ["a", " b ", "", 7, None, ["c"], "\0", "d"]}).encode()}
    assert captions_of(listed, "alt") == ["a", "b", "d"]
    assert caption_of(listed, "alt") == "a"
    odd = {"txt": "\ufeffa\u2028b\x0cc\x85d\r\ufefftwo".encode()}
    assert captions_of(odd, "txt", lines=True) == ["a\u2028b\x0cc\x85d", "two"]
    lines = {"txt": "\ufeffone\r\n\n  two  \n漢字\n".encode()}
    assert captions_of(lines, "txt", lines=True) == ["one", "two", "漢字"]
    assert captions_of(lines, "txt") == ["one\r\n\n  two  \n漢字"]
    assert captions_of(listed, "alt", lines=True) == ["a", "b", "d"]
    assert refusal(lambda: captions_of({"txt": b"\n \r\n"}, "txt", lines=True)) == EMPTY_CAPTION


def test_the_longest_caption() -> None:
    """A limit that is off by one, or that cuts."""
    assert caption_of({"txt": b"x" * MAX_TEXT}, "txt") == "x" * MAX_TEXT


def test_caption_keys() -> None:
    """Hints at keys that hold no text, or an error where the json is rubbish."""
    content = {"alt": "x", "n": 7, "list": ["a", 1], "numbers": [1], "none": None, "empty": []}
    sample: RawSample = {"txt": b"x", "json": json.dumps(content).encode()}
    assert caption_keys(sample) == ["txt", "alt", "list"]
    for rubbish in (b"", b"[1]", b"7", b"null", b"\xff", b"[" * 10**5, b'"alt"', b"NaN"):
        assert caption_keys({"json": rubbish}) == []
    assert caption_keys({}) == []


def test_the_order_of_the_endings() -> None:
    """An image chosen by the order in the tar, so that shards differ by how they were packed."""
    both = {"jpg": b"j", "png": b"p", "webp": b"w"}
    assert image_of(both) == image_of(dict(reversed(both.items()))) == b"p"

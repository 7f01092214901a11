"""What a data set holds: counts, sizes, captions and what is wrong, before a run finds out.

All samples are counted by their names alone, for which the shards' headers are enough; a random
part is read and decoded as training would.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm
from webdataset.tariterators import base_plus_ext

from dalle1.common.images import contact_sheet, to_rgb
from dalle1.data.samples import IMAGE_KEYS, NO_CAPTION, Bad, caption_of, image_of
from dalle1.data.shards.index import find_shards
from dalle1.data.shards.tar import META, Raw
from dalle1.data.transforms import FORMATS

QUANTILES = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}
MEASURES = ("width", "height", "width / height", "bytes", "characters", "words")
RATIOS = (1 / 2, 2.0)  # appendix C: pictures outside are not trained on
SIDE = 160  # pixels of a picture on the sheet
SHEET_ROWS = 8
DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error)


@dataclass
class Report:
    """What `inspect` found. Counts are of all samples up to `damaged`; the rest is of a part."""

    data: str
    caption_key: str
    shards: int = 0  # 0: a folder of pairs
    samples: int = 0
    bytes: int = 0
    parts: Counter[str] = field(default_factory=Counter)  # samples that have a txt, a jpg ...
    without_picture: int = 0
    without_caption: int = 0
    duplicates: int = 0  # samples whose key another one had before
    damaged: list[str] = field(default_factory=list)  # shards that are cut off or no tar
    looked_at: int = 0
    good: int = 0
    bad: Counter[str] = field(default_factory=Counter)  # by cause; a sample may have two
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    quantiles: dict[str, list[float]] = field(default_factory=dict)  # MEASURES at QUANTILES
    outside_ratios: float = 0.0  # share of pictures
    json_keys: Counter[str] = field(default_factory=Counter)  # those that hold text
    pictures: list[tuple[Image.Image, str]] = field(default_factory=list)  # good samples, drawn


@dataclass(frozen=True)
class _Found:
    """A sample by its names, not read yet."""

    key: str
    parts: frozenset[str]
    read: Callable[[], Raw]


def inspect(
    data: str,
    caption_key: str = "txt",
    samples: int | None = 1000,
    seed: int = 0,
    pictures: int = 0,
    progress: bool = False,
) -> Report:
    """Looks through shards (a brace pattern or a folder of tars) or a folder of pairs.

    samples: how many are read and decoded, drawn with `seed`; None: all.
    pictures: how many of the good ones are kept for a sheet.

    Raises:
        ValueError: data that does not exist or holds nothing, or a number out of range.
    """
    if (samples is not None and samples < 1) or pictures < 0 or seed < 0:
        raise ValueError(
            "samples must be 1 or more, pictures and seed 0 or more, "
            f"not samples={samples}, pictures={pictures} and seed={seed}"
        )
    shards = [Path(path) for path in find_shards(data)]
    units = shards or _pictures(Path(data))
    if not units:
        raise ValueError(f"data: {data!r} has neither .tar shards nor pictures")
    report = Report(data, caption_key, shards=len(shards))
    hashes = array("Q")  # of the keys: the keys themselves would not fit for a large set
    caption = "txt" if caption_key == "txt" else "json"
    for found in _all(units, bool(shards), report.damaged, "counting" if progress else ""):
        report.samples += 1
        report.parts.update(found.parts)
        report.without_picture += not found.parts.intersection(IMAGE_KEYS)
        report.without_caption += caption not in found.parts
        digest = hashlib.blake2b(found.key.encode(errors="surrogateescape"), digest_size=8)
        hashes.append(int.from_bytes(digest.digest(), "little"))
    report.bytes = sum(path.stat().st_size for path in units)
    if not shards:
        captions = (path.with_suffix(".txt") for path in units)
        report.bytes += sum(path.stat().st_size for path in captions if path.is_file())
    report.duplicates = report.samples - len(np.unique(np.frombuffer(hashes, np.uint64)))

    rng = np.random.default_rng(seed)
    chosen = None
    if samples is not None and samples < report.samples:
        chosen = set(rng.choice(report.samples, samples, replace=False).tolist())
    look = _Look(report, pictures, rng)
    for i, found in enumerate(_all(units, bool(shards), [], "decoding" if progress else "")):
        if chosen is None or i in chosen:
            look.at(found)
    look.end()
    return report


def _pictures(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix[1:].lower() in IMAGE_KEYS]


def _all(units: Sequence[Path], tars: bool, damaged: list[str], progress: str) -> Iterator[_Found]:
    unit = "shard" if tars else "picture"
    for path in tqdm(units, unit=unit, desc=progress, disable=not progress):
        if tars:
            yield from _in_shard(path, damaged)
        else:
            caption = path.with_suffix(".txt")
            files = {path.suffix[1:].lower(): path} | (
                {"txt": caption} if caption.is_file() else {}
            )
            yield _Found(str(path), frozenset(files), partial(_read_files, str(path), files))


def _read_files(key: str, files: dict[str, Path]) -> Raw:
    return {"__key__": key, **{name: path.read_bytes() for name, path in files.items()}}


def _in_shard(path: Path, damaged: list[str]) -> Iterator[_Found]:
    """Samples as the reader groups them: neighbors of one name, the extension from the first dot
    on. Of two neighbors with the same key and extension, which the reader merges, each counts."""
    key, usual = "", 1
    parts: dict[str, tarfile.TarInfo] = {}

    def found() -> _Found:
        return _Found(key, frozenset(parts), partial(_read_members, tar, key, parts))

    try:
        tar = tarfile.open(path)  # noqa: SIM115
    except DAMAGE:
        damaged.append(str(path))
        return
    with tar:
        while True:
            try:
                member = tar.next()
            except DAMAGE:
                damaged.append(str(path))
                if parts:
                    parts.popitem()  # it is the last one's data that end too early
                if len(parts) < usual:
                    parts = {}
                break
            if member is None:
                if not _has_end_mark(tar):
                    damaged.append(str(path))
                    # Between two files nothing says whether the sample had more of them.
                    if len(parts) < usual:
                        parts = {}
                break
            prefix, extension = base_plus_ext(member.name)
            if not member.isreg() or prefix is None or META.match(member.name):
                continue
            extension = extension.lower()
            if prefix != key or extension in parts:
                if parts:
                    yield found()
                    usual = len(parts)
                key, parts = prefix, {}
            parts[extension] = member
        if parts:
            yield found()


def _has_end_mark(tar: tarfile.TarFile) -> bool:
    # A tar that is cut off between two members, or has rubbish there, just ends for tarfile.
    file: Any = tar.fileobj
    try:
        file.seek(tar.offset)
        return bool(file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE)
    except DAMAGE:
        return False


def _read_members(tar: tarfile.TarFile, key: str, parts: dict[str, tarfile.TarInfo]) -> Raw:
    sample: Raw = {"__key__": key}
    for extension, member in parts.items():
        file = tar.extractfile(member)
        assert file is not None  # regular files alone are kept
        sample[extension] = file.read()
    return sample


class _Look:
    """Fills a report with what single samples show."""

    def __init__(self, report: Report, pictures: int, rng: np.random.Generator) -> None:
        self.report, self.most, self.rng = report, pictures, rng
        self.values: dict[str, list[float]] = {name: [] for name in MEASURES}

    def at(self, found: _Found) -> None:
        self.report.looked_at += 1
        try:
            sample = found.read()
        except DAMAGE as error:
            self.report.bad[f"file cannot be read ({type(error).__name__})"] += 1
            return
        picture, caption = self._picture(sample), self._caption(sample)
        if picture is None or caption is None:
            return
        self.report.good += 1
        # Each good sample is among the kept ones with the same probability.
        if len(self.report.pictures) < self.most:
            self.report.pictures.append((_thumbnail(picture), caption))
        elif self.most and (place := int(self.rng.integers(self.report.good))) < self.most:
            self.report.pictures[place] = (_thumbnail(picture), caption)

    def _picture(self, sample: Raw) -> Image.Image | None:
        try:
            data = image_of(sample)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                kind, mode = str(image.format), image.mode
                picture = to_rgb(image)
        except Bad as error:
            self.report.bad[error.cause] += 1
            return None
        except Exception as error:  # whatever a decoder raises on dirt
            self.report.bad[f"picture cannot be decoded ({type(error).__name__})"] += 1
            return None
        self.report.formats[kind] += 1
        self.report.modes[mode] += 1
        values = (picture.width, picture.height, picture.width / picture.height, len(data))
        for name, value in zip(MEASURES, values, strict=False):
            self.values[name].append(value)
        return picture

    def _caption(self, sample: Raw) -> str | None:
        self._json_keys(sample)
        key = self.report.caption_key
        try:
            caption = caption_of(sample, key)
        except Bad as error:
            cause = f"no caption under {key!r}" if error.cause == NO_CAPTION else error.cause
            self.report.bad[cause] += 1
        else:
            self.values["characters"].append(len(caption))
            self.values["words"].append(len(caption.split()))
            return caption
        return None

    def _json_keys(self, sample: Raw) -> None:
        try:
            columns = json.loads(sample.get("json", b"{}"))
        except ValueError:
            return
        if isinstance(columns, dict):
            texts = (k for k, value in columns.items() if isinstance(value, str) and value.strip())
            self.report.json_keys.update(texts)

    def end(self) -> None:
        for name, values in self.values.items():
            if values:
                self.report.quantiles[name] = np.quantile(values, [*QUANTILES.values()]).tolist()
        ratios = self.values["width / height"]
        outside = sum(not RATIOS[0] <= ratio <= RATIOS[1] for ratio in ratios)
        self.report.outside_ratios = outside / max(len(ratios), 1)


def _thumbnail(picture: Image.Image) -> Image.Image:
    """The whole picture in a square, on grey."""
    return ImageOps.pad(picture, (SIDE, SIDE), color=(200, 200, 200))


def draw_sheet(pictures: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """A contact sheet of a report's pictures, numbered from 1, their captions on the left."""
    if not pictures:
        raise ValueError("a sheet needs pictures, and no good sample was found")
    sheets = []
    for start in range(0, len(pictures), SHEET_ROWS):
        part = pictures[start : start + SHEET_ROWS]
        captions = [f"{number}: {text}" for number, (_, text) in enumerate(part, start + 1)]
        sheets.append(contact_sheet([[image] for image, _ in part], captions))
    size = (sum(sheet.width for sheet in sheets), max(sheet.height for sheet in sheets))
    whole = Image.new("RGB", size, "white")
    for i, sheet in enumerate(sheets):
        whole.paste(sheet, (i * sheets[0].width, 0))
    return whole


def describe(report: Report) -> str:
    """The report as tables for people; MB are 1e6 bytes."""
    lines: list[str] = []

    def line(name: str, text: str) -> None:
        lines.append(f"{name:18}{text}")

    def counted(counts: Counter[str]) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in counts.most_common()) or "none"

    line("data", report.data)
    line("shards", f"{report.shards:,}" if report.shards else "none: a folder of pairs")
    line("samples", f"{report.samples:,}, {report.bytes / 1e6:,.1f} MB")
    line("files", counted(report.parts))
    line("without a picture", f"{report.without_picture:,}")
    line("without a caption", f"{report.without_caption:,} (key: {report.caption_key})")
    line("duplicate keys", f"{report.duplicates:,}")
    line("damaged shards", f"{len(report.damaged):,}")
    lines += [f"  {path}" for path in report.damaged]
    part = "all" if report.looked_at == report.samples else "drawn at random"
    lines += ["", f"of {report.looked_at:,} samples ({part})"]
    line("good", f"{report.good:,}")
    bad = report.looked_at - report.good
    line("bad", f"{bad:,}" + ", some for two causes" * (report.bad.total() > bad))
    lines += [f"  {count:,} x {cause}" for cause, count in report.bad.most_common()]
    line("formats", counted(report.formats))
    line("modes", counted(report.modes))
    line("outside 1:2 - 2:1", f"{report.outside_ratios:.1%} of the pictures")
    line("text in the json", counted(report.json_keys))
    lines += ["", " " * 18 + "".join(f"{name:>11}" for name in QUANTILES)]
    for name, values in report.quantiles.items():
        style = ",.2f" if name == "width / height" else ",.0f"
        line(name, "".join(f"{value:>11{style}}" for value in values))
    return "\n".join(lines)

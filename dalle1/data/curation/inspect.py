"""What a data set holds: counts, sizes, captions and what is wrong, before a run finds out.

All samples are counted by their names alone, for which the shards' headers are enough; a random
part is read and decoded as training would. What is remote or compressed is read twice, from its
beginning to its end. Of token shards, captions and settings are told.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from dalle1.common.files import expand_home
from dalle1.common.images import to_rgb
from dalle1.common.progress import progress_bar
from dalle1.data.curation.inspect_sheet import draw_contact_sheet as draw_contact_sheet
from dalle1.data.curation.inspect_sheet import thumbnail
from dalle1.data.samples import (
    DUPLICATE_KEY,
    EMPTY_CAPTION,
    IMAGE_KEYS,
    IMAGE_TOO_LARGE,
    MISSING,
    NO_CAPTION,
    UNREADABLE,
    BadSample,
    RawSample,
    caption_of,
    image_of,
)
from dalle1.data.shards.explain import explain_folder, explain_tars
from dalle1.data.shards.index import TOKENS, find_shards, kind_of, no_images
from dalle1.data.shards.names import count_skipped, is_tar, read_folder
from dalle1.data.shards.tar import Shard, TarSample, is_remote
from dalle1.data.shards.token_shard import TokenShard
from dalle1.data.transforms import opened_image

QUANTILES = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}
MEASURES = ("width", "height", "width / height", "bytes", "characters", "words")
RATIOS = (1 / 2, 2.0)  # appendix C: images outside are not trained on
Units = Sequence[tuple[str, Path | None]]  # shards, or images and their captions


@dataclass
class InspectReport:
    """What `inspect` found. Counts are of all samples up to `damaged`; the rest is of a part."""

    data: str
    caption_key: str
    shards: int = 0  # 0: a folder of pairs
    tokens: str = ""  # what token shards hold
    samples: int = 0
    bytes: int = 0
    parts: Counter[str] = field(default_factory=Counter)  # samples that have a txt, a jpg ...
    without_image: int = 0
    without_caption: int = 0
    duplicates: int = 0  # samples whose key another one had before
    damaged: list[str] = field(default_factory=list)  # shards that are cut off or no tar
    skipped_files: int = 0  # that are no part of the data
    names: str = ""  # what is wrong with those of the files, where images lack captions
    looked_at: int = 0
    good: int = 0
    bad: Counter[str] = field(default_factory=Counter)  # by cause; a sample may have two
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    quantiles: dict[str, list[float]] = field(default_factory=dict)  # MEASURES at QUANTILES
    outside_ratios: float = 0.0  # share of images
    json_keys: Counter[str] = field(default_factory=Counter)  # those that hold text
    images: list[tuple[Image.Image, str]] = field(default_factory=list)  # good samples, drawn


@dataclass(frozen=True)
class _Found:
    """A sample by its names, not read yet."""

    key: str
    parts: frozenset[str]
    read: Callable[[], RawSample]
    merged: int = 0  # samples of the same key behind it, which are read as a part of it
    cause: str = ""  # why training skips it unread
    remote_bytes: int = 0  # of its files, where the shard's size is not known


def inspect(
    data: str,
    caption_key: str = "txt",
    samples: int | None = 1000,
    seed: int = 0,
    images: int = 0,
    progress: bool = False,
) -> InspectReport:
    """Looks through shards or a folder of pairs.

    Args:
        data: as the setting `data` of a run.
        caption_key: txt, or a key of the json.
        samples: how many are read and decoded, a random part; None: all.
        seed: of the random part.
        images: how many of the good ones are kept for a contact sheet.
        progress: whether bars are shown.

    Raises:
        ValueError: data that do not exist or hold nothing, a number out of range, or images of
            token shards.
    """
    if (samples is not None and samples < 1) or images < 0 or seed < 0:
        raise ValueError(
            "samples must be 1 or more, images and seed 0 or more, "
            f"not samples={samples}, images={images} and seed={seed}"
        )
    data = expand_home(data)
    shards = find_shards(data)
    report = InspectReport(data, caption_key, shards=len(shards))
    if kind_of(data, shards) == TOKENS:
        if images:
            raise ValueError(no_images(data))
        _look_at_tokens(report, shards)
        return report
    units: Units = [(address, None) for address in shards]
    if shards and Path(data).is_dir():
        report.skipped_files = count_skipped(data)
    elif not shards:
        folder = read_folder(data)
        units = [(str(image), caption) for image, caption in folder.images.items()]
        report.skipped_files = folder.skipped
    if not units:
        raise ValueError(f"data: {data!r} has neither .tar shards nor images{explain_folder(data)}")
    count = _count(report, units, progress)
    rng = np.random.default_rng(seed)
    chosen = None
    if samples is not None and samples < count:
        chosen = set(rng.choice(count, samples, replace=False).tolist())
    look = _Look(report, images, rng)
    again = InspectReport(data, caption_key, shards=len(shards))
    for i, found in enumerate(_all(units, again, "decoding" if progress else "")):
        if chosen is None or i in chosen:
            look.at(found)
    look.end()
    if report.without_image or report.without_caption:
        report.names = explain_tars(find_shards(data)) if shards else explain_folder(data)
    return report


def _count(report: InspectReport, units: Units, progress: bool) -> int:
    """Fills a report with what names and sizes show; how many samples can be read."""
    hashes = array("Q")  # of the keys: the keys themselves would not fit for a large set
    caption = "txt" if report.caption_key == "txt" else "json"
    for found in _all(units, report, "counting" if progress else ""):
        report.samples += 1 + found.merged
        report.parts.update(found.parts)
        report.without_image += not found.parts.intersection(IMAGE_KEYS)
        report.without_caption += caption not in found.parts
        report.bytes += found.remote_bytes
        hashes.append(_hash(found.key))
    files = [Path(unit) for unit, _ in units if not is_remote(unit)]
    files += [caption for _, caption in units if caption is not None]
    report.bytes += sum(path.stat().st_size for path in files if path.is_file())
    report.duplicates = report.samples - len(np.unique(np.frombuffer(hashes, np.uint64)))
    return len(hashes)


def _hash(key: str) -> int:
    """64 bits of a sample's key."""
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _look_at_tokens(report: InspectReport, shards: Sequence[str]) -> None:
    """Fills a report with what token shards hold."""
    hashes, made = array("Q"), set[str]()
    look = _Look(report, 0, np.random.default_rng(0))
    for path in shards:
        report.bytes += Path(path).stat().st_size
        try:
            shard = TokenShard(path)
            keys, captions, s = shard.keys(), shard.captions(), shard.settings
        except ValueError:
            report.damaged.append(path)
            continue
        hashes.extend(_hash(key) for key in keys)
        made.add(f"{s.grid} x {s.grid} of {s.codebook_size:,}, views {s.views}, codec {s.dvae}")
        for texts in captions:
            look.at_caption(texts[0] if texts else None)
    report.tokens = "; ".join(sorted(made))
    report.samples = report.looked_at = len(hashes)
    report.duplicates = report.samples - len(set(hashes))
    report.without_caption = report.bad[EMPTY_CAPTION]
    look.end()


def _all(units: Units, report: InspectReport, progress: str) -> Iterator[_Found]:
    unit = "shard" if report.shards else "image"
    for address, caption in progress_bar(units, unit=unit, desc=progress, disable=not progress):
        if report.shards:
            yield from _in_shard(address, report)
        else:
            path = Path(address)
            files = {path.suffix[1:].lower(): path} | ({"txt": caption} if caption else {})
            yield _Found(str(path), frozenset(files), partial(_read_files, str(path), files))


def _read_files(key: str, files: dict[str, Path]) -> RawSample:
    return {"__key__": key, **{name: path.read_bytes() for name, path in files.items()}}


def _in_shard(address: str, report: InspectReport) -> Iterator[_Found]:
    """Samples as training reads them, of a tar that can be read from anywhere by its headers alone.

    Raises ValueError where a remote one cannot be read at all, as training does.
    """
    remote = is_remote(address)
    plain = is_tar(address) and not remote
    shard = Shard(address, headers_alone=plain)
    known: set[str] = set()
    try:
        for sample in _intact(shard) if plain else shard:
            parts = frozenset(sample.raw()) - {"__key__"}
            cause = DUPLICATE_KEY if sample.key in known else ""
            cause = cause or (IMAGE_TOO_LARGE if sample.too_large else "")
            known.add(sample.key)
            read = partial(_read_at, address, sample.offset) if plain else sample.raw
            size = sum(member.size for member, _ in sample.files) if remote else 0
            yield _Found(sample.key, parts, read, sample.merged(), cause, size)
    except OSError as error:
        shard.damage = str(error)
    report.skipped_files += shard.skipped
    if remote and shard.damage and not known:
        raise ValueError(f"data: {address} cannot be read: {shard.damage}")
    if shard.damage:
        report.damaged.append(address)


def _intact(shard: Shard) -> Iterator[TarSample]:
    """Samples by their headers, without a last one whose data end too early."""
    last: TarSample | None = None
    for sample in shard:
        if last is not None:
            yield last
        last = sample
    if last is None:
        return
    if shard.damage and next(iter(Shard(shard.address, last.offset)), None) is None:
        return
    yield last


def _read_at(address: str, offset: int) -> RawSample:
    sample = next(iter(Shard(address, offset)), None)
    if sample is None:  # changed since it was counted
        raise BadSample(MISSING)
    return sample.raw()


class _Look:
    """Fills a report with what single samples show."""

    def __init__(self, report: InspectReport, images: int, rng: np.random.Generator) -> None:
        self.report, self.most, self.rng = report, images, rng
        self.values: dict[str, list[float]] = {name: [] for name in MEASURES}

    def at(self, found: _Found) -> None:
        self.report.looked_at += 1 + found.merged
        if found.merged:
            self.report.bad[DUPLICATE_KEY] += found.merged
        if found.cause:
            self.report.bad[found.cause] += 1
            return
        try:
            sample = found.read()
        except BadSample as error:
            self.report.bad[error.cause] += 1
            return
        except OSError as error:
            self.report.bad[f"file cannot be read ({type(error).__name__})"] += 1
            return
        image, caption = self._image(sample), self._caption(sample)
        if image is None or caption is None:
            return
        self.report.good += 1
        # Each good sample is among the kept ones with the same probability.
        if len(self.report.images) < self.most:
            self.report.images.append((thumbnail(image), caption))
        elif self.most and (place := int(self.rng.integers(self.report.good))) < self.most:
            self.report.images[place] = (thumbnail(image), caption)

    def at_caption(self, caption: str | None) -> None:
        """A sample of which tokens are there in place of its image."""
        if caption is None:
            self.report.bad[EMPTY_CAPTION] += 1
            return
        self.report.good += 1
        self._measure(caption)

    def _measure(self, caption: str) -> None:
        self.values["characters"].append(len(caption))
        self.values["words"].append(len(caption.split()))

    def _image(self, sample: RawSample) -> Image.Image | None:
        try:
            data = image_of(sample)
            with opened_image(data) as opened:
                kind, mode = str(opened.format), opened.mode
                image = to_rgb(opened)
        except BadSample as error:
            why = type(error.__cause__).__name__
            detail = f" ({why})" if error.cause == UNREADABLE else ""
            self.report.bad[error.cause + detail] += 1
            return None
        self.report.formats[kind] += 1
        self.report.modes[mode] += 1
        values = (image.width, image.height, image.width / image.height, len(data))
        for name, value in zip(MEASURES, values, strict=False):
            self.values[name].append(value)
        return image

    def _caption(self, sample: RawSample) -> str | None:
        self._json_keys(sample)
        key = self.report.caption_key
        try:
            caption = caption_of(sample, key)
        except BadSample as error:
            cause = f"no caption under {key!r}" if error.cause == NO_CAPTION else error.cause
            self.report.bad[cause] += 1
        else:
            self._measure(caption)
            return caption
        return None

    def _json_keys(self, sample: RawSample) -> None:
        try:
            columns = json.loads(sample.get("json", b"{}"))
        except (ValueError, RecursionError):
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


def describe(report: InspectReport) -> str:
    """The report as tables for people; MB are 1e6 bytes."""
    lines: list[str] = []

    def line(name: str, text: str) -> None:
        lines.append(f"{name:18}{text}")

    def counted(counts: Counter[str]) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in counts.most_common()) or "none"

    line("data", report.data)
    line("shards", f"{report.shards:,}" if report.shards else "none: a folder of pairs")
    line("samples", f"{report.samples:,}, {report.bytes / 1e6:,.1f} MB")
    if report.tokens:
        line("tokens", report.tokens)
    else:
        line("files", counted(report.parts))
        line("without an image", f"{report.without_image:,}")
    line("without a caption", f"{report.without_caption:,} (key: {report.caption_key})")
    line("duplicate keys", f"{report.duplicates:,}")
    line("damaged shards", f"{len(report.damaged):,}")
    lines += [f"  {path}" for path in report.damaged]
    lines += [f"  {part}" for part in report.names.split("; ") if part]
    line("skipped files", f"{report.skipped_files:,} that are no part of the data (._x, .DS_Store)")
    part = "all" if report.looked_at == report.samples else "drawn at random"
    lines += ["", f"of {report.looked_at:,} samples ({part})"]
    line("good", f"{report.good:,}")
    bad = report.looked_at - report.good
    line("bad", f"{bad:,}" + ", some for two causes" * (report.bad.total() > bad))
    lines += [f"  {count:,} x {cause}" for cause, count in report.bad.most_common()]
    if not report.tokens:
        line("formats", counted(report.formats))
        line("modes", counted(report.modes))
        line("outside 1:2 - 2:1", f"{report.outside_ratios:.1%} of the images")
        line("text in the json", counted(report.json_keys))
    lines += ["", " " * 18 + "".join(f"{name:>11}" for name in QUANTILES)]
    for name, values in report.quantiles.items():
        style = ",.2f" if name == "width / height" else ",.0f"
        line(name, "".join(f"{value:>11{style}}" for value in values))
    return "\n".join(lines)

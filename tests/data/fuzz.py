"""The reader against shards that are damaged at random: python -m tests.data.fuzz --rounds 5000"""

from __future__ import annotations

import argparse
import faulthandler
import gzip
import io
import json
import resource
import signal
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image

from dalle1.data.curation.inspect import inspect
from dalle1.data.curation.write_shards import write_shards
from dalle1.data.samples import CAUSES, IMAGE_KEYS, MAX_PIXELS, BadSample, captions_of, image_of
from dalle1.data.shards import reader as reading
from dalle1.data.shards.index import find_pairs, raw_samples
from dalle1.data.shards.loader import Batches
from dalle1.data.shards.tar import Shard
from dalle1.data.transforms import augment_dalle, read_image
from tests.data.clutter import CAPTION, FOLDERS, Members, cluttered, other_case, write_linked
from tests.data.mutations import Files, mutate, mutated_sample, tar_of_members

HANGS = 600  # seconds of a round, which takes a few hundredths of one, or some on a busy machine
MAX_MEMORY = 2**31  # bytes that the process may grow by
SIDE = 8
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


class Hang(BaseException):
    """Not an Exception, which the reader would take for a fault of a file."""


@dataclass
class FuzzReport:
    """What was tried, and what came of it."""

    rounds: int = 0
    shards: int = 0  # that were mutated, or samples in them
    folders: int = 0  # of pairs
    clutter: int = 0  # files that are no data, beside those of healthy samples
    damaged: int = 0  # of them
    good: int = 0  # samples of theirs
    bad: Counter[str] = field(default_factory=Counter)  # of them, by cause
    delivered: int = 0  # by the reader, of healthy and mutated shards
    dropped: Counter[str] = field(default_factory=Counter)  # by the reader, by cause
    refused: Counter[str] = field(default_factory=Counter)  # rounds that the reader ended, by why
    slowest: float = 0.0  # seconds of a round
    grown: int = 0  # bytes of memory

    def table(self) -> str:
        rows: list[tuple[str, int | str]] = [
            ("rounds of three shards, of which two are damaged", self.rounds),
            ("damaged shards", self.shards),
            ("... of which the tar itself is damaged", self.damaged),
            ("good samples read from them", self.good),
            *((f"... {cause}", count) for cause, count in self.bad.most_common()),
            ("folders of pairs, a part of them damaged, with links and loops", self.folders),
            ("twins, notes and copies beside intact samples", self.clutter),
            ("samples that the reader delivered", self.delivered),
            *((f"... skipped: {cause}", count) for cause, count in self.dropped.most_common()),
            *((f"rounds refused: {why}", count) for why, count in self.refused.items()),
            ("seconds of the slowest round", f"{self.slowest:.2f}"),
            ("MB of memory that the process grew by", self.grown // 2**20),
        ]
        lines = [
            f"| {name} | {n:,} |" if isinstance(n, int) else f"| {name} | {n} |" for name, n in rows
        ]
        return "\n".join(["| | |", "|---|---:|", *lines])


@lru_cache(maxsize=1)
def healthy() -> list[Files]:
    """Good samples of several kinds; the files of each by extension."""
    rng = np.random.default_rng(0)
    kinds: list[tuple[str, str, str, dict[str, Any]]] = [
        ("jpg", "JPEG", "RGB", {}),
        ("jpg", "JPEG", "RGB", {"progressive": True, "exif": _turned(6)}),
        ("jpeg", "JPEG", "CMYK", {}),
        ("png", "PNG", "RGB", {}),
        ("png", "PNG", "P", {"transparency": 3}),
        ("png", "PNG", "LA", {"exif": _turned(3)}),
        ("png", "PNG", "1", {}),
        ("webp", "WEBP", "RGB", {"lossless": True}),
        ("webp", "WEBP", "RGBA", {"exif": _turned(8)}),
        ("jpg", "GIF", "P", {}),
        ("png", "TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("png", "BMP", "RGB", {}),
    ]
    found = []
    for i, (extension, kind, mode, options) in enumerate(kinds):
        pixels = rng.integers(0, 256, (9 + i, 12, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
        caption = f"a picture, der {i}. von 12"
        content = json.dumps({"caption": caption, "url": "x", "n": i}).encode()
        found.append({extension: buffer.getvalue(), "txt": caption.encode(), "json": content})
    return found


def _turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return exif.tobytes()


@contextmanager
def guarded() -> Iterator[None]:
    """Raises Hang, or, where nothing in Python runs any more, ends the process with a traceback."""

    def hang(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {HANGS} s")

    before = signal.signal(signal.SIGALRM, hang)
    faulthandler.dump_traceback_later(2 * HANGS, exit=True)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def fuzz(rounds: int, seed: int, folder: Path, first: int = 0, batches: bool = True) -> FuzzReport:
    """Plays the rounds; AssertionError, Hang or whatever the reader raises where it is at fault.

    batches: whether the whole reader is tried, too, which takes most of the time.
    """
    report = FuzzReport()
    before = _memory()
    # A stream that breaks off is opened again after seconds, which are not waited for here.
    waits, reading.RETRIES = reading.RETRIES, ()  # type: ignore[assignment]
    try:
        for number in range(first, first + rounds):
            start = time.monotonic()
            with guarded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    _round(np.random.default_rng([seed, number]), folder, batches, report)
                except BaseException:
                    print(f"in round {number} of seed {seed}")
                    raise
            report.rounds += 1
            report.slowest = max(report.slowest, time.monotonic() - start)
    finally:
        reading.RETRIES = waits
    report.grown = _memory() - before
    assert report.grown < MAX_MEMORY
    return report


def _memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _round(rng: np.random.Generator, folder: Path, batches: bool, report: FuzzReport) -> None:
    """Two damaged shards by themselves, and then the reader on both and a healthy one."""
    how = rng.choice(["file", "gz", "pipe"], p=[0.8, 0.1, 0.1])
    end = ".tar.gz" if how == "gz" else ".tar"
    caption_key = "txt" if rng.random() < 0.7 else "caption"
    sound = int(rng.integers(3))  # the healthy one's place
    wanted: dict[str, str] = {}
    for i in range(3):
        picked = [healthy()[k] for k in rng.integers(0, len(healthy()), int(rng.integers(2, 7)))]
        name = "sound" if i == sound else f"d{i}"
        samples = {f"{name}/{_folder(rng)}{k}": files for k, files in enumerate(picked)}
        stats = folder / f"{i}_stats.json"
        stats.unlink(missing_ok=True)
        if i == sound:
            wanted = {key: files["txt"].decode() for key, files in samples.items()}
            members, more = cluttered(_members(samples, rng), rng)
            report.clutter += more
            data = tar_of_members(members, FORMATS[int(rng.integers(3))])
        else:
            data = _damaged(samples, rng)
            if rng.random() < 0.1:
                stats.write_text(
                    json.dumps({"successes": int(rng.integers(0, 12))}), encoding="utf-8"
                )
        path = folder / f"{i}{end}"
        if how == "gz":
            data = gzip.compress(data, 1)
            if i != sound and rng.random() < 0.3:
                data = mutate(data, rng)
        path.write_bytes(data)
        if i != sound:
            _read_shard(f"pipe:cat {path}" if how == "pipe" else str(path), caption_key, report)
        else:
            _inspect(str(path), caption_key, len(samples), len(samples), more)
    address = ("pipe:cat " if how == "pipe" else "") + str(folder / ("{0..2}" + end))
    if batches:
        _read_batches(address, wanted, caption_key, int(rng.integers(1000)), report)
    if rng.random() < 0.3:
        _read_folder(rng, folder / "folder", batches, report)


def _folder(rng: np.random.Generator) -> str:
    return FOLDERS[int(rng.integers(len(FOLDERS)))] if rng.random() < 0.3 else ""


def _members(samples: dict[str, Files], rng: np.random.Generator) -> Members:
    """The files of samples, whose extensions may be in other letters."""
    return [
        (f"{key}.{other_case(ending, rng)}", data)
        for key, files in samples.items()
        for ending, data in files.items()
    ]


def _read_folder(rng: np.random.Generator, folder: Path, batches: bool, report: FuzzReport) -> None:
    """Pairs, some damaged, with clutter beside them and links, by the reader and the tools."""
    samples, wanted = {}, {}
    usual = healthy()[:9]  # the others are of formats that are not packed
    for i in range(int(rng.integers(4, 12))):
        files = dict(usual[int(rng.integers(len(usual)))])
        del files["json"]
        key = f"s{i}" if i < 2 or rng.random() < 0.5 else f"d{i}"
        if key[0] == "s":
            wanted[key] = files["txt"].decode()
        samples[f"{_folder(rng)}{key}"] = files if key[0] == "s" else mutated_sample(files, rng)
    members = _members(samples, rng)
    images = sum(name.lower().endswith(IMAGE_KEYS) for name, _ in members)
    members, more = cluttered(members, rng)
    write_linked(folder, members, rng)
    top = str(folder / "in")
    found = Counter(Path(image).stem for image in find_pairs(top))
    assert all(found[key] == 1 for key in wanted), (found, wanted)
    assert not found.keys() - {key.rpartition("/")[2] for key in samples}, found
    _inspect(top, "txt", len(wanted), images)
    write_shards(top, folder / "out", workers=1)
    packed = [raw["txt"].decode() for raw in raw_samples(str(folder / "out"))]
    assert not Counter(wanted.values()) - Counter(packed), (packed, wanted)
    assert CAPTION not in packed
    if batches:
        _read_batches(top, wanted, "txt", int(rng.integers(1000)), report)
    report.folders += 1
    report.clutter += more


def _inspect(data: str, caption_key: str, good: int, most: int, skipped: int | None = None) -> None:
    """Among at most so many samples so many good ones, or more."""
    report = inspect(data, caption_key)
    assert good <= report.good <= report.samples <= most, report
    assert skipped is None or report.skipped_files == skipped, (report.skipped_files, skipped)


def _damaged(samples: dict[str, Files], rng: np.random.Generator) -> bytes:
    """A tar with damage to its bytes, to the files in it, or both."""
    what = rng.random()
    if what > 0.35:
        hurt = rng.random(len(samples)) < 0.7
        samples = {
            key: mutated_sample(files, rng) if bad else files
            for (key, files), bad in zip(samples.items(), hurt, strict=True)
        }
    members = _members(samples, rng)
    if rng.random() < 0.3:
        members, _ = cluttered(members, rng)
    data = tar_of_members(members, FORMATS[int(rng.integers(3))])
    return mutate(data, rng) if what < 0.75 else data


def _read_shard(address: str, caption_key: str, report: FuzzReport) -> None:
    shard = Shard(address)
    keys = []
    for sample in shard:
        assert sample.key.encode().decode() == sample.key
        keys.append(sample.key)
        raw = sample.raw()
        try:
            texts = captions_of(raw, caption_key)
            pixels = read_image(image_of(raw), MAX_PIXELS)
        except BadSample as error:
            report.bad[error.cause] += 1
            continue
        _check_captions(texts)
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        assert pixels.size
        report.good += 1
    report.shards += 1
    report.damaged += bool(shard.damage)
    heads = [sample.key for sample in Shard(address, headers_alone=True)]
    assert keys == heads[: len(keys)], (keys, heads)
    assert shard.damage or len(keys) == len(heads)


def _check_captions(texts: list[str]) -> None:
    assert texts
    for text in texts:
        assert text.encode().decode() == text == text.strip() != ""


def _read_batches(
    address: str, wanted: dict[str, str], caption_key: str, seed: int, report: FuzzReport
) -> None:
    """Two epochs of every stream; both must have all that is wanted, by key."""
    settings: Any = {"streams": 2, "buffer": 8, "max_bad": 1.0}
    try:
        batches = Batches(address, 4, SIDE, augment_dalle, seed, caption_key, **settings)
    except ValueError as error:
        # A command that gives not one sample is a fault of the command, or of the network.
        assert address.startswith("pipe:") and "cannot be read" in str(error), error
        report.refused["a stream without a sample"] += 1
        return
    found: Counter[str] = Counter()
    taken = [0, 0]
    loader = batches.loader()
    steps = 0
    while batches.state(steps, taken)["epoch"] < 2:
        try:
            batch = next(loader)
        except ValueError as error:
            assert "hardly a usable sample" in str(error), error
            report.refused["hardly a usable sample"] += 1
            return
        steps += 1
        taken = [batch.taken[stream] for stream in range(2)]
        assert batch.images is not None and batch.images.dtype == torch.uint8
        assert batch.images.shape == (4, 3, SIDE, SIDE) and batch.tokens is None
        assert len(batch.captions) == len(batch.keys) == len(batch.seeds) == 4
        _check_captions(batch.captions)
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            assert key.encode().decode() == key
            if key in wanted:
                assert caption == wanted[key]
            assert not key.startswith("sound/") or key in wanted
            assert caption != CAPTION
        assert set(batch.dropped) <= set(CAUSES) and min(batch.dropped.values(), default=1) > 0
        found.update(batch.keys)
        report.delivered += 4
        report.dropped.update(batch.dropped)
    assert all(found[key] >= 2 for key in wanted), (found, wanted)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.data.fuzz", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first round's number")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = fuzz(options.rounds, options.seed, Path(folder), options.first)
    print(report.table())
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

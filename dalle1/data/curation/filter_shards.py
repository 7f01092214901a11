"""Shards without the samples that are not worth training on (paper, appendix C).

    out/0000.tar                 of 0000.tar the samples that stay, all their files as they were
    out/filtering/settings.json  what was filtered by
    out/filtering/0000.npz       a shard's counts and examples, and the hashes of what stays

A shard counts as done when its record is there, which is written last. Of equal samples the first
in the order of the shards stays, so what is dropped of a shard depends on those before it. A run
that resumes takes their hashes from their records, and writes the shards of a run without a stop.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dalle1.common.config import differences
from dalle1.common.files import (
    check_writable,
    expand_home,
    flush,
    replacing,
    saying_what_is_missing,
    write_text,
)
from dalle1.data.curation.dedup import DIGEST, Seen
from dalle1.data.curation.filters import (
    CAUSES,
    FORMER_DUPLICATES,
    UNUSABLE,
    FilterResult,
    FilterSettings,
    filter_sample,
    packages,
)
from dalle1.data.samples import (
    DAMAGED,
    FORMER_CAUSES,
    IMAGE_TOO_LARGE,
    MAX_PIXELS,
    current_causes,
)
from dalle1.data.shards.explain import explain_tars
from dalle1.data.shards.index import find_shards
from dalle1.data.shards.names import TAR, is_tar, shards_in
from dalle1.data.shards.tar import Shard
from dalle1.data.shards.workers import ignore_signals

RECORDS = "filtering"
EXAMPLES = 3  # of each cause
# One usable sample is asked for among so many, of so many shards.
TRIED_SAMPLES, TRIED_SHARDS = 64, 8
Examples = dict[str, list[dict[str, str]]]  # by cause: shard, key and caption of some samples


@dataclass
class FilterReport:
    """What was dropped and why; the same whether or not the run was stopped in between."""

    settings: dict[str, Any]
    shards: int = 0
    samples: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    damaged: dict[str, str] = field(default_factory=dict)  # shards of which the rest is lost
    examples: Examples = field(default_factory=dict)

    def to_json(self) -> str:
        """The content of a file with all of it."""
        content = asdict(self) | {"dropped": {c: self.dropped[c] for c in CAUSES}}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def table(self) -> str:
        """The counts by cause, with an example of each, for people."""
        rows = [("samples", self.samples, ""), ("kept", self.kept, "")]
        for cause in CAUSES:
            if self.dropped[cause]:
                example = self.examples[cause][0]
                text = example["caption"] or f"{example['key']} of {example['shard']}"
                rows.append((cause, self.dropped[cause], repr(text[:60])))
        lines = [
            f"{name:<20}{count:>13,}{count / max(1, self.samples):>8.1%}  {example}".rstrip()
            for name, count, example in rows
        ]
        lines += [f"damaged, the rest is lost: {name}: {why}" for name, why in self.damaged.items()]
        return "\n".join(lines)


def filter_shards(
    data: str,
    out: str | Path,
    settings: FilterSettings,
    workers: int = 0,
    progress: bool = False,
) -> FilterReport:
    """Writes of each shard of `data` one of the same name with the samples that stay; resumes where
    a former run was stopped.

    Args:
        data: shards, or a folder of tars.
        out: folder for the shards, which is made.
        settings: of the filters.
        workers: processes that read and filter; what is written does not depend on their number.
        progress: whether a bar is shown.

    Raises:
        ValueError: data that are missing or hold nothing usable, an `out` with other shards or with
            those of other settings or data, a package that a filter needs and is not there.
        OSError: the disk is full; says how much is missing.
    """
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers}")
    data, out = expand_home(data), Path(expand_home(out))
    paths = [Path(path) for path in find_shards(data)]
    check_writable(out, "out")
    _check_paths(data, paths, out)
    report = FilterReport(asdict(settings) | packages(settings))
    _check_usable(data, paths, settings)
    _claim(out, report.settings, {path.name for path in paths})
    inputs = _inputs(paths, settings)
    records = [_read_record(out, source) for source in inputs]
    missing = [path for path, record in zip(paths, records, strict=True) if record is None]
    filtered = _filter_all(missing, settings, workers)
    seen = Seen(settings.duplicates != "off", settings.near_duplicates)
    bar = tqdm(total=len(paths), unit="shard", desc="filtering", disable=not progress)
    with bar:
        for path, source, record in zip(paths, inputs, records, strict=True):
            if record is None:
                record = _write_filtered(path, out, source, next(filtered), seen)
            else:
                seen.take(*_hashes(out, path.name))
            _add(report, path.name, record)
            bar.update()
    if not report.kept:
        found = ", ".join(f"{n:,} x {cause}" for cause, n in report.dropped.most_common())
        raise ValueError(
            f"data: not a sample of {data!r} is left ({found or 'none read'}); before another try "
            f"remove {str(out)!r}"
        )
    return report


# What a shard holds.


@dataclass(frozen=True)
class FilteredShard:
    """A shard's samples, each filtered by itself."""

    results: list[FilterResult]
    damage: str
    cut: str  # key of the sample that is lost in part


class _FilterDataset(Dataset[FilteredShard]):
    def __init__(self, paths: Sequence[Path], settings: FilterSettings) -> None:
        self.paths, self.settings = paths, settings

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> FilteredShard:
        shard = Shard(str(self.paths[i]))
        results = [
            FilterResult(sample.key, cause=IMAGE_TOO_LARGE)  # it was not read
            if sample.too_large
            else filter_sample(sample.raw(), self.settings)
            for sample in shard
        ]
        return FilteredShard(results, shard.damage, shard.cut)


def _filter_all(
    paths: Sequence[Path], settings: FilterSettings, workers: int
) -> Iterator[FilteredShard]:
    """Shards in order, each filtered by one of so many processes (0: by this one)."""
    return iter(
        DataLoader(
            _FilterDataset(paths, settings),
            batch_size=None,
            num_workers=min(workers, len(paths)),
            collate_fn=_unchanged,
            worker_init_fn=ignore_signals,
        )
    )


def _unchanged(filtered: Any) -> Any:
    return filtered


# What is on disk.


@dataclass(frozen=True)
class FilterInput:
    """A shard to be filtered, and all that its outcome depends on."""

    path: str
    history: str


@dataclass(frozen=True)
class Record:
    """What was done to a shard."""

    source: str
    history: str
    bytes: int  # of the shard written
    samples: int
    kept: int
    dropped: dict[str, int]
    examples: Examples
    damage: str


def _check_paths(data: str, paths: Sequence[Path], out: Path) -> None:
    if not paths:
        raise ValueError(
            f"data: {data!r} holds no .tar shards; a folder of images with captions is made into "
            "shards by launch/shard.py first"
        )
    names: dict[str, Path] = {}
    for path in paths:
        if not is_tar(path.name):
            raise ValueError(f"data: {path} must end in .tar and be unpacked if it is compressed")
        if path.parent.resolve() == out.resolve():
            raise ValueError(f"out: {str(out)!r} is where {path} is; give another folder")
        if path.stem in names:  # of 0.tar and 0.TAR the records would be one file
            raise ValueError(
                f"data: {names[path.stem]} and {path} have one name, and so would what is made of "
                "them; filter them one after the other into different folders"
            )
        names[path.stem] = path


def _check_usable(data: str, paths: Sequence[Path], settings: FilterSettings) -> None:
    """ValueError for a wrong caption_key or the like, before `out` holds anything."""
    causes: Counter[str | None] = Counter()
    plain = FilterSettings(settings.caption_key)
    some = paths[:: -(-len(paths) // TRIED_SHARDS)]  # of which one may be bad throughout
    each = TRIED_SAMPLES // len(some)
    for sample in (sample for path in some for sample in islice(Shard(str(path)), each)):
        cause = filter_sample(sample.raw(), plain).cause
        if cause not in UNUSABLE:
            return
        causes[cause] += 1
    found = ", ".join(f"{n} x {cause}" for cause, n in causes.most_common()) or "none read"
    raise ValueError(
        f"data: not one usable sample among the first of {len(some)} shards of {data!r} ({found}); "
        f"captions are looked for in {settings.caption_key!r} (caption_key: txt, or the name of a "
        "key of the json)" + explain_tars([str(path) for path in some])
    )


def _claim(out: Path, content: dict[str, Any], names: set[str]) -> None:
    """Says in `out` what its shards are filtered by; ValueError where it holds others."""
    path = out / RECORDS / "settings.json"
    there = {Path(path).name for path in shards_in(out, TAR)}
    if not path.exists() and there:
        raise ValueError(f"out: {str(out)!r} already holds {min(there)}: give another folder")
    if there - names:
        raise ValueError(
            f"out: {str(out)!r} holds {min(there - names)}, which is not among the shards to be "
            "filtered: a reader would mix two data sets; give another folder"
        )
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
        kind = held.get("duplicates")
        former = {"max_pixels": MAX_PIXELS, **held}  # which earlier releases did not ask for
        found = differences(former | {"duplicates": FORMER_DUPLICATES.get(kind, kind)}, content)
        if found:
            raise ValueError(
                f"out: {str(out)!r} holds shards filtered with other settings: "
                f"{'; '.join(found)}. Give another folder, or remove it"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")


def _inputs(paths: Sequence[Path], settings: FilterSettings) -> list[FilterInput]:
    compared = settings.duplicates != "off" or settings.near_duplicates is not None
    history, inputs = "", []
    for path in paths:
        status = path.stat()
        # Where samples are compared, what a shard comes to depends on all those before it.
        line = f"{history if compared else ''} {path.name} {status.st_size} {status.st_mtime_ns}"
        history = hashlib.sha256(line.encode(errors="surrogateescape")).hexdigest()
        # The name of a link, not of what it leads to: the shard written is called so.
        inputs.append(FilterInput(str(path.parent.resolve() / path.name), history))
    return inputs


def _write_filtered(
    path: Path, out: Path, source: FilterInput, filtered: FilteredShard, seen: Seen
) -> Record:
    """Writes a shard and then its record."""
    causes = [r.cause or seen.cause(r.digest, r.look) for r in filtered.results]
    target = out / path.name
    _write_tar(path, target, causes)
    pairs = list(zip(causes, filtered.results, strict=True))
    kept = [result for cause, result in pairs if cause is None]
    dropped = [(cause, result) for cause, result in pairs if cause is not None]
    if filtered.cut:
        dropped.append((DAMAGED, FilterResult(filtered.cut)))
    record = Record(
        source.path,
        source.history,
        target.stat().st_size,
        len(kept) + len(dropped),
        len(kept),
        dict(Counter(cause for cause, _ in dropped)),
        _examples(path.name, dropped),
        filtered.damage,
    )
    _write_record(_record_path(out, path.name), record, kept)
    return record


def _write_tar(path: Path, target: Path, causes: Sequence[str | None]) -> None:
    """The samples of a tar without a cause to drop them, all their files as they were."""
    with (
        saying_what_is_missing(target.parent, target.name, path.stat().st_size),
        replacing(target) as temporary,
        temporary.open("wb") as file,
    ):
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as opened:
            tar: Any = opened
            for sample, cause in zip(Shard(str(path)), causes, strict=True):
                for member, data in sample.files if cause is None else ():
                    # Of a sparse file the data are here in full.
                    member.type, member.size = tarfile.REGTYPE, len(data)
                    tar.addfile(member, io.BytesIO(data))
                tar.members = []
        flush(file)


def _examples(shard: str, dropped: Sequence[tuple[str, FilterResult]]) -> Examples:
    """The first dropped samples of each cause."""
    examples: Examples = {}
    for cause, result in dropped:
        if len(examples.setdefault(cause, [])) < EXAMPLES:
            text = {"shard": shard, "key": result.key, "caption": result.caption[:200]}
            # Names and captions need not be valid Unicode; a report must be.
            valid = {k: s.encode(errors="replace").decode() for k, s in text.items()}
            examples[cause].append(valid)
    return examples


def _write_record(path: Path, record: Record, kept: Sequence[FilterResult]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            record=np.frombuffer(json.dumps(asdict(record)).encode(), np.uint8),
            digests=np.frombuffer(b"".join(r.digest for r in kept), np.uint8),
            looks=np.array([r.look for r in kept], np.uint64),
        )
        flush(file)


def _record_path(out: Path, name: str) -> Path:
    return out / RECORDS / Path(name).with_suffix(".npz")


def _read_record(out: Path, source: FilterInput) -> Record | None:
    """The record of a shard that is done; None: it must be done (again)."""
    name = Path(source.path).name
    try:
        with np.load(_record_path(out, name)) as file:
            record = Record(**json.loads(file["record"].tobytes()))
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    if record.source != source.path:
        raise ValueError(
            f"out: {out / name} was made of {record.source}, which is not {source.path}: give "
            "another folder, or remove it"
        )
    made = out / name
    if record.history != source.history or not made.is_file():
        return None
    if made.stat().st_size != record.bytes:
        return None
    examples = {FORMER_CAUSES.get(c, c): found for c, found in record.examples.items()}
    return replace(record, dropped=dict(current_causes(record.dropped)), examples=examples)


def _hashes(out: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(_record_path(out, name)) as file:
        return file["digests"].reshape(-1, DIGEST), file["looks"]


def _add(report: FilterReport, name: str, record: Record) -> None:
    report.shards += 1
    report.samples += record.samples
    report.kept += record.kept
    report.dropped.update(record.dropped)
    if record.damage:
        report.damaged[name] = record.damage
    for cause, examples in record.examples.items():
        held = report.examples.setdefault(cause, [])
        held.extend(examples[: EXAMPLES - len(held)])

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
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from dalle1.common.config import differences
from dalle1.common.files import (
    check_writable,
    expand_home,
    flush,
    replacing,
    saying_what_is_missing,
    write_text,
)
from dalle1.common.progress import progress_bar
from dalle1.data.curation.dedup import DIGEST, Seen
from dalle1.data.curation.filter_report import EXAMPLES, Examples, FilterReport
from dalle1.data.curation.filters import (
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
from dalle1.data.shards.addresses import raw_shards, read_samples, shard_name, size_of
from dalle1.data.shards.explain import explain_tars
from dalle1.data.shards.names import TAR, shards_in
from dalle1.data.shards.tar import RETRIES, Shard, is_remote
from dalle1.data.shards.workers import ending_workers, prepare_worker

RECORDS = "filtering"
# One usable sample is asked for among so many, of so many shards.
TRIED_SAMPLES, TRIED_SHARDS = 64, 8


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
        data: as the setting `data` of a run, but for folders of pairs and token shards. What is
            remote or compressed is read twice, and written as a tar on this disk.
        out: folder for the shards, which is made.
        settings: of the filters.
        workers: processes that read and filter; what is written does not depend on their number.
        progress: whether a bar is shown.

    Raises:
        ValueError: data that are missing or hold nothing usable, an `out` with other shards or with
            those of other settings or data, a package that a filter needs and is not there.
        OSError: the disk is full, and how much is missing; a remote shard cannot be read.
    """
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers}")
    addresses, out = raw_shards(data), Path(expand_home(out))
    check_writable(out, "out")
    names = _names(addresses, out)
    report = FilterReport(asdict(settings) | packages(settings))
    _check_usable(data, addresses, settings)
    _claim(out, report.settings, set(names))
    inputs = _inputs(addresses, names, settings)
    records = [_read_record(out, source) for source in inputs]
    missing = [i.address for i, record in zip(inputs, records, strict=True) if record is None]
    filtered = _filter_all(missing, settings, workers)
    seen = Seen(settings.duplicates != "off", settings.near_duplicates)
    bar = progress_bar(total=len(inputs), unit="shard", desc="filtering", disable=not progress)
    with bar:
        for source, record in zip(inputs, records, strict=True):
            if record is None:
                record = _write_filtered(out, source, next(filtered), seen)
            else:
                seen.take(*_hashes(out, source.name))
            _add(report, source.name, record)
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
    failure: str = ""  # of the disk or the network


class _FilterDataset(Dataset[FilteredShard]):
    def __init__(self, addresses: Sequence[str], settings: FilterSettings) -> None:
        self.addresses, self.settings = addresses, settings

    def __len__(self) -> int:
        return len(self.addresses)

    def __getitem__(self, i: int) -> FilteredShard:
        shard = Shard(self.addresses[i])
        try:
            results = [
                FilterResult(sample.key, cause=IMAGE_TOO_LARGE)  # it was not read
                if sample.too_large
                else filter_sample(sample.raw(), self.settings)
                for sample in read_samples(shard, RETRIES)
            ]
        except OSError as error:
            return FilteredShard([], "", "", f"{shard.address} cannot be read: {error}")
        return FilteredShard(results, shard.damage, shard.cut)


def _filter_all(
    addresses: Sequence[str], settings: FilterSettings, workers: int
) -> Iterator[FilteredShard]:
    """Shards in order, each filtered by one of so many processes (0: by this one)."""
    filtered = DataLoader(
        _FilterDataset(addresses, settings),
        batch_size=None,
        num_workers=min(workers, len(addresses)),
        collate_fn=_unchanged,
        worker_init_fn=prepare_worker,
    )
    for shard in ending_workers(iter(filtered)):
        if shard.failure:
            raise OSError(shard.failure)
        yield shard


def _unchanged(filtered: Any) -> Any:
    return filtered


# What is on disk.


@dataclass(frozen=True)
class FilterInput:
    """A shard to be filtered, and all that its outcome depends on."""

    address: str
    name: str  # of the shard that is written
    source: str  # what a record calls it
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


def _names(addresses: Sequence[str], out: Path) -> list[str]:
    """What the shard that is written of each is called."""
    names: dict[str, str] = {}
    for i, address in enumerate(addresses):
        if not is_remote(address) and Path(address).parent.resolve() == out.resolve():
            raise ValueError(f"out: {str(out)!r} is where {address} is; give another folder")
        name = f"{shard_name(address) or f'{i:05d}'}.tar"
        if name in names:
            raise ValueError(
                f"data: {names[name]} and {address} have one name, and so would what is made of "
                "them; filter them one after the other into different folders"
            )
        names[name] = address
    return list(names)


def _check_usable(data: str, addresses: Sequence[str], settings: FilterSettings) -> None:
    """ValueError for a wrong caption_key or the like, before `out` holds anything."""
    causes: Counter[str | None] = Counter()
    plain = FilterSettings(settings.caption_key)
    # Of which one may be bad throughout.
    some = [Shard(address) for address in addresses[:: -(-len(addresses) // TRIED_SHARDS)]]
    each = TRIED_SAMPLES // len(some)
    for sample in (sample for shard in some for sample in islice(shard, each)):
        cause = filter_sample(sample.raw(), plain).cause
        if cause not in UNUSABLE:
            return
        causes[cause] += 1
    found = ", ".join(f"{n} x {cause}" for cause, n in causes.most_common())
    found = found or f"none read: {next((s.damage for s in some if s.damage), 'they are empty')}"
    raise ValueError(
        f"data: not one usable sample among the first of {len(some)} shards of {data!r} ({found}); "
        f"captions are looked for in {settings.caption_key!r} (caption_key: txt, or the name of a "
        "key of the json)" + explain_tars([shard.address for shard in some])
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


def _inputs(
    addresses: Sequence[str], names: Sequence[str], settings: FilterSettings
) -> list[FilterInput]:
    compared = settings.duplicates != "off" or settings.near_duplicates is not None
    history, inputs = "", []
    for address, name in zip(addresses, names, strict=True):
        if is_remote(address):  # which may hold a password
            digest = hashlib.sha256(address.encode(errors="surrogateescape")).hexdigest()[:16]
            source, state = f"a remote {name} ({digest})", digest
        else:
            # The name of a link, not of what it leads to: the shard written is called so.
            path, status = Path(address), Path(address).stat()
            source = str(path.parent.resolve() / path.name)
            state = f"{status.st_size} {status.st_mtime_ns}"
        # Where samples are compared, what a shard comes to depends on all those before it.
        line = f"{history if compared else ''} {name} {state}"
        history = hashlib.sha256(line.encode(errors="surrogateescape")).hexdigest()
        inputs.append(FilterInput(address, name, source, history))
    return inputs


def _write_filtered(out: Path, source: FilterInput, filtered: FilteredShard, seen: Seen) -> Record:
    """Writes a shard and then its record."""
    causes = [r.cause or seen.cause(r.digest, r.look) for r in filtered.results]
    target = out / source.name
    pairs = list(zip(causes, filtered.results, strict=True))
    _write_tar(source.address, target, pairs)
    kept = [result for cause, result in pairs if cause is None]
    dropped = [(cause, result) for cause, result in pairs if cause is not None]
    if filtered.cut:
        dropped.append((DAMAGED, FilterResult(filtered.cut)))
    record = Record(
        source.source,
        source.history,
        target.stat().st_size,
        len(kept) + len(dropped),
        len(kept),
        dict(Counter(cause for cause, _ in dropped)),
        _examples(source.name, dropped),
        filtered.damage,
    )
    _write_record(_record_path(out, source.name), record, kept)
    return record


def _write_tar(
    address: str, target: Path, pairs: Sequence[tuple[str | None, FilterResult]]
) -> None:
    """The samples of a tar without a cause to drop them, all their files as they were."""
    with (
        saying_what_is_missing(target.parent, target.name, size_of(address) or 0),
        replacing(target) as temporary,
        temporary.open("wb") as file,
    ):
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as opened:
            tar: Any = opened
            again = islice(read_samples(Shard(address), RETRIES), len(pairs))
            for cause, result in pairs:
                sample = next(again, None)
                if sample is None or sample.key != result.key:
                    raise OSError(f"{address} changed while it was read")
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
    name = source.name
    try:
        with np.load(_record_path(out, name)) as file:
            record = Record(**json.loads(file["record"].tobytes()))
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    if record.source != source.source:
        raise ValueError(
            f"out: {out / name} was made of {record.source}, which is not {source.source}: give "
            "another folder, or remove it"
        )
    made = out / name
    if record.damage and is_remote(source.address):  # it may be undamaged today
        return None
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

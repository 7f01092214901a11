"""The emoji data set as a folder: shards of each split, what they were made from, attribution.

OUT/README.md               styles, packages, licenses, what must be said
OUT/emoji.json              the same for programs, and the settings of each split
OUT/train/train-00000.tar   and so on; a folder for each split, so that no reader mixes them
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dalle1.common.files import (
    check_space,
    check_writable,
    read_text,
    saying_what_is_missing,
    write_text,
)
from dalle1.common.progress import progress_bar
from dalle1.data.emoji.card import card
from dalle1.data.emoji.dataset import (
    SIDE,
    SPLITS,
    EmojiDataset,
    EmojiSample,
    without_skin_tones,
)
from dalle1.data.emoji.packages import NAMES, FoundPackage
from dalle1.data.emoji.sources import LEAST, Emoji, read_emoji
from dalle1.data.generated import sample_bytes, write_generated

README, RECORD = "README.md", "emoji.json"
COUNTS = {"train": 200_000, "contrasts": 100_000}  # samples of a split by default
OTHER_COUNT = 2_000
SHARD_SIZE = 1000
TRIED = 100  # samples whose bytes tell those of all
LARGEST_RECORD = 2**20  # bytes


@dataclass(frozen=True)
class SplitSettings:
    """What the samples of a split are a function of, beside the emoji."""

    count: int
    seed: int
    side: int
    shard_size: int


@dataclass(frozen=True)
class WrittenEmoji:
    """What was written: the emoji in use and those of one style alone, which are not; how many
    pictures each style has; samples and bytes of each split."""

    emoji: int
    left_out: int
    pictures: dict[str, int]
    samples: dict[str, int]
    bytes: dict[str, int]


def write_emoji(
    out: Path,
    found: Mapping[str, FoundPackage],
    splits: Sequence[str] = ("train",),
    count: int | None = None,
    seed: int = 0,
    side: int = SIDE,
    shard_size: int = SHARD_SIZE,
    skin_tones: bool = True,
    progress: bool = False,
) -> WrittenEmoji:
    """Writes splits of the emoji data set into a folder.

    The same arguments write the same bytes, so a call that was stopped is simply made again. Other
    splits of the same packages may be added by later calls.

    Args:
        out: a folder that is new, empty, or of earlier calls with the same packages.
        found: packages of at least two styles and of the names, see `packages.find_packages`.
        splits: of `SPLITS`.
        count: samples of each split; None: 200,000 of "train", 2,000 of others.
        seed: of the samples. It does not choose what is held out.
        side: of the images, in pixels. The packages have pictures of 64; beyond they are enlarged.
        shard_size: samples of a shard at most.
        skin_tones: whether emoji with skin tones are used too, or only those without.
        progress: whether a bar is shown.

    Raises:
        ValueError: packages as in `read_emoji`, a setting out of range, an `out` that holds
            something else or is of other packages or settings, too little space.
        OSError: the disk is full after all; says how much is missing.
    """
    settings = {
        split: SplitSettings(count or COUNTS.get(split, OTHER_COUNT), seed, side, shard_size)
        for split in splits
    }
    if (count is not None and count < 1) or shard_size < 1:
        raise ValueError(
            f"count, shard_size: expected 1 or more, got {count or 0} and {shard_size}"
        )
    check_writable(out, "OUT")
    former = _former(out)
    emoji = read_emoji(
        {use: f.folder for use, f in found.items() if use != NAMES}, found[NAMES].folder, least=1
    )
    emoji = emoji if skin_tones else without_skin_tones(emoji)
    used = [e for e in emoji if len(e.pictures) >= LEAST]
    dataset = EmojiDataset(used)
    tried = {split: _tried_bytes(dataset, split, settings[split]) for split in splits}
    record = {
        "packages": {
            use: {"name": f.package.name, "version": f.version} for use, f in found.items()
        },
        "emoji": len(used),
        "skin_tones": skin_tones,
        "digest": digest(used),
    }
    written = former.get("splits", {})
    _check_former(out, former, record, settings)
    expected = sum(size * settings[split].count for split, size in tried.items())
    check_space(out, expected, "OUT")
    # Before the shards: whoever finds them finds their licenses too.
    record["splits"] = {s: written[s] for s in SPLITS if s in written} | {
        split: asdict(settings[split]) for split in settings
    }
    with saying_what_is_missing(out, "the data set", expected, "; the same command goes on"):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / RECORD, json.dumps(record, indent=2) + "\n")
        write_text(out / README, card(found, record))
    sizes = {}
    with progress_bar(
        total=sum(s.count for s in settings.values()),
        unit="image",
        desc="writing",
        disable=not progress,
    ) as bar:
        for split, chosen in settings.items():

            def make(index: int, split: str = split) -> EmojiSample:
                bar.update()
                return dataset.make(seed, index, split, side)

            with saying_what_is_missing(out, "the rest", expected, "; the same command goes on"):
                paths = write_generated(
                    make, out / split, split, chosen.count, seed, chosen.shard_size
                )
            sizes[split] = sum(path.stat().st_size for path in paths)
            expected = max(expected - sizes[split], 0)
    return WrittenEmoji(
        len(used),
        len(emoji) - len(used),
        dict(Counter(style for e in used for style in e.pictures)),
        {split: s.count for split, s in settings.items()},
        sizes,
    )


def digest(emoji: Iterable[Emoji]) -> str:
    """A fingerprint of names and pictures, which samples are a function of besides settings."""
    total = hashlib.sha256()
    for e in emoji:
        total.update(json.dumps([e.code, e.name, e.keywords]).encode())
        for style, path in e.pictures.items():
            total.update(style.encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _tried_bytes(dataset: EmojiDataset, split: str, settings: SplitSettings) -> int:
    """Bytes of a split's sample, of the first ones; finds what is wrong before work is lost."""
    count = min(TRIED, settings.count)
    made = (dataset.make(settings.seed, i, split, settings.side) for i in range(count))
    return -(-sum(map(sample_bytes, made)) // count)


def _former(out: Path) -> dict[str, Any]:
    """What an earlier call recorded in `out`; ValueError where it holds something else."""
    if not out.is_dir():
        return {}
    shards = re.compile(rf"({'|'.join(SPLITS)})(/\1-\d{{5,}}\.tar(\.tmp)?)?$")
    own = {README, RECORD, f"{README}.tmp", f"{RECORD}.tmp"}
    for path in sorted([*out.iterdir(), *(p for s in SPLITS for p in (out / s).glob("*"))]):
        name = path.relative_to(out).as_posix()
        if name not in own and not shards.match(name):
            raise ValueError(
                f"OUT: expected a new folder or one of emoji, got {str(out)!r}, which holds "
                f"{name}; name another"
            )
    path = out / RECORD
    if not path.exists():
        if any(out.iterdir()):
            raise ValueError(
                f"OUT: expected a new folder or one of emoji, got {str(out)!r}, which has files "
                f"but no {RECORD}; name another"
            )
        return {}
    return read_record(out, "OUT")


def read_record(folder: Path, name: str = "data") -> dict[str, Any]:
    """What `write_emoji` recorded: "packages", "emoji", "skin_tones", "digest", "splits".

    name: of the setting that names the folder, for the message.

    Raises:
        ValueError: there is no record, or it cannot be read.
    """
    path = folder / RECORD
    try:
        if path.stat().st_size > LARGEST_RECORD:
            raise ValueError("it is too large")
        record = json.loads(read_text(path))
        if not isinstance(record, dict) or not isinstance(record.get("splits"), dict):
            raise ValueError("it tells no splits")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {path} cannot be read: {error}; name another folder") from error
    # Whoever deletes a split's folder may write it anew, with other settings.
    record["splits"] = {s: told for s, told in record["splits"].items() if (folder / s).is_dir()}
    return record


def _check_former(
    out: Path,
    former: Mapping[str, Any],
    record: Mapping[str, Any],
    settings: Mapping[str, SplitSettings],
) -> None:
    """Raises ValueError where new splits do not fit those of earlier calls."""
    if former and former.get("digest") != record["digest"]:
        raise ValueError(
            f"OUT: {str(out)!r} was made of other packages, styles or skin tones than these; "
            "splits of the two would not be apart; name another folder"
        )
    for split, chosen in settings.items():
        before = former.get("splits", {}).get(split) if former else None
        if before is not None and before != asdict(chosen):
            raise ValueError(
                f"OUT: {str(out / split)!r} was made with {_told(before)}, got "
                f"{_told(asdict(chosen))}; name another folder, or delete this one"
            )


def _told(settings: Any) -> str:
    pairs = settings.items() if isinstance(settings, dict) else ()
    return ", ".join(f"{name} {value}" for name, value in pairs) or "unknown settings"

"""Where samples come from: tars, token shards, folders of pairs; how many each holds.

A shard is a tar (on a disk, or of a `pipe:` or http(s) address), a token shard, or, in a folder of
pairs, a single image. Counts come from img2dataset's `_stats.json` next to each, from an index, or
from reading the headers.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from dalle1.common.config import SHAPES
from dalle1.common.files import expand_home, read_text
from dalle1.data.samples import (
    DUPLICATE_KEY,
    IMAGE_KEYS,
    NO_CAPTION,
    NO_IMAGE,
    BadSample,
    RawSample,
    caption_keys,
    caption_of,
    captions_of,
    image_of,
)
from dalle1.data.shards import token_shard as tokens
from dalle1.data.shards.explain import explain_folder, explain_tars
from dalle1.data.shards.names import TAR, TAR_ENDING, caption_beside, read_folder, shards_in
from dalle1.data.shards.stats import counted_samples
from dalle1.data.shards.tar import Shard, is_remote

TARS, TOKENS, PAIRS = "tars", "token shards", "pairs"
NAMES = re.compile(r"[^/\s'\"?=&|]+")  # of files, in an address


def find_shards(data: str) -> list[str]:
    """Shards of a brace pattern, or of a folder; none for a folder that holds no shards.

    Raises:
        ValueError: a shard is missing, a pattern is invalid, or a folder holds two kinds.
    """
    data = expand_home(data)
    if not data.strip():  # of a variable that is not set; it would be the working folder
        raise ValueError(f"data: expected shards or a folder, got {data!r}; '.' is the folder here")
    if not is_remote(data) and Path(data).is_dir():
        found = {ending: shards_in(data, ending) for ending in (TAR, tokens.END)}
        if all(found.values()):
            raise ValueError(
                f"data: {data!r} holds tars and token shards; give one kind by a pattern such as "
                f"'{data}/{{00000..00009}}{tokens.END}'"
            )
        return found[TAR] or found[tokens.END]
    if data == SHAPES and not Path(data).exists():
        raise ValueError(
            f"data: {data!r}, the built-in data, is written by a run that trains on it; give the "
            "folder below reader.shapes_folder (data/shapes)"
        )
    try:
        addresses = [expand_home(address) for address in braceexpand(data)]
    except ValueError as error:
        raise ValueError(f"data: {data!r} is not a valid brace pattern: {error}") from error
    missing = [a for a in addresses if not is_remote(a) and not Path(a).is_file()]
    if missing:
        raise ValueError(
            f"data: {missing[0]} does not exist ({len(missing)} of {len(addresses)} shards of "
            f"{data!r} are missing); give shards such as 'path/{{0000..0009}}.tar', a folder of "
            "tars, a folder of images with a .txt of the same name for each, or pipe: and "
            "http(s) addresses"
        )
    for address in addresses:
        if not is_remote(address) and not _is_shard(address):
            raise ValueError(
                f"data: expected tars or token shards, got {address!r}, which is neither; images "
                "and captions of a table are made into shards by launch/shard.py first, and a .zip "
                "is unpacked and given as a folder"
            )
    return addresses


def _is_shard(path: str) -> bool:
    """Whether a file is called a shard, damaged or not, or is a tar whatever its name."""
    name = Path(path).name.lower()
    return bool(TAR_ENDING.search(name)) or name.endswith(tokens.END) or tarfile.is_tarfile(path)


def find_pairs(folder: str | Path) -> list[str]:
    """Images of a folder, at any depth, that have a .txt of the same name next to them."""
    images = read_folder(folder).images.items()
    return [str(i) for i, caption in images if i.is_file() and caption and caption.is_file()]


def _some_pairs(data: str) -> list[str]:
    pairs = find_pairs(data)
    if not pairs:
        raise ValueError(
            f"data: {data!r} has neither .tar shards nor images with .txt captions"
            + explain_folder(data)
        )
    return pairs


def read_pair(image: str | Path) -> RawSample:
    """A sample of a folder of pairs."""
    path = Path(image)
    caption = caption_beside(path).read_bytes()
    return {"__key__": path.stem, path.suffix[1:].lower(): path.read_bytes(), "txt": caption}


def kind_of(data: str, shards: Sequence[str]) -> str:
    """TARS, TOKENS or PAIRS, where `find_shards` found these shards.

    Raises:
        ValueError: they are of two kinds, or token shards that are not on a disk.
    """
    ends = {tokens.END if shard.lower().endswith(tokens.END) else TAR for shard in shards}
    if len(ends) > 1:
        raise ValueError(f"data: {data!r} names tars and token shards; give one kind")
    if tokens.END in ends and any(map(is_remote, shards)):
        raise ValueError(
            f"data: expected token shards on a disk, as they are mapped into memory, got {data!r}; "
            "copy them there first"
        )
    return PAIRS if not shards else TOKENS if tokens.END in ends else TARS


def no_images(data: str) -> str:
    """The message for token shards, of tools that read images."""
    return (
        f"data: {data!r} holds token shards already, where images are asked for; give the raw "
        "shards that they were made of"
    )


def raw_samples(data: str, extensions: frozenset[str] | None = None) -> Iterator[RawSample]:
    """All undecoded samples in the order of the files; of damaged tars those before the damage.

    Args:
        data: as the setting `data` of a run.
        extensions: files with others may be empty, which saves reading them.

    Raises:
        ValueError: data that are missing, hold nothing, or are token shards; a remote shard of
            which nothing can be read.
    """
    shards = find_shards(data)
    if kind_of(data, shards) == TOKENS:
        raise ValueError(no_images(data))
    if not shards:
        for pair in _some_pairs(data):
            yield from _pair(pair)
    for address in shards:
        shard = Shard(address, extensions=extensions)
        count = 0
        for count, sample in enumerate(shard, 1):  # noqa: B007
            yield sample.raw()
        if shard.damage and is_remote(address) and not count:
            raise ValueError(f"data: {address} cannot be read: {shard.damage}")
        if shard.damage:
            warnings.warn(f"{address} is damaged, its rest is lost: {shard.damage}", stacklevel=2)


def read_captions(data: str, caption_key: str, most: int, lines: bool = False) -> list[str]:
    """The first `most` captions in the order of the files; bad samples are left out.

    `caption_key` and `lines` are those of `samples.captions_of`.

    Raises:
        ValueError: data that are missing, or have not one caption.
    """
    shards = find_shards(data)
    captions: list[str] = []
    if kind_of(data, shards) == TOKENS:
        for path in shards:
            for texts in tokens.TokenShard(path).captions(most):
                captions += texts
            if len(captions) >= most:
                break
        return captions[:most]
    bad: Counter[str] = Counter()
    for sample in raw_samples(data, frozenset({"txt", "json"})):
        try:
            captions += captions_of(sample, caption_key, lines)
        except BadSample as error:
            bad[error.cause] += 1
            continue
        if len(captions) >= most:
            break
    if not captions:
        raise ValueError(no_good(data, caption_key, bad))
    return captions[:most]


def no_good(data: str, caption_key: str, causes: Counter[str]) -> str:
    """The message where hardly a sample can be used, with the causes."""
    found = ", ".join(f"{count} x {cause}" for cause, count in causes.most_common()) or "none read"
    names = ""
    if causes.keys() & {NO_IMAGE, NO_CAPTION, DUPLICATE_KEY}:
        with suppress(ValueError):  # gone meanwhile
            names = explain_tars(find_shards(data))
    return (
        f"data: hardly a usable sample in {data!r} ({found}); images must be "
        f"{', '.join(IMAGE_KEYS)}, captions in {caption_key!r} "
        "(caption_key: txt, or the name of a key of the json)" + names
    )


@dataclass(frozen=True)
class Index:
    """The shards of a data set in order, and how many samples each is said to hold."""

    data: str
    kind: str
    shards: list[str]
    counts: list[int]

    @property
    def samples(self) -> int:
        """Of all shards."""
        return sum(self.counts)

    def fingerprint(self) -> str:
        """The same for the same names and counts, wherever the shards lie."""
        lines = [f"{Path(s).name} {n}" for s, n in zip(self.shards, self.counts, strict=True)]
        text = "\n".join([self.kind, *lines]).encode(errors="surrogateescape")
        return hashlib.sha256(text).hexdigest()[:16]

    def is_of(self, data: str) -> bool:
        """Whether `data` names these shards, or the folder that they are in, which may hold more.

        An index is a file that others may have written, and a pipe's address runs a command.
        """
        if self.data != data:
            return False
        if is_remote(data) or not Path(data).is_dir():
            return self.shards == list(braceexpand(data))
        shards = [Path(shard) for shard in self.shards if not is_remote(shard)]
        below = [s.relative_to(data) for s in shards if Path(data) in s.parents]
        return len(below) == len(self.shards) and all(".." not in s.parts for s in below)

    def as_json(self) -> str:
        """For a file."""
        return json.dumps(self.__dict__) + "\n"

    @staticmethod
    def from_json(text: str) -> Index:
        """What `as_json` gave; see `is_of` for what it may say."""
        return Index(**json.loads(text))


def make_index(
    data: str,
    counts: str | Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    largest: Callable[[list[float]], list[float]] = list,
) -> Index:
    """Finds the shards and their counts.

    Args:
        data: as the setting `data` of a run.
        counts: a JSON of webdataset's index format
            ({"shardlist": [{"url": ..., "nsamples": ...}]}), whose shards have the
            names of those found, in any order; None: they are counted.
        rank: of this process, which counts its part.
        world_size: number of ranks.
        largest: gives each value's largest over the ranks.

    Raises:
        ValueError: data that are missing, hold nothing or cannot be counted.
    """
    shards = find_shards(data)
    kind = kind_of(data, shards)
    if kind == PAIRS:
        pairs = _some_pairs(data)
        return Index(data, kind, pairs, [1] * len(pairs))
    given = _given_counts(shards, counts) if counts is not None else None
    # What all token shards must have been made with.
    made_with = tokens.TokenShard(shards[0]).settings if kind == TOKENS else None
    # One more than the count, so that 0 is a shard that no rank could count.
    found = [0.0] * len(shards)
    why = ""
    for i in range(rank, len(shards), world_size):
        try:
            if made_with is not None:
                held = tokens.TokenShard(shards[i])
                if held.settings != made_with:
                    raise ValueError(
                        f"it was made with {held.settings}, {shards[0]} with {made_with}"
                    )
                count = held.count
            elif given is not None:
                count = given[i]
            else:
                count = count_samples(shards[i])
            found[i] = 1.0 + count
        except (OSError, ValueError) as error:
            why = f": {error}"
    found = largest(found)
    if 0.0 in found:
        raise ValueError(f"data: {shards[found.index(0.0)]} cannot be read{why}")
    index = Index(data, kind, shards, [int(n) - 1 for n in found])
    if not index.samples:
        raise ValueError(f"data: not one sample in the {len(shards)} shards of {data!r}")
    return index


def count_samples(address: str) -> int:
    """How many samples a tar holds, by its `_stats.json`, or by the names in it.

    Raises:
        OSError: it cannot be read.
    """
    stats = counted_samples(address)
    if stats is not None:
        return stats
    shard = Shard(address, headers_alone=True)
    count = sum(1 for _ in shard)
    if shard.damage:
        if is_remote(address) and not count:
            raise OSError(shard.damage)
        warnings.warn(f"{address} is damaged, its rest is lost: {shard.damage}", stacklevel=2)
    return count


def _given_counts(shards: Sequence[str], path: str | Path) -> list[int]:
    try:
        listed = json.loads(read_text(path))["shardlist"]
        pairs = [(Path(str(entry["url"])).name, int(entry["nsamples"])) for entry in listed]
        counts = dict(pairs)
        if len(counts) != len(pairs) or any(n < 0 for n in counts.values()):
            raise ValueError("a name that comes twice, or a count below 0")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'reader.counts: {str(path)!r} is no index {{"shardlist": [{{"url": ..., "nsamples": '
            f"...}}]}}: {error!r}"
        ) from error
    found = []
    for shard in shards:
        # Of `pipe:cat a/0000.tar | tee x` no end is the name: a shard's is the one it mentions.
        names = {name for name in NAMES.findall(shard) if name in counts}
        if len(names) != 1:
            raise ValueError(
                f"reader.counts: {str(path)!r} names {len(names)} shards for {shard}: expected one"
            )
        found.append(counts[names.pop()])
    return found


def check_readable(index: Index, caption_key: str, samples: int = 64, shards: int = 8) -> None:
    """Tries the caption key on some samples of some shards, before a run begins.

    Raises:
        ValueError: none of them has an image, and a caption under the key; lists what is there.
    """
    if index.kind == TOKENS:
        return
    captions = 0
    bad: Counter[str] = Counter()
    there: Counter[str] = Counter()
    some = index.shards[:: -(-len(index.shards) // shards)]
    for shard in some:
        for raw in _first(index.kind, shard, max(1, samples // len(some))):
            try:
                caption_of(raw, caption_key)
                captions += 1
                image_of(raw)
                return
            except BadSample as error:
                bad[error.cause] += 1
                there.update(caption_keys(raw))
    if not bad:
        return  # nothing read at all: the reader says why
    if captions:
        raise ValueError(no_good(index.data, caption_key, bad))
    keys = ", ".join(key for key, _ in there.most_common()) or "none that hold text"
    found = ", ".join(f"{count} x {cause}" for cause, count in bad.most_common())
    names = explain_tars(some) if index.kind == TARS else ""
    raise ValueError(
        f"reader.caption_key: {caption_key!r} gives no caption of any of {bad.total()} samples of "
        f"{index.data!r} ({found}); keys that are there: {keys}{names}"
    )


def _pair(image: str) -> Iterator[RawSample]:
    with suppress(OSError):  # gone, or not to be read
        yield read_pair(image)


def _first(kind: str, shard: str, most: int) -> Iterator[RawSample]:
    if kind == PAIRS:
        yield from _pair(shard)
        return
    for i, sample in enumerate(Shard(shard)):
        if i == most:
            return
        yield sample.raw()

"""Model folders on the Hub: which of a repository's files are one, and how large they may be.

`config.json` comes first. It says of which kinds the parts are, and so which files there must be
and which weights they hold. Sizes are compared with that before any weights are fetched. What else
a repository holds is never asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle1 import registry
from dalle1.common.files import size_text
from dalle1.hub.access import HubAccess, Listing, RemoteFile
from dalle1.hub.cache import (
    cached_file,
    find_commit,
    is_known_absent,
    remember_absent,
    snapshot_folder,
)
from dalle1.hub.errors import HubError, HubUnreachableError, warn_of_cache
from dalle1.hub.names import PREFIX, HubName
from dalle1.tokenizer import TOKENIZER
from dvae.loading import shapes
from dvae.storage import CONFIG, Kind, read_config, read_shape
from dvae.weights import INDEX, LARGEST_INDEX, weight_map, weights_names

LARGEST_CONFIG = 2**20  # bytes of config.json
LARGEST_TEXT = 2**26  # of a tokenizer, or of another file beside the weights
# Of a weights file: bytes of a number, whatever its type; for each weight in the header, beside its
# name; and for what else the header may say.
NARROWEST, WIDEST, ENTRY, SPARE = 1, 8, 256, 2**16
ROLES = ("prior", "codec", "ranker")


@dataclass(frozen=True)
class _Part:
    """A part of a model as `config.json` describes it."""

    kind: Kind
    config: Any

    def __str__(self) -> str:
        return f"a {self.kind.role} of kind {self.kind.name!r}"


def fetch_model(name: HubName, access: HubAccess, skip: Collection[str] = ()) -> Path:
    """The folder of a model in the Hub's cache, complete; what is missing in it is fetched.

    Without a network, it is what the cache holds. A commit that is named in full and complete is
    not asked for again.

    Args:
        name: of the repository.
        access: to the Hub.
        skip: roles of parts that are not needed.

    Raises:
        ValueError: the repository holds no model of ours, or what it tells does not fit together;
            it, or the revision, is not there; or, without a network, it is not in the cache.
        ConnectionError: the Hub cannot be reached, and the cache does not hold it either.
    """
    folder = access.folder(name)
    held = find_commit(folder, name.revision)
    settled = access.offline or held == name.revision
    if held is not None and settled and _is_complete(folder, held, name, skip):
        return snapshot_folder(folder, held)
    if access.offline:
        raise HubError(
            f"model: {name} is not in the cache {folder.parent}, and the network is not to be used "
            "(HF_HUB_OFFLINE or local_files_only); fetch it once with a network"
        )
    try:
        listing = access.list_files(name)
    except HubUnreachableError as error:
        if held is None or not _is_complete(folder, held, name, skip):
            raise
        warn_of_cache(error)
        return snapshot_folder(folder, held)
    path = _fetch(listing, access, skip)
    access.remember(listing)
    return path


def _is_complete(folder: Path, commit: str, name: HubName, skip: Collection[str]) -> bool:
    """Whether the cache holds all files of a model."""

    def holds(file: str) -> bool:
        return cached_file(folder, commit, file) is not None

    if not holds(CONFIG) or not holds(TOKENIZER):
        return False
    snapshot = snapshot_folder(folder, commit)
    for part in _read_parts(snapshot, name, skip):
        for file in part.kind.assets:
            if not holds(file) and not is_known_absent(folder, commit, file):
                return False
        if part.kind.weights is not None:
            there = next((n for n in weights_names(part.kind.weights) if holds(n)), None)
            if there is None:
                return False
            if there.endswith(INDEX) and not all(map(holds, _shards(snapshot / there, name))):
                return False
    return True


def fetch_own_part(listing: Listing, access: HubAccess, role: str) -> Path | None:
    """The folder, in the cache, of a codec, a prior, a ranker or a tokenizer of ours.

    None where the repository has no such part of ours. Raises as `fetch_model`.
    """
    told = access.find(listing, CONFIG)
    if told is None or told.size > LARGEST_CONFIG:
        return None
    snapshot = access.fetch(listing, told).parent
    try:
        content = read_config(snapshot)
    except ValueError:  # somebody else's
        return None
    if "kind" not in content.get(role, {}):
        return None
    skip = set(ROLES) - {role}
    parts = list(_parts(content, snapshot, listing.name, skip))
    _fetch_files(listing, access, parts, [TOKENIZER] if role == "tokenizer" else [])
    return snapshot


def _fetch(listing: Listing, access: HubAccess, skip: Collection[str]) -> Path:
    name = listing.name
    told = access.find(listing, CONFIG)
    if told is None:
        raise HubError(
            f"model: {name} holds no {CONFIG}, and so no model of dalle1; {_other(name)}"
        )
    _check_at_most(name, told, LARGEST_CONFIG)
    snapshot = access.fetch(listing, told).parent
    _fetch_files(listing, access, _read_parts(snapshot, name, skip), [TOKENIZER])
    return snapshot


def _fetch_files(
    listing: Listing, access: HubAccess, parts: Collection[_Part], needed: Collection[str]
) -> None:
    """Fetches the files of parts, and others; all are judged before the first of them comes."""
    wanted = _texts(listing, access, parts, needed)
    for part in parts:
        if part.kind.weights is not None:
            wanted += _weights(listing, access, part, part.kind.weights)
    for file in wanted:
        access.fetch(listing, file)


def _texts(
    listing: Listing, access: HubAccess, parts: Collection[_Part], needed: Collection[str]
) -> list[RemoteFile]:
    """The files beside the weights: those that are needed, and those that parts may have."""
    wanted: list[RemoteFile] = []
    for file in (*needed, *(file for part in parts for file in part.kind.assets)):
        found = access.find(listing, file)
        if found is None and file in needed:
            raise HubError(f"model: {listing.name}: {file} is missing from the repository")
        if found is None:
            remember_absent(access.folder(listing.name), listing.commit, file)
            continue
        _check_at_most(listing.name, found, LARGEST_TEXT)
        wanted.append(found)
    return wanted


def _weights(listing: Listing, access: HubAccess, part: _Part, file: str) -> list[RemoteFile]:
    """The files of a part's weights, whose sizes fit what its config describes.

    Raises ValueError where one is missing or they do not fit.
    """
    name = listing.name
    candidates = (access.find(listing, n) for n in weights_names(file))
    first = next((found for found in candidates if found is not None), None)
    if first is None:
        raise HubError(
            f"model: {name}: {file}, the weights of {part}, is missing from the repository"
        )
    if not first.name.endswith(INDEX):
        _check_weights(name, part, first.name, first.size)
        return [first]
    _check_at_most(name, first, LARGEST_INDEX)
    names = _shards(access.fetch(listing, first), name)
    shards = [access.find(listing, shard) for shard in names]
    for shard, found in zip(names, shards, strict=True):
        if found is None:
            raise HubError(f"model: {name}: the shard {shard} of {first.name} is missing")
    held = [found for found in shards if found is not None]
    _check_weights(name, part, first.name, sum(found.size for found in held))
    return [first, *held]


def _shards(index: Path, name: HubName) -> list[str]:
    """The names of an index' shards; ValueError where it is none."""
    names = sorted(set(weight_map(index).values()))
    for shard in names:
        if not shard.endswith(".safetensors"):
            raise HubError(
                f"model: {name}: {index.name}: expected shards in safetensors, got {shard!r}"
            )
    return names


def _check_weights(name: HubName, part: _Part, file: str, size: int) -> None:
    """Raises ValueError where a size cannot be that of a part's weights."""
    kind, config = part.kind, part.config
    where = Path(f"{name}/{file}")
    expected = shapes(lambda: kind.module(config), size, where, str(part))
    if expected is None:  # of somebody else's class, which does not tell without numbers
        return
    least, most = _bytes(expected)
    if not least <= size <= most:
        raise HubError(
            f"model: {name}: {file}: expected {size_text(least)} to {size_text(most)} for {part} "
            f"as {CONFIG} describes it, got {size_text(size)}; the files are of different models"
        )


def _bytes(expected: Mapping[str, Tensor]) -> tuple[int, int]:
    """The fewest and the most bytes of a file of these weights."""
    least = most = 0
    for key, weight in expected.items():
        fixed = 0 if weight.is_floating_point() else weight.element_size()
        least += weight.numel() * (fixed or NARROWEST)
        most += weight.numel() * (fixed or WIDEST) + len(key.encode()) + ENTRY
    return least, most + SPARE


def _check_at_most(name: HubName, file: RemoteFile, largest: int) -> None:
    if file.size > largest:
        raise HubError(
            f"model: {name}: {file.name}: expected at most {size_text(largest)}, got "
            f"{size_text(file.size)}; it is none of a model's"
        )


def _read_parts(snapshot: Path, name: HubName, skip: Collection[str]) -> list[_Part]:
    """The parts that `config.json` describes.

    Raises ValueError where it is not one of ours, or a part would be fetched by other means.
    """
    try:
        content = read_config(snapshot)
    except ValueError as error:
        raise HubError(f"model: {name}: {error}; {_other(name)}") from error
    if "kind" not in content.get("prior", {}):
        raise HubError(f"model: {name}: {CONFIG} has no prior of ours; {_other(name)}")
    return list(_parts(content, snapshot, name, skip))


def _parts(
    content: Mapping[str, Any], snapshot: Path, name: HubName, skip: Collection[str]
) -> Iterator[_Part]:
    for role in ROLES:
        section = dict(content.get(role) or {})
        if not section or role in skip:
            continue
        kind = registry.find_kind(role, section.pop("kind", ""), snapshot / CONFIG)
        config = read_shape(kind, section, snapshot)
        named = registry.ranker_name(kind, config)
        if named is not None:
            raise HubError(
                f"ranker: {name} ranks by {named!r}, which another package would fetch from "
                f"elsewhere; give ranker={named!r} if you trust it, or ranker='none'"
            )
        yield _Part(kind, config)


def _other(name: HubName) -> str:
    return f"for somebody else's model, `dalle1 import {PREFIX}{name} OUT`"

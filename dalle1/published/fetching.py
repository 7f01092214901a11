"""Somebody else's model on the Hub: the files that its reader opens are fetched, and no others.

What may be of which family is told by the names of the files, and by the small files of settings
among them. Weights are fetched when one set of them is meant.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dalle1.common.files import size_text
from dalle1.hub.access import HubAccess, Listing, RemoteFile
from dalle1.hub.cache import snapshot_folder
from dalle1.hub.errors import HubError
from dalle1.hub.models import fetch_own_part
from dalle1.hub.names import PREFIX, HubName
from dalle1.published import table
from dalle1.published.parts import SeveralModelsError, fits
from dalle1.published.settings import LARGEST as LARGEST_SETTINGS
from dalle1.published.tokenizers import FILES as TOKENIZERS
from dvae.storage import CONFIG
from dvae.weights import INDEX, weight_map

SETTINGS = (".json", ".yaml", ".yml")
TEXTS = (*SETTINGS, ".txt", ".gz", ".model")
LARGEST_TEXT, LARGEST_WEIGHTS = 2**26, 2**36  # bytes of a vocabulary, of a file of weights


def fetch_source(kind: str | None, access: HubAccess, name: HubName) -> Path:
    """The file or the folder of somebody else's model, in the cache.

    Args:
        kind: the family's name; None where the files tell.
        access: to the Hub.
        name: of the repository, or of one of its files.

    Raises:
        ValueError: the files are of no family or of several models; they are far too large; or the
            repository, its revision or its file is not there.
        ConnectionError: the Hub cannot be reached.
    """
    listing = access.list_files(replace(name, file=None))
    return _fetch_chosen(listing, access, kind, name.file)


def fetch_part_source(role: str, access: HubAccess, name: HubName) -> Path:
    """The same for a codec, a ranker or a tokenizer alone, which may also be one of ours."""
    listing = access.list_files(replace(name, file=None))
    if name.file is None:
        own = fetch_own_part(listing, access, role)
        if own is not None:
            access.remember(listing)
            return own
    if role != "tokenizer":
        return _fetch_chosen(listing, access, None, name.file)
    below = _folder_of(name.file)
    patterns = [below + pattern for pattern in TOKENIZERS]
    patterns += [] if name.file else [f"tokenizer/{pattern}" for pattern in TOKENIZERS]
    names = [n for n in listing.files if any(fits(pattern, n) is not None for pattern in patterns)]
    names += [name.file] if name.file is not None and name.file not in names else []
    return _fetch_named(listing, access, names, name.file)


def _fetch_chosen(listing: Listing, access: HubAccess, kind: str | None, file: str | None) -> Path:
    """Fetches what the readers open of a repository's first folder, or of the file's."""
    below = _folder_of(file)
    names = [n.removeprefix(below) for n in listing.files if n.startswith(below)]
    asked = None if file is None else file.removeprefix(below)
    if asked is not None and asked not in names:
        raise HubError(f"SOURCE: {listing.name}: expected a file of the repository, got {file!r}")
    if kind is None and CONFIG in names:
        _check_not_ours(listing, access, below + CONFIG)
    chosen, several = _candidates(kind, names, asked)
    if kind is None and chosen:
        certain = _recognized(listing, access, chosen, below, asked)
        chosen, several = (certain, []) if certain else (chosen, several)
    weights = {n: {f for f in found if not f.endswith(TEXTS)} for n, found in chosen.items()}
    # A prior's folder may hold its codec, too, whose family would take it for all.
    most: set[str] = max(weights.values(), key=len, default=set())
    for error in several:
        if not most.issuperset(error.files):
            raise HubError(
                f"SOURCE: {listing.name}: {error}, as {PREFIX}{listing.name}/FILE"
            ) from error
    if not chosen:
        expected = kind or " or ".join(table.families())
        raise HubError(
            f"SOURCE: {listing.name}: expected the files of a model of {expected}, got none by "
            f"their names; name the file, as {PREFIX}{listing.name}/FILE"
        )
    if not all(held <= most for held in weights.values()):
        raise HubError(
            f"KIND: {listing.name} may be of several families; say which: {' or '.join(chosen)}"
        )
    wanted = (below + f for n, found in chosen.items() if weights[n] == most for f in found)
    return _fetch_named(listing, access, list(dict.fromkeys(wanted)), file)


def _check_not_ours(listing: Listing, access: HubAccess, config: str) -> None:
    """Raises ValueError for a model folder of ours, which no family's reader would open."""
    told = access.find(listing, config)
    if told is None or told.size > LARGEST_SETTINGS:
        return
    if table.is_ours(access.fetch(listing, told).parent):
        raise table.refused_as_ours(listing.name)


def _folder_of(file: str | None) -> str:
    """The folder of a repository's file, with a slash at the end; "" for the first."""
    folder, slash, _ = (file or "").rpartition("/")
    return folder + slash


def _candidates(
    kind: str | None, names: Sequence[str], file: str | None
) -> tuple[Mapping[str, list[str]], list[SeveralModelsError]]:
    """The files that each family would open, by the families' names; and the errors of those that
    might open several models."""
    known = table.families() if kind is None else {kind: table.find_family(Path(), kind)}
    chosen: dict[str, list[str]] = {}
    several: list[SeveralModelsError] = []
    for family in known.values():
        try:
            found = family.files.choose(names, file)
        except SeveralModelsError as error:
            several.append(error)
            continue
        if found is not None:
            chosen[family.name] = found
    return chosen, several


def _recognized(
    listing: Listing,
    access: HubAccess,
    chosen: Mapping[str, list[str]],
    below: str,
    file: str | None,
) -> Mapping[str, list[str]]:
    """The families that know their own by the files of settings, if any does.

    They look at a folder in which all other files are empty.
    """
    names = dict.fromkeys(n for found in chosen.values() for n in found)
    with tempfile.TemporaryDirectory(prefix="dalle1-hub-") as made:
        outline = Path(made)
        for name in names:
            path = outline / name
            path.parent.mkdir(parents=True, exist_ok=True)
            told = access.find(listing, below + name) if name.endswith(SETTINGS) else None
            if told is None or told.size > LARGEST_SETTINGS:
                path.touch()
            else:
                shutil.copyfile(access.fetch(listing, told), path)
        known = table.families()
        source = outline if file is None else outline / file
        return {n: found for n, found in chosen.items() if known[n].recognizes(source)}


def _fetch_named(
    listing: Listing, access: HubAccess, names: Sequence[str], file: str | None
) -> Path:
    """Fetches files, all of which are judged before the first comes; the folder, or the file."""
    wanted = [_told(listing, access, name) for name in names]
    for told in wanted:
        path = access.fetch(listing, told)
        if told.name.endswith(INDEX):
            for shard in sorted(set(weight_map(path).values())):
                access.fetch(listing, _told(listing, access, _folder_of(told.name) + shard))
    access.remember(listing)
    snapshot = snapshot_folder(access.folder(listing.name), listing.commit)
    return snapshot / (_folder_of(file) if file is None else file)


def _told(listing: Listing, access: HubAccess, name: str) -> RemoteFile:
    """A file, of a size that it may have."""
    found = access.find(listing, name)
    if found is None:
        raise HubError(f"SOURCE: {listing.name}: {name} is missing from the repository")
    largest = LARGEST_TEXT if name.endswith(TEXTS) else LARGEST_WEIGHTS
    if found.size > largest:
        raise HubError(
            f"SOURCE: {listing.name}: {name}: expected at most {size_text(largest)}, got "
            f"{size_text(found.size)}"
        )
    return found

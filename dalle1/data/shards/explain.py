"""Why images lack their captions: what the names of the files show, for a refusal of the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from webdataset.tariterators import base_plus_ext

from dalle1.data.samples import IMAGE_KEYS
from dalle1.data.shards.names import TAR_ENDING, read_folder
from dalle1.data.shards.tar import Shard, is_remote

CAPTION_KEYS = ("txt", "json")
MAX_SHARDS = 4  # whose names are read
MAX_SAMPLES = 25_000  # of each
MAX_LISTED = 8  # extensions


def explain_tars(addresses: Sequence[str]) -> str:
    """A part of a sentence, to be put behind one, on the names in some shards; empty where there is
    nothing to say."""
    endings: Counter[str] = Counter()
    apart: list[str] = []  # keys that come again, with files that they did not have before
    paired = compound = False
    for address in addresses[:: -(-len(addresses) // MAX_SHARDS) or 1]:
        known: dict[str, set[str]] = {}
        with suppress(OSError):
            for sample in islice(Shard(address, headers_alone=True), MAX_SAMPLES):
                in_order = [name for name in sample.raw() if name != "__key__"]
                found = set(in_order)
                endings.update(in_order)
                paired |= bool(found & {*IMAGE_KEYS} and found & {*CAPTION_KEYS})
                compound |= any(_is_compound(ending) for ending in found)
                before = known.setdefault(sample.key, set())
                if before and not before & found:
                    apart.append(sample.key)
                before |= found
        if is_remote(address) and endings:
            break  # each more would be read to its end
    if not endings or (paired and not apart and not compound):
        return ""
    text = _listed(endings)
    if apart:
        return (
            f"{text}; files of one name must lie side by side in a tar, and those of "
            f"{apart[0]!r} do not: write it anew, sorted by name"
        )
    if not paired and len(endings) > 1:
        text += (
            "; an image and its caption must have one name up to the first dot, such as 0001.jpg "
            "and 0001.txt, and lie side by side in one tar"
        )
    return text


def explain_folder(folder: str | Path) -> str:
    """As `explain_tars`, on the names in a folder of pairs."""
    found = read_folder(folder)
    names = (base_plus_ext(path.name)[1] for path in found.files)
    endings = Counter(name.lower() for name in names if name)
    shards = [p for p in found.files if TAR_ENDING.search(p.name)] if not found.images else []
    if shards:
        return (
            f"; of the shards in it ({len(shards):,}), such as "
            f"{str(shards[0].relative_to(folder))!r}, those in sub-folders and compressed ones are "
            "given by a pattern such as 'path/{a,b}/{0000..0009}.tar.gz'"
        )
    without = [image for image, caption in found.images.items() if caption is None]
    if not endings or (found.images and not without):
        return ""
    text = _listed(endings)
    if without and found.lonely:
        image, caption = (path.relative_to(folder) for path in (without[0], found.lonely[0]))
        text += (
            f"; an image and its caption must have one name and lie side by side, unlike "
            f"{str(image)!r} and {str(caption)!r}"
        )
    return text


def _is_compound(ending: str) -> bool:
    """Whether an extension would be an image's or a caption's if it began behind the last dot."""
    return ending.rpartition(".")[2] in (*IMAGE_KEYS, *CAPTION_KEYS) and "." in ending


def _listed(endings: Counter[str]) -> str:
    shown = [f"{ending!r} ({count:,})" for ending, count in endings.most_common(MAX_LISTED)]
    others = len(endings) - len(shown)
    more = f" and {others:,} others" if others else ""
    return f"; extensions found, behind the first dot of each name: {', '.join(shown)}{more}"

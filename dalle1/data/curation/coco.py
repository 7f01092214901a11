"""MS-COCO's pictures and captions as they are published (Lin et al. 2014, Chen et al. 2015).

    captions_val2014.json   {"images": [{"id", "file_name", ...}],
                             "annotations": [{"id", "image_id", "caption"}], ...}
    val2014/                the pictures, by `file_name`

A picture has about five captions. Each entry that cannot be used is a row with its fault: first the
pictures in the order of `images`, then what is wrong with single annotations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dalle1.common.files import size_text
from dalle1.data.curation.captions import OUTSIDE, CaptionChoice, captioned, is_inside
from dalle1.data.curation.rows import SHOWN, Row
from dalle1.data.samples import cleaned

LARGEST = 2**30  # bytes of an annotation file; the largest of captions has 92 MB
EXPECTED = "MS-COCO's caption annotations, such as captions_val2014.json"

NO_ENTRY = "image entry without id and file_name"
SAME_ID, SAME_FILE = "duplicate image id", "duplicate file name"
NO_ANNOTATION = "annotation that is no entry"
SAME_ANNOTATION = "duplicate annotation id"
NO_TEXT, EMPTY_TEXT = "annotation without a caption", "annotation with an empty caption"
ORPHAN = "annotation without an image"


def read_coco(folder: Path, annotations: Path, choice: CaptionChoice) -> Iterator[Row]:
    """The pictures of an annotation file in its order; no picture is opened.

    Args:
        folder: holds the pictures, or a folder that is called as the split: `val2014` for
            `captions_val2014.json`.
        annotations: the json.
        choice: which of a picture's captions stay.

    Raises:
        ValueError: a folder or a file that is not there, or no such json.
    """
    if not folder.is_dir():
        raise ValueError(
            f"source: expected the folder of MS-COCO's pictures, got {str(folder)!r}; unpack "
            "val2014.zip or train2014.zip"
        )
    images, found = _read(annotations)
    split = folder / annotations.stem.removeprefix("captions_")
    return _rows(split if split.is_dir() else folder, images, found, choice)


def _read(path: Path) -> tuple[list[Any], list[Any]]:
    """The lists of images and annotations."""
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise ValueError(f"a file of {size_text(size)}")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"coco: {str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"coco: expected {EXPECTED}, got {str(path)!r}: {error}") from error
    keys = content if isinstance(content, dict) else {}
    images, annotations = keys.get("images"), keys.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        there = ", ".join(map(repr, keys))[:SHOWN] or "no keys"
        raise ValueError(
            f"coco: expected {EXPECTED}, with lists 'images' and 'annotations', got {str(path)!r} "
            f"with {there}"
        )
    return images, annotations


def _rows(
    folder: Path, images: list[Any], annotations: list[Any], choice: CaptionChoice
) -> Iterator[Row]:
    names = [_name(entry) for entry in images]
    captions, faults = _captions(annotations, {name[0] for name in names if name})
    seen: set[Any] = set()
    for number, name in enumerate(names):
        if name is None:
            yield Row(number, f"image {number}", None, None, {}, NO_ENTRY)
            continue
        identity, file = name
        shown = f"image {identity!r}, {file!r}"[:SHOWN]
        # An identity is a number or a text with its type, a file name a text alone.
        fault = SAME_ID if (identity,) in seen else SAME_FILE if file in seen else ""
        if not fault and not is_inside(file):
            fault = OUTSIDE
        seen |= {(identity,), file}
        if fault:
            yield Row(number, shown, None, None, {}, fault)
            continue
        columns = {"path": file, "image_id": identity}
        held = captions.get(identity, [])
        yield captioned(number, shown, folder / file, held, choice, columns)
    for number, (shown, fault) in enumerate(faults, len(names)):
        yield Row(number, shown, None, None, {}, fault)


def _captions(
    annotations: list[Any], known: set[Any]
) -> tuple[dict[Any, list[str]], list[tuple[str, str]]]:
    """The captions of each image in the order of the file; what is wrong with the others, by name
    and fault."""
    captions: dict[Any, list[str]] = {}
    faults: list[tuple[str, str]] = []
    seen: set[Any] = set()
    for i, entry in enumerate(annotations):
        shown, fault = f"annotation {i}", ""
        if not isinstance(entry, dict):
            faults.append((shown, NO_ANNOTATION))
            continue
        identity, image = entry.get("id"), entry.get("image_id")
        given = entry.get("caption")
        caption = cleaned(given) if isinstance(given, str) else None
        if _is_identity(identity):
            shown = f"annotation {identity!r}"[:SHOWN]
            fault = SAME_ANNOTATION if identity in seen else ""
            seen.add(identity)
        if not fault and not caption:
            fault = NO_TEXT if caption is None else EMPTY_TEXT
        if not fault and (not _is_identity(image) or image not in known):
            fault = ORPHAN
        if fault or not caption:
            faults.append((shown, fault))
        else:
            captions.setdefault(image, []).append(caption)
    return captions, faults


def _name(entry: Any) -> tuple[Any, str] | None:
    """Identity and file name of an image's entry; None where it has none."""
    if not isinstance(entry, dict):
        return None
    identity, file = entry.get("id"), entry.get("file_name")
    return (identity, file) if _is_identity(identity) and isinstance(file, str) else None


def _is_identity(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)

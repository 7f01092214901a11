"""The birds of CUB-200-2011 with the captions of Reed et al. (2016), as both are published.

    CUB_200_2011/images.txt            "1 001.Black_footed_Albatross/Black_Footed_Albatross_46.jpg"
    CUB_200_2011/images/               the pictures
    CUB_200_2011/train_test_split.txt  "1 0": 1 if picture 1 is of the training split, 0 if not
    CUB_200_2011/bounding_boxes.txt    "1 60.0 27.0 325.0 304.0": x, y, width and height in pixels
    text/001.Black_footed_Albatross/Black_Footed_Albatross_46.txt    ten captions, one a line

The class of a picture is its folder. `classes.txt` and `image_class_labels.txt` say the same again
and are not read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from dalle1.common.files import size_text
from dalle1.data.curation.captions import OUTSIDE, CaptionChoice, captioned, is_inside
from dalle1.data.curation.rows import SHOWN, Row
from dalle1.data.samples import (
    CAPTION_TOO_LARGE,
    EMPTY_CAPTION,
    MAX_TEXT,
    NO_CAPTION,
    NOT_UTF8,
    cleaned,
    split_lines,
)

LARGEST = 2**26  # bytes of a list; the published ones have up to 1 MB
IMAGES, SPLIT, BOXES = "images.txt", "train_test_split.txt", "bounding_boxes.txt"
SPLITS = {"train": "1", "test": "0"}
TOP = ("CUB_200_2011",)  # what the download of the pictures unpacks to
TEXTS = ("text_c10", "text", "cvpr2016_cub/text_c10")  # and those of the captions
NO_LINE, SAME_ID, SAME_FILE = "line without id and path", "duplicate image id", "duplicate path"
NO_SPLIT = "image of no split"


@dataclass(frozen=True)
class Selection:
    """Which pictures are read.

    Attributes:
        split: "train" or "test" of `train_test_split.txt`; None: both.
        classes: a file with the names of classes, one a line, such as `testclasses.txt` of the
            captions' download; None: all.
    """

    split: str | None = None
    classes: Path | None = None

    def __post_init__(self) -> None:
        if self.split is not None and self.split not in SPLITS:
            raise ValueError(f"split: expected {' or '.join(SPLITS)}, got {self.split!r}")


@dataclass
class _Lists:
    """What the lists beside `images.txt` say, by a picture's id."""

    splits: dict[str, str] | None = None  # None: they do not matter
    classes: frozenset[str] | None = None
    boxes: dict[str, str] = field(default_factory=dict)


def read_cub(folder: Path, texts: Path, choice: CaptionChoice, only: Selection) -> Iterator[Row]:
    """The pictures of `images.txt` in its order; no picture is opened.

    Args:
        folder: `CUB_200_2011`, or the folder around it.
        texts: folder of the class folders with captions, or the one around it.
        choice: which of a picture's captions stay.
        only: the pictures that are read.

    Raises:
        ValueError: a folder or a list that is not there, or a class that no picture has.
    """
    folder = _first_with(folder, TOP, {IMAGES}, "source", "CUB_200_2011")
    lines = [line.split(None, 1) for line in _read(folder / IMAGES)]
    named = {_class(pair[1]) for pair in lines if len(pair) == 2 and is_inside(pair[1])}
    named.discard("")
    texts = _first_with(texts, TEXTS, named, "cub", "the captions of Reed et al., class by class")
    lists = _Lists(classes=_classes(only.classes, named))
    if only.split is not None:
        lists.splits = _by_id(_read(folder / SPLIT))
    if (folder / BOXES).is_file():
        lists.boxes = _by_id(_read(folder / BOXES))
    return _rows(folder / "images", texts, lines, lists, choice, only)


def _rows(
    images: Path,
    texts: Path,
    lines: list[list[str]],
    lists: _Lists,
    choice: CaptionChoice,
    only: Selection,
) -> Iterator[Row]:
    seen: set[tuple[str, str]] = set()
    for number, pair in enumerate(lines):
        name = f"line {number + 1}, {' '.join(pair)!r}"[:SHOWN]
        if len(pair) != 2:
            yield Row(number, name, None, None, {}, NO_LINE)
            continue
        identity, path = pair
        if lists.classes is not None and _class(path) not in lists.classes:
            continue
        fault = SAME_ID if ("id", identity) in seen else SAME_FILE if ("path", path) in seen else ""
        seen |= {("id", identity), ("path", path)}
        if not fault and not is_inside(path):
            fault = OUTSIDE
        if not fault and only.split is not None and lists.splits is not None:
            part = lists.splits.get(identity)
            if part in SPLITS.values() and part != SPLITS[only.split]:
                continue
            fault = "" if part in SPLITS.values() else NO_SPLIT
        captions: list[str] = []
        if not fault:
            captions, fault = _captions(texts / PurePosixPath(path).with_suffix(".txt"))
        if fault:
            yield Row(number, name, None, None, {}, fault)
            continue
        columns: dict[str, Any] = {"path": path, "image_id": identity, "class": _class(path)}
        if box := _box(lists.boxes.get(identity, "")):
            columns["bounding_box"] = box
        yield captioned(number, name, images / path, captions, choice, columns)


def _captions(path: Path) -> tuple[list[str], str]:
    """The captions of a file, or what is wrong with it."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT + 1)
        if len(data) > MAX_TEXT:
            return [], CAPTION_TOO_LARGE
        lines = split_lines(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return [], NOT_UTF8
    except (OSError, ValueError):  # ValueError: a path with a NUL
        return [], NO_CAPTION
    captions = [caption for line in lines if (caption := cleaned(line))]
    return captions, "" if captions else EMPTY_CAPTION


def _box(text: str) -> list[float] | None:
    """x, y, width and height; None for what is none. The pictures do not need it."""
    try:
        box = [float(value) for value in text.split()]
    except ValueError:
        return None
    return box if len(box) == 4 and all(map(math.isfinite, box)) else None


def _class(path: str) -> str:
    """The folder of a picture's path, "" where it lies in none."""
    return path.partition("/")[0] if "/" in path else ""


def _classes(path: Path | None, named: set[str]) -> frozenset[str] | None:
    if path is None:
        return None
    wanted = frozenset(name for line in _read(path, "classes") if (name := line.strip()))
    unknown = sorted(wanted - named)
    if unknown or not wanted:
        raise ValueError(
            f"classes: expected names of {IMAGES} such as {min(named, default='')!r}, one a line, "
            f"got {unknown[0][:SHOWN] if unknown else 'none'!r} in {str(path)!r}"
        )
    return wanted


def _by_id(lines: list[str]) -> dict[str, str]:
    """The rest of each line by its first word; of several with one id, the first counts."""
    found: dict[str, str] = {}
    for line in lines:
        identity, _, rest = line.partition(" ")
        found.setdefault(identity, rest.strip())
    return found


def _first_with(
    folder: Path, below: tuple[str, ...], names: set[str], setting: str, what: str
) -> Path:
    """The folder itself, or one below, that holds one of the names."""
    for place in (folder, *(folder / part for part in below)):
        with suppress(OSError):
            if not names.isdisjoint(os.listdir(place)):
                return place
    wanted = f"{min(names)!r} or the like" if names else f"a picture in {IMAGES}"
    raise ValueError(f"{setting}: expected {what}, with {wanted}, got {str(folder)!r}")


def _read(path: Path, setting: str = "source") -> list[str]:
    """The lines of a list without the empty ones."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise ValueError(f"{setting}: {str(path)!r} cannot be read: {error.strerror}") from error
    if len(data) > LARGEST:
        raise ValueError(f"{setting}: expected a list of {size_text(LARGEST)} at most: {path}")
    # As in tables: what is no UTF-8 stays what it is, since a file may be called so.
    text = data.decode("utf-8-sig", "surrogateescape")
    return [line for line in split_lines(text) if line.strip()]

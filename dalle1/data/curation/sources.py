"""What `write_shards` reads: the kinds of sources, of which the arguments name one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from dalle1.common.files import expand_home
from dalle1.data.curation.captions import CaptionChoice
from dalle1.data.curation.coco import read_coco
from dalle1.data.curation.cub import Selection, read_cub
from dalle1.data.curation.rows import Row, read_rows

AnyPath = str | os.PathLike[str]
ZIP, TARS = (".zip",), (".tar", ".tgz", ".tar.gz")


def row_reader(
    source: Path,
    image_column: str,
    caption_column: str,
    seed: int | None,
    coco: AnyPath | None,
    cub: AnyPath | None,
    captions: str | None,
    split: str | None,
    classes: AnyPath | None,
) -> Callable[[], Iterator[Row]]:
    """A function that reads the rows of a source, the same each time it is called.

    Raises ValueError for arguments that do not go together, and for archives, whose files are not
    read in place; the arguments are those of `write_shards`.
    """
    choice = CaptionChoice(captions or "all", seed or 0)
    if coco is not None and cub is not None:
        raise ValueError(f"coco: expected none beside cub, got {str(coco)!r}; give one of them")
    if coco is None and cub is None and captions is not None:
        raise ValueError(
            f"captions: expected none without coco or cub, got {captions!r}; a table and a folder "
            "have one for each image"
        )
    for name, value in (("split", split), ("classes", classes)):
        if cub is None and value is not None:
            raise ValueError(f"{name}: expected none without cub, got {str(value)!r}; take it out")
    published = coco is not None or cub is not None
    for name, value in (("source", source), ("coco", coco), ("cub", cub)):
        # Without coco or cub, a tar is taken for shards, which need no packing.
        if value is not None:
            _refuse_archive(name, Path(expand_home(value)), ZIP + TARS if published else ZIP)
    if coco is not None:
        return partial(read_coco, source, Path(expand_home(coco)), choice)
    if cub is not None:
        only = Selection(split, None if classes is None else Path(expand_home(classes)))
        return partial(read_cub, source, Path(expand_home(cub)), choice, only)
    return partial(read_rows, source, image_column, caption_column)


def _refuse_archive(name: str, path: Path, endings: tuple[str, ...]) -> None:
    if path.name.lower().endswith(endings) and path.is_file():
        raise ValueError(
            f"{name}: expected what the archive holds, got {str(path)!r}; unpack it, and give the "
            "unpacked file or folder"
        )

"""What lies beside good data: twins, notes and copies; names in other letters; linked folders."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

Members = list[tuple[str, bytes]]
Rng = np.random.Generator

TWIN = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(50)  # AppleDouble
NOTES = (
    *(".DS_Store", "._.DS_Store", "Thumbs.db", "THUMBS.DB", "ehthumbs.db", "desktop.ini"),
    *("Desktop.ini", ".directory", ".picasa.ini", ".0001.jpg.Ab12Cd", "a.png:Zone.Identifier"),
)
COPIES = (
    *("__MACOSX", "@eaDir", ".Trashes", ".Trash-1000/files", "$RECYCLE.BIN", ".snapshot/h.0"),
    *(".ipynb_checkpoints", ".AppleDouble", "lost+found", "System Volume Information", ".git"),
)
CAPTION = "of a copy that is no data"
FOLDERS = ("", "deep/er/", "d.o.t/", "Ünï 猫/", "x.jpg/", "_a/__b/")


def other_case(ending: str, rng: Rng) -> str:
    """The letters of an extension, as often as not in another case."""
    how = rng.integers(6)
    if how == 0:
        return "".join(c.upper() if rng.random() < 0.5 else c for c in ending)
    return ending.upper() if how == 1 else ending.capitalize() if how == 2 else ending


def clutter(neighbor: str, image: bytes, rng: Rng) -> Members:
    """Some files as they lie beside one of this name: none of them is data."""
    at = PurePosixPath(neighbor)
    how = rng.integers(4)
    if how == 0:
        return [(str(at.with_name(f"._{at.name}")), TWIN)]
    if how == 1:
        return [(f"__MACOSX/{at.with_name(f'._{at.name}')}", TWIN)]
    if how == 2:
        return [(str(at.with_name(NOTES[int(rng.integers(len(NOTES)))])), b"Bud1" * 9)]
    place = at.parent / COPIES[int(rng.integers(len(COPIES)))]
    copies = {f"{at.stem}.jpg": image, f"{at.stem}.txt": CAPTION.encode()}
    return [(str(place / name), data) for name, data in copies.items()]


def cluttered(members: Members, rng: Rng, share: float = 0.3) -> tuple[Members, int]:
    """The members of a tar or a folder with clutter between them, and how many files it is."""
    found: Members = []
    for name, data in members:
        more = clutter(name, data, rng) if rng.random() < share else []
        found += [*more, (name, data)] if rng.random() < 0.5 else [(name, data), *more]
    return found, len(found) - len(members)


def write_linked(folder: Path, members: Members, rng: Rng) -> None:
    """Files in a new folder `folder`/in, parts of which lie elsewhere and are linked to, some twice
    and some in loops. The files of one name stay together."""
    shutil.rmtree(folder, ignore_errors=True)
    top, elsewhere = folder / "in", folder / "elsewhere"
    homes = [top, top / "own", elsewhere, elsewhere / "deep", folder / "more"]
    for home in homes:
        home.mkdir(parents=True, exist_ok=True)
    placed: dict[str, Path] = {}
    for name, data in members:
        at = PurePosixPath(name)
        part = at.parts[0] if len(at.parts) > 1 else at.stem
        path = placed.setdefault(part, _one(rng, homes)) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    # Everything is reached, by one way or by several.
    (_one(rng, homes[:2]) / "linked").symlink_to(elsewhere)
    (_one(rng, homes[:4]) / "to more").symlink_to(folder / "more")
    for i in range(int(rng.integers(6))):
        link = _one(rng, homes) / f"{'aZ~'[i % 3]}{i}"
        link.symlink_to(
            _one(rng, [*homes, Path("."), Path(".."), Path("nowhere"), Path(link.name)])
        )


def _one(rng: Rng, choices: Sequence[Path]) -> Path:
    return choices[int(rng.integers(len(choices)))]

"""Where one run of a finding works, and what runs make once and share."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle1.common.files import make_folder, write_text

DONE = "done.json"  # in a shared folder that is complete; holds its settings


@dataclass(frozen=True)
class Workspace:
    """Folders of one run (arm, seed).

    folder: the run's own, for training runs and the like; removed once the result is there.
    out: of all findings; `shared` makes folders below it that several runs read.
    pictures: what a run saves here stays, for docs and readers.
    threads: CPU threads of the run; None: as torch chooses.
    photographs: the user's folder, wherever it lies; settings hold a digest of what is in it.
    model: likewise, and the next two: see `Options`.
    """

    folder: Path
    out: Path
    pictures: Path
    threads: int | None = None
    photographs: Path | None = None
    model: Path | None = None
    emoji: Path | None = None
    packages: Path | None = None

    def shared(self, name: str, settings: Any, make: Callable[[Path], None]) -> Path:
        """A folder that depends on its settings alone, made by the first run that needs it.

        Args:
            name: a word, for people.
            settings: JSON of all that the content depends on.
            make: fills the folder. Where it was stopped, it is called again with what it has left.

        Returns:
            The folder, complete.
        """
        folder = self.out / "shared" / f"{file_name(name)}-{fingerprint(settings)}"
        make_folder(folder)
        with _lock(folder.with_name(f"{folder.name}.lock")):
            if not (folder / DONE).exists():
                make(folder)
                write_text(folder / DONE, json.dumps(settings, indent=2) + "\n")
        return folder

    def picture(self, name: str) -> Path:
        """Where an image of this run is written that stays."""
        make_folder(self.pictures)
        return self.pictures / f"{self.folder.name}-{file_name(name)}.png"


def fingerprint(settings: Any) -> str:
    """12 hexadecimal digits that differ where settings do, whatever the order of keys."""
    text = json.dumps(settings, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def file_name(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-") or "unnamed"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the system takes the lock back when the process ends."""
    with path.open("wb") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield

"""The folder of a run: one run writes it at a time, and what a run resumes as.

The first rank holds a lock on `run.lock` for as long as the run lives. It is a POSIX lock: the
system takes it back when the process ends, however it ends, and forks such as data workers do not
inherit it. The file alone means nothing.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dalle1.common.files import FULL, check_writable, make_folder, put_aside
from dalle1.tokenizer import TOKENIZER
from dalle1.training.config import RunConfig
from dalle1.training.dataloader import INDEX
from dalle1.training.distributed import any_rank, rank

CONFIG = "config.yaml"
EXPORTED = "model"  # the folder of the exported model
LOCK = "run.lock"
POLL = 0.1  # seconds between two attempts to lock
# Settings that a run keeps to its end.
KEPT = (
    "stage",
    "seed",
    "batch_size",
    "dvae",
    "vqgan",
    "clip",
    "transformer",
    "seq2seq",
    "train_only",
    "optimizer.kind",
    # What these change is in the checkpoint.
    "vqgan_training.codebook.ema_decay",
    "vqgan_training.discriminator.layers",
    "vqgan_training.discriminator.width",
)
UNSAID = {"optimizer.kind": "adamw"}  # of checkpoints from before the setting was there


class RunFolder:
    """A run's folder, which no other run writes until `release`, or the end of this process.

    All ranks make it together. Several objects of one process share the lock.
    """

    def __init__(self, path: Path, patience: float = 0.0) -> None:
        """patience: seconds to wait for a run that has the folder; for ranks that start again,
        whose predecessors may not be gone yet.

        Raises:
            ValueError: another run has the folder, or it cannot be written.
        """
        self.path = path
        self._lock: _Lock | None = None
        failure: Exception | None = None
        if rank() == 0:
            try:
                check_writable(path, "run")
                self._keep_tokenizer = (path / TOKENIZER).exists()
                # Before the lock is there, which a run leaves that is killed as it starts.
                self._is_a_runs = any((path / name).exists() for name in (LOCK, CONFIG, INDEX))
                self._lock = _lock(path, patience)
            except (OSError, ValueError) as error:  # an OSError of a full disk
                failure = error
        if any_rank(failure is not None):
            raise failure or ValueError(f"run: the first rank cannot have the folder {path}")

    def begin(self, tokenizer: object) -> None:
        """Removes what a start that never came to its first update has left; all ranks call it.

        Args:
            tokenizer: the setting; a file in this folder that it names stays.

        Raises:
            ValueError: the folder holds a model of something else, which this run would replace.
        """
        failure: ValueError | None = None
        if rank() == 0:
            model, kept = self.path / EXPORTED, self.path / TOKENIZER
            named = isinstance(tokenizer, str) and Path(tokenizer).exists()
            used = named and any(
                p.samefile(str(tokenizer)) for p in (self.path, kept) if p.exists()
            )
            if model.exists() and not self._is_a_runs:
                failure = ValueError(
                    f"run: expected a new folder or that of a run, got {str(self.path)!r}, which "
                    f"holds a {EXPORTED}/ of something else; give another folder (run=...)"
                )
            elif kept.exists() and not used:
                if self._is_a_runs:
                    kept.unlink()
                else:
                    aside = put_aside(kept)
                    print(
                        f"warning: {kept} was of no run, and is {aside.name} now", file=sys.stderr
                    )
                self._keep_tokenizer = False
        if any_rank(failure is not None):
            raise failure or ValueError(f"run: the first rank cannot begin in {self.path}")

    def started(self) -> None:
        """What is there now stays, however the run ends."""
        self._keep_tokenizer = True

    def release(self) -> None:
        """Lets other runs have the folder, without what a start has left that failed."""
        lock, self._lock = self._lock, None
        if lock is not None:
            if not self._keep_tokenizer:
                (self.path / TOKENIZER).unlink(missing_ok=True)
            lock.release()


@dataclass
class _Lock:
    """The lock of a folder, shared by all in this process who ask for it."""

    path: Path
    file: TextIO | None  # none where the file system knows no locks
    inode: tuple[int, int]
    made: list[Path]  # folders that were missing, the innermost first
    process: int = field(default_factory=os.getpid)
    holders: int = 1

    def release(self) -> None:
        self.holders -= 1
        if self.holders or self.process != os.getpid():
            return
        del _locks[self.inode]
        if _inode(self.path) == self.inode:
            self.path.unlink(missing_ok=True)  # while it is locked: see `_lock`
        if self.file is not None:
            self.file.close()
        for folder in self.made:
            with suppress(OSError):  # the run has written there
                folder.rmdir()


# By inode: the system refuses no second lock to the same process, and takes all of its locks on a
# file when it closes the file once.
_locks: dict[tuple[int, int], _Lock] = {}


def _lock(folder: Path, patience: float) -> _Lock:
    """Locks a folder that can be written; ValueError where another process has it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    path, deadline = folder / LOCK, time.monotonic() + patience
    while True:
        held = _locks.get(_inode(path))
        if held is not None and held.process == os.getpid():
            held.holders += 1
            return held
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:  # somebody's folder, or the file of another user
            if error.errno in FULL:
                raise
            raise ValueError(
                f"run: expected a folder that no other run writes, got {str(folder)!r}, whose "
                f"{LOCK} cannot be opened ({error.strerror}); remove it where no run writes there, "
                "or give another folder (run=...)"
            ) from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # EAGAIN or EACCES, by the system
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"run: expected a folder that no other run writes, got {str(folder)!r}, which "
                    f"{holder} writes; wait for its end, or give another folder (run=...)"
                ) from error
            time.sleep(POLL)
            continue
        except OSError as error:  # a network file system without locks
            file.close()
            print(
                f"warning: run: {folder} cannot be locked ({error.strerror}); make sure that no "
                "other process trains in it",
                file=sys.stderr,
            )
            lock = _Lock(path, None, _inode(path), made)
        else:
            found = os.fstat(file.fileno())
            if _inode(path) != (found.st_dev, found.st_ino):
                file.close()  # its holder has removed it meanwhile
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            lock = _Lock(path, file, _inode(path), made)
        _locks[lock.inode] = lock
        return lock


def _inode(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino


def check_resumes(
    path: Path, state: Mapping[str, Any], config: RunConfig, parts: Mapping[str, str]
) -> None:
    """Raises ValueError where a run would resume as another one than it began.

    Args:
        path: of the checkpoint, for the message.
        state: of the checkpoint.
        config: of the run.
        parts: the stage's `fingerprints`.
    """
    saved, mine = state["config"], config.model_dump(mode="json", exclude_none=True)
    for key in KEPT:
        before, now = _setting(saved, key), _setting(mine, key)
        before = UNSAID.get(key) if before is None else before
        if before != now:
            raise ValueError(
                f"{key}: {path} was trained with {before!r}, the config says {now!r}; a run "
                "resumes with the settings it began with"
            )
    former = state.get("parts", {})  # earlier releases did not keep them
    for name in sorted(former.keys() & parts.keys()):
        if former[name] != parts[name]:
            setting = _setting(mine, name)
            given = setting if isinstance(setting, str) else config.run
            raise ValueError(
                f"{name}: expected what the run began with (fingerprint {former[name]} in {path}), "
                f"got another one in {given} ({parts[name]}); put the former back, or begin a new "
                "run (run=...)"
            )


def _setting(settings: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted name; None where it, or a section around it, is not there."""
    value: Any = settings
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value

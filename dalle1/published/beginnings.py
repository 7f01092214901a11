"""The first bytes of a file of weights, which tell whose it is before the file is read."""

from __future__ import annotations

import zipfile
from pathlib import Path

from dvae.pickles import programs

BEGINNING = 2**20  # bytes; the names of the weights stand in front of their numbers


def beginning(path: Path) -> bytes:
    """The first bytes of a file, or of the pickle in a file of torch.save or TorchScript.

    Empty where there is none. Nothing that is wrong with a file is an error here: it is asked of
    whatever a user names, by one family after the other, and the one that reads the file says what
    is wrong with it.
    """
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                return file.read(BEGINNING)
        with zipfile.ZipFile(path) as archive:
            found = [archive.getinfo(name) for name in programs(archive)]
            # As torch writes it, so that no decompressor runs, and none of their errors comes.
            if not found or found[0].compress_type != zipfile.ZIP_STORED:
                return b""
            with archive.open(found[0]) as member:
                return member.read(BEGINNING)
    # The directory of a damaged zip: RuntimeError where a member is encrypted or of a newer
    # version, ValueError where a name is no text, EOFError where a member is cut short.
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile):
        return b""

"""The first bytes of weights, of files of every sort, and of those that are damaged."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dalle1.published import beginnings
from dalle1.published.beginnings import beginning

NAME = "decoder.conv_in.weight"


def test_names_are_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names behind gigabytes of numbers, or a file that is read to its end."""
    held = {NAME: torch.arange(1000.0)}
    torch.save(held, tmp_path / "new.pt")
    torch.save(held, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(held, tmp_path / "x.safetensors")
    monkeypatch.setattr(beginnings, "BEGINNING", 400)
    for path in tmp_path.iterdir():
        start = beginning(path)
        assert NAME.encode() in start and len(start) <= 400, path
    assert beginning(tmp_path) == beginning(tmp_path / "none") == b""


def zip_of(path: Path, compression: int = zipfile.ZIP_STORED, name: str = "a/data.pkl") -> bytes:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, NAME)
    return path.read_bytes()


@pytest.mark.parametrize("harm", ["compressed", "other", "cut", "encrypted", "version", "name"])
def test_damaged_files_are_nobodys(tmp_path: Path, harm: str) -> None:
    """A traceback of the zip's reader, where a family only asks whose a file is."""
    path = tmp_path / "x.pt"
    data = zip_of(
        path,
        zipfile.ZIP_DEFLATED if harm == "compressed" else zipfile.ZIP_STORED,
        "a/b/data.pkl" if harm == "other" else "a/data.pkl",
    )
    assert zipfile.is_zipfile(path)
    directory = data.rindex(b"PK\x01\x02")
    if harm == "cut":  # in the middle: the directory then lies elsewhere than it says
        data = data[:10] + data[40:]
    at = {"encrypted": (8, b"\x01"), "version": (6, b"\xff"), "name": (46, b"\xff")}.get(harm)
    if at is not None:
        place = directory + at[0]
        data = data[:place] + at[1] + data[place + 1 :]
    if harm == "name":  # in UTF-8, as a flag says
        data = data[: directory + 9] + b"\x08" + data[directory + 10 :]
    path.write_bytes(data)
    assert beginning(path) == b""


def test_a_good_zip_is_read(tmp_path: Path) -> None:
    """A test of damage that any zip would pass."""
    zip_of(tmp_path / "x.pt")
    assert beginning(tmp_path / "x.pt") == NAME.encode()

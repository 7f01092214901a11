"""Packages by npm, a fake of which lies in PATH, and tarballs that are not what they should be."""

from __future__ import annotations

import gzip
import sys
import tarfile
from pathlib import Path

import pytest

from dalle1.data.emoji import STYLES, npm
from dalle1.data.emoji.npm import fetch_packages, unpack
from dalle1.data.emoji.packages import NAMES, PACKAGES, find_packages
from dalle1.data.emoji.sources import read_emoji

from .packages import entry, write_packages, write_tarball, write_tarballs

ALL = list(PACKAGES.values())
WANTED = [PACKAGES["noto"]]


@pytest.fixture
def tarballs(tmp_path: Path) -> Path:
    packages, names = write_packages(tmp_path / "made")
    write_tarballs(tmp_path / "tarballs", packages, names)
    return tmp_path / "tarballs"


def fake_npm(monkeypatch: pytest.MonkeyPatch, folder: Path, does: str) -> Path:
    """An npm that notes what it is asked for and then does something; the file of its notes."""
    folder.mkdir()
    script = folder / "npm"
    script.write_text(
        f"#!{sys.executable}\nimport pathlib, shutil, sys\n"
        f"open({str(folder / 'asked')!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))\n{does}\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder / "asked"


def packing(tarballs: Path) -> str:
    return (
        "stem = sys.argv[2].removeprefix('@').replace('/', '-').replace('@', '-')\n"
        f"shutil.copy({str(tarballs)!r} + '/' + stem + '.tgz', '.')"
    )


def test_npm_is_asked_for_pinned_versions(
    tarballs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest version, with other pictures; scripts that run; tarballs and rubbish that stay."""
    asked = fake_npm(monkeypatch, tmp_path / "bin", packing(tarballs))
    lines: list[str] = []
    fetch_packages(ALL, tmp_path / "out", lines.append)
    wanted = [f"pack {p.name}@{p.version} --ignore-scripts --loglevel=error" for p in ALL]
    assert asked.read_text().splitlines() == wanted
    assert lines == [f"asking npm for {p.name}@{p.version}" for p in ALL]
    found = find_packages([*STYLES, NAMES], tmp_path / "out")
    assert [f.version for f in found.values()] == [p.version for p in ALL]
    assert read_emoji({s: found[s].folder for s in STYLES}, found[NAMES].folder)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.tarball[:-4] for p in ALL}
    assert not list((tmp_path / "out").rglob("*.js"))  # only what is used


def test_tarballs_that_lie_there_need_no_npm(
    tarballs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without a network that is asked for what a user carried there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    fetch_packages(ALL, tarballs)
    assert all((tarballs / p.tarball).is_file() for p in ALL)  # the user's stay
    assert len(find_packages([*STYLES, NAMES], tarballs)) == len(ALL)
    with pytest.raises(ValueError, match=r"--download: expected npm to be installed, got none; "):
        fetch_packages(WANTED, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("sys.stderr.write('npm error 404 Not Found\\nnpm error more'); sys.exit(7)", "404 Not"),
        ("sys.exit(3)", "status 3: it wrote 0 tarballs"),
        ("", "wrote 0 tarballs"),
        ("pathlib.Path('a.tgz').write_bytes(b''); pathlib.Path('b.tgz').touch()", "2 tarballs"),
        ("pathlib.Path('a.tgz').write_text('<html>proxy</html>')", "not unpacked: "),
    ],
)
def test_npm_that_fails_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, said: str
) -> None:
    """A traceback of subprocess, or half a package that the next try takes for a whole one."""
    fake_npm(monkeypatch, tmp_path / "bin", does)
    with pytest.raises(ValueError, match=said):
        fetch_packages(WANTED, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


PICTURE = "package/img/google/64/1f34e.png"
LINKS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)


@pytest.mark.parametrize(
    "member",
    [
        entry("package/../../escaped.png"),
        entry("/escaped.png"),
        entry("package/img/google/64/..\\escaped.png"),
        entry("C:escaped.png"),
        entry(".."),
        *(entry(PICTURE, kind=kind, link="../../../../escaped.png") for kind in LINKS),
        entry("elsewhere/link", kind=tarfile.SYMTYPE, link="/etc"),
    ],
    ids=lambda m: f"{m.name} {m.type!r}",
)
def test_what_leads_out_of_a_package_is_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    """A file of the user's that a package writes over, where it is not even used."""
    tarball = write_tarball(tmp_path / "a.tgz", [(member, b"")])
    with pytest.raises(ValueError, match=r"a\.tgz: not unpacked: .*; delete it and try again"):
        unpack(tarball, tmp_path / "below" / "out", WANTED[0].parts)
    assert not list(tmp_path.rglob("escaped.png")) and not list(tmp_path.rglob("1f34e.png"))


def test_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small tarball that fills the disk or the memory."""
    monkeypatch.setattr(npm, "MAX_FILES", 4)
    monkeypatch.setattr(npm, "MAX_FILE", 1000)
    monkeypatch.setattr(npm, "MAX_KEPT", 1500)
    monkeypatch.setattr(npm, "MAX_UNPACKED", 100_000)
    many = [(entry(f"package/{i}"), b"") for i in range(5)]
    large = [(entry(PICTURE, 1001), bytes(1001))]
    sum_ = [(entry(PICTURE.replace("1f", f"{i}f"), 800), bytes(800)) for i in range(2)]
    bomb = [(entry("package/unused", 10**6), bytes(10**6))]
    twice = [(entry(PICTURE), b""), (entry(PICTURE), b"")]
    nested = [(entry("package/img/google/64"), b""), (entry(PICTURE), b"")]
    for i, (members, said) in enumerate(
        (
            (many, "expected at most 4 files"),
            (large, r"files of at most 1\.0 kB"),
            (sum_, r"1\.5 kB of all, got more at 'package/img"),
            (bomb, "expected at most .* unpacked, got more"),
            (twice, "holds a name twice"),
            (nested, "holds a name twice"),
            ([(entry("package/index.js"), b"")], "it has no img/google/64"),
        )
    ):
        tarball = write_tarball(tmp_path / f"{i}.tgz", members)
        with pytest.raises(ValueError, match=said):
            unpack(tarball, tmp_path / f"out{i}", WANTED[0].parts)


def test_damaged_tarballs_are_refused(tarballs: Path, tmp_path: Path) -> None:
    """Half of the pictures, taken for all."""
    whole = (tarballs / WANTED[0].tarball).read_bytes()
    for i, data in enumerate((b"", whole[:-1], whole[: len(whole) // 2], gzip.compress(b"x"))):
        path = tmp_path / f"{i}.tgz"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{i}\.tgz: not unpacked: "):
            unpack(path, tmp_path / f"out{i}", WANTED[0].parts)
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # of the checksum
    (tmp_path / "f.tgz").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"not unpacked: .*incorrect data check"):
        unpack(tmp_path / "f.tgz", tmp_path / "outf", WANTED[0].parts)

"""Files, folders, archives and the Hub's cache, and what must not be read."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from dalle1.hub.cache import hub_cache
from dalle1.hub.errors import HubUnreachableError
from dalle1.hub.names import HubName
from dalle1.published import sources
from dalle1.published.sources import opened

CONTENT = {"1.3B/config.yaml": b"a: 1\n", "1.3B/tokenizer/vocab.json": b"{}"}


def names_in(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def tar_of(path: Path, *entries: tarfile.TarInfo, mode: str = "w:gz") -> Path:
    """A tar of the content and of some entries more."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in CONTENT.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        for entry in entries:
            tar.addfile(entry, io.BytesIO(bytes(entry.size)))
    return path


def entry(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, to: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.size, made.linkname = kind, size, to
    return made


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tar.xz", "x.zip", "renamed"])
def test_archives_are_unpacked_and_removed(tmp_path: Path, name: str) -> None:
    """An archive that is taken for weights, a file left out, gigabytes that stay on the disk."""
    path = tmp_path / "in" / name
    path.parent.mkdir()
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in CONTENT.items():
                archive.writestr(member, data)
    else:
        mode = {"x.tar": "w", "x.tar.xz": "w:xz"}.get(name, "w:gz")
        tar_of(path, entry("1.3B/empty", tarfile.DIRTYPE), mode=mode)
    work = tmp_path / "work"
    work.mkdir()
    with opened(path, work) as folder:
        assert folder.name == "1.3B" and work in folder.parents
        held = names_in(folder)
        assert held == {key.removeprefix("1.3B/"): data for key, data in CONTENT.items()}
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (entry("../outside"), "'../outside' leads out of the archive"),
        (entry("a/../../outside"), "leads out of the archive"),
        (entry("/tmp/outside"), "leads out of the archive"),
        (entry("C:\\outside"), "leads out of the archive"),
        (entry("a\\..\\..\\outside"), "leads out of the archive"),
        (entry("1.3B/link", tarfile.SYMTYPE, to="/etc"), "got '1.3B/link', a link"),
        (entry("1.3B/link", tarfile.LNKTYPE, to="1.3B/config.yaml"), "'1.3B/link', a link"),
        (entry("1.3B/pipe", tarfile.FIFOTYPE), "expected files and folders, got '1.3B/pipe'"),
        (entry("1.3B/null", tarfile.CHRTYPE), "expected files and folders"),
        (entry("1.3B/config.yaml"), "a member is there twice"),
        (entry("1.3B/config.yaml/below"), "a member is there twice"),
    ],
)
def test_archives_that_are_not_safe(tmp_path: Path, bad: tarfile.TarInfo, message: str) -> None:
    """A file written outside of the folder, a link that is followed, a device that is made."""
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    path = tar_of(tmp_path / "x.tar.gz", bad)
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message), opened(path, work):
        pass
    assert sorted(p for p in tmp_path.rglob("*")) == before
    assert not Path("/tmp/outside").exists()


def test_links_in_a_zip(tmp_path: Path) -> None:
    """A link that a zip hides in its attributes of Unix."""
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match="got 'link', a link"), opened(tmp_path / "x.zip"):
        pass


def test_archives_that_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes that fill the disk; one of a million members."""
    monkeypatch.setattr(sources, "SPARE", 1000)
    path = tar_of(tmp_path / "x.tar.gz", entry("1.3B/zeros", size=10**6))
    with (
        pytest.raises(ValueError, match=r"more than 20 times its size at '1\.3B/zeros'"),
        opened(path),
    ):
        pass
    monkeypatch.setattr(sources, "MAX_MEMBERS", 5)
    path = tar_of(tmp_path / "y.tar.gz", *(entry(f"1.3B/{i}") for i in range(10)))
    with pytest.raises(ValueError, match="at most 5 members, got more"), opened(path):
        pass


def test_archives_larger_than_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, found after most of it was written."""
    path = tar_of(tmp_path / "x.tar.gz", entry("1.3B/weights", size=10**5))
    usage = type("Usage", (), {"free": 99_999})
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda path: usage)
    message = r"'1\.3B/weights' needs 100,000 .*99,999 are free"
    with pytest.raises(ValueError, match=message), opened(path):
        pass


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_archives_cut_short(tmp_path: Path, share: float) -> None:
    """A download that ended early, read without a word or with a traceback."""
    data = os.urandom(100_000)
    whole = tmp_path / "whole.tar.gz"
    with tarfile.open(whole, "w:gz") as tar:
        made = tarfile.TarInfo("1.3B/weights")
        made.size = len(data)
        tar.addfile(made, io.BytesIO(data))
    path = tmp_path / "x.tar.gz"
    path.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    with (
        pytest.raises(ValueError, match=r"x\.tar\.gz.*(truncated|expected 100,000 bytes)"),
        opened(path),
    ):
        pass


@pytest.mark.parametrize(
    ("at", "byte", "message"),
    [
        (8, 0x01, "is encrypted"),
        (10, 0x63, "compression method is not supported"),
        (6, 0xFF, "zip file version"),
        (0, 0x00, "no readable archive"),
    ],
)
def test_zips_that_cannot_be_read(tmp_path: Path, at: int, byte: int, message: str) -> None:
    """A traceback of the zip's reader, in place of what is wrong with which file."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.3B/config.yaml", "a: 1")
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + at] = byte
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"x\.zip: truncated, or .*{message}"), opened(path):
        pass
    path.write_bytes(data[:10] + data[40:])  # its directory lies elsewhere than it says
    with pytest.raises(ValueError, match=r"x\.zip: truncated, or no readable"), opened(path):
        pass


@pytest.mark.parametrize(("mode", "message"), [("w:gz", "CRC check failed"), ("w:xz", "Corrupt")])
def test_a_checksum_behind_the_members(tmp_path: Path, mode: str, message: str) -> None:
    """A changed weight in a tar.gz, whose checksum nobody comes to because the tar ends before."""
    path = tmp_path / "x.tar"
    data = os.urandom(100_000)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        made = tarfile.TarInfo("1.3B/weights")
        made.size = len(data)
        tar.addfile(made, io.BytesIO(data))
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 0xFF  # random bytes are stored as they are
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=f"no readable archive: {message}"), opened(path):
        pass


def test_what_follows_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of unpacking what stands behind the last member, and is nothing."""
    monkeypatch.setattr(sources, "SPARE", 0)
    path = tmp_path / "x.tar.gz"
    content = gzip.decompress(tar_of(path).read_bytes())
    path.write_bytes(gzip.compress(content + bytes(2**24)))
    with pytest.raises(ValueError, match=r"x\.tar\.gz.*what follows its members"), opened(path):
        pass


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("first", [True, False])
def test_headers_that_claim_all_memory(tmp_path: Path, kind: bytes, first: bool) -> None:
    """A long name of gigabytes, which a compressed tar holds in a few kilobytes."""
    path = tmp_path / "x.tar.gz"
    claimed = entry("long", kind, 2**24)
    if first:
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(claimed, io.BytesIO(bytes(claimed.size)))
    else:
        tar_of(path, claimed)
    tracemalloc.start()
    if first:  # the kind of file is told by its first member
        with opened(path) as found:
            assert found == path
    else:
        with pytest.raises(ValueError, match="a header of 16,777,216 bytes"), opened(path):
            pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**23


def test_names_in_a_zip_that_are_no_text(tmp_path: Path) -> None:
    """An error that does not name the file."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ü", "a: 1")
    path.write_bytes(path.read_bytes().replace("ü".encode(), b"\xff\xff"))
    with (
        pytest.raises(ValueError, match=r"x\.zip: truncated, or no readable archive"),
        opened(path),
    ):
        pass


def test_weights_are_no_archives(tmp_path: Path) -> None:
    """A file of torch.save, which is a zip, unpacked into its members."""
    for name, modern in (("new.pt", True), ("old.pth.tar", False)):
        torch.save({"w": torch.ones(3)}, tmp_path / name, _use_new_zipfile_serialization=modern)
        with opened(tmp_path / name) as path:
            assert path == tmp_path / name


def cache(root: Path) -> Path:
    """A cache of the Hub: two revisions of a repository whose files are links to blobs."""
    folder = root / "models--someone--model"
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("bbb")
    for commit in ("aaa", "bbb"):
        (folder / "blobs" / f"{commit}1").write_text(commit)
        (folder / "snapshots" / commit / "deep").mkdir(parents=True)
        for name, up in (("config.json", "../.."), ("deep/x.bin", "../../..")):
            (folder / "snapshots" / commit / name).symlink_to(f"{up}/blobs/{commit}1")
    return folder


@pytest.mark.parametrize(
    ("source", "commit"),
    [
        ("hub:someone/model", "bbb"),
        ("hub:someone/model@aaa", "aaa"),
        ("hub:someone/model@main", "bbb"),
        ("CACHE/models--someone--model", "bbb"),
        ("CACHE/models--someone--model/snapshots/aaa", "aaa"),
    ],
)
def test_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, commit: str
) -> None:
    """Another revision than the one that is named, or links that are not followed."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    cache(tmp_path)
    with opened(source.replace("CACHE", str(tmp_path))) as folder:
        assert names_in(folder) == {n: commit.encode() for n in ("config.json", "deep/x.bin")}
    if source.startswith("hub:"):
        with opened(f"{source}/deep/x.bin") as file:
            assert file.read_text() == commit and file.name == "x.bin"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another folder than the one that the Hub's own package uses."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/x")
    assert hub_cache() == Path("/home/x/.cache/huggingface/hub")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert hub_cache() == Path("/cache/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/hf")
    assert hub_cache() == Path("/hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/hub")
    assert hub_cache() == Path("/hub")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:someone/other", "hub:someone/other is not in the cache .*fetch it with --download"),
        ("hub:someone/model@ccc", "expected the revision ccc, got aaa, bbb; say which"),
        ("hub:someone/model/none.bin", "is not in the cache: no .*none.bin"),
        ("hub:someone/model/../../x", r"expected hub:OWNER/NAME\[@REVISION\]\[/FILE\]"),
        ("hub:model", "expected hub:OWNER/NAME"),
        ("nowhere", "SOURCE: expected a file or folder, got 'nowhere'"),
    ],
)
def test_what_is_not_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    """A network that is used unasked, or an error that does not say what to do."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    cache(tmp_path)
    with pytest.raises(ValueError, match=message), opened(source):
        pass


def test_links_that_leave_the_cache(tmp_path: Path) -> None:
    """A repository that makes the reader open any file of the machine; a blob that is missing."""
    (tmp_path / "secret").write_text("x")
    folder = cache(tmp_path)
    link = folder / "snapshots" / "bbb" / "deep" / "out"
    link.symlink_to(tmp_path / "secret")
    for source in (folder, folder / "snapshots" / "bbb", link):
        with pytest.raises(ValueError, match="deep/out: expected a link within"), opened(source):
            pass
    link.unlink()
    (folder / "blobs" / "bbb1").unlink()
    with pytest.raises(ValueError, match="bbb1, which is missing; fetch it again"), opened(folder):
        pass


def test_fetching_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another repository, revision or file that is fetched; a cache that is passed over where the
    network fails."""
    asked = []

    def fetch(name: HubName) -> Path:
        asked.append((name.repository, name.revision, name.file))
        return tmp_path

    for source in ("hub:a/b", "hub:a/b@c/d/e.bin", "hub:a/b@refs/pr/1/e.bin", "hub:a/b@refs/pr/1"):
        with opened(source, fetch=fetch) as path:
            assert path == tmp_path
    assert asked == [
        ("a/b", None, None),
        ("a/b", "c", "d/e.bin"),
        ("a/b", "refs/pr/1", "e.bin"),
        ("a/b", "refs/pr/1", None),
    ]

    def fail(name: HubName) -> Path:
        raise HubUnreachableError("no network")

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    cache(tmp_path)
    with pytest.raises(ConnectionError, match="no network"), opened("hub:a/b", fetch=fail):
        pass
    with (
        pytest.warns(UserWarning, match="no network; the copy in the cache is used"),
        opened("hub:someone/model", fetch=fail) as path,
    ):
        assert path.name == "bbb"

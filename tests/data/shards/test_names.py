"""Names: what is data, and what is found in a folder."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from dalle1.data.shards.names import caption_beside, is_data, read_folder, shards_in, walk


@pytest.mark.parametrize(
    "name",
    [
        *("._0001.jpg", "a/._0001.jpg", "./._0001.txt", "._a", "__MACOSX/0001.jpg", "__macosx/a"),
        *("__MACOSX/train/._0001.jpg", "x/__MACOSX/y/0001.txt", ".DS_Store", "a/b/.DS_Store"),
        *("Thumbs.db", "a/thumbs.db", "THUMBS.DB", "ehthumbs.db", "Thumbs.db:encryptable"),
        *("desktop.ini", "a/Desktop.ini", "DESKTOP.INI", "Icon\r", ".directory", ".nomedia"),
        *("@eaDir/0001.jpg/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/0001.jpg", ".Trashes/501/1.jpg"),
        *("System Volume Information/x.txt", ".Trash-1000/files/0001.jpg", "__MACOSX", "__MACOSX/"),
        *(".AppleDouble/0001.jpg", ".ipynb_checkpoints/0001-checkpoint.jpg", ".git/x.txt", ".x/"),
        *("0001.jpg:Zone.Identifier", ".picasa.ini", ".0001.jpg.Ab12", "lost+found/1.jpg"),
        *("RECYCLER/S-1-5/Dc1.jpg", "Network Trash Folder/1.jpg", "a/.@__thumb/0001.jpg"),
        *(".picasaoriginals/0001.jpg", "a/.thumbs/0001.jpg", "~snapshot/daily/0001.jpg"),
        *("PaxHeaders.123/0001.jpg", "a/PaxHeader/0001.jpg", "././@LongLink", ".sync/a/0001.jpg"),
        *("~$0001.txt", "#0001.txt#", "AUTORUN.INF", "Picasa.ini", "ZbThumbnail.info"),
    ],
)
def test_what_is_no_data(name: str) -> None:
    """What macOS, Windows, file servers and tools leave behind, in any case, taken for a sample."""
    assert not is_data(name)


@pytest.mark.parametrize(
    "name",
    [
        *("0001.jpg", "a/0001.txt", "./0001.jpg", "../a/0001.jpg", "_0001.jpg", "__0001.jpg", "."),
        *("thumbs.jpg", "a.Thumbs.db.jpg", "desktop.ini.txt", "MACOSX/1.jpg", "__MACOSX_/1.jpg"),
        *("d.o.t/e.png", "a._b.jpg", "~a.jpg", "Thumbs.db2", "home/me/.cache/set/0001.jpg", "a/"),
        *("__a__.txt", "Kätzchen 猫.png", "x.jpg/y.jpg", "trash-1/1.jpg", "icon.png", ""),
        *("#1.jpg", "#1/2#.jpg", "~/$1.jpg", "PaxHeaders_/1.jpg", "recycled/1.jpg", "CVS/1.jpg"),
    ],
)
def test_what_is_data(name: str) -> None:
    """A healthy sample lost because its name, or the place where a tar was made, looks alike."""
    assert is_data(name)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in walk(folder)[0]]


def test_a_plain_folder_keeps_its_order(tmp_path: Path) -> None:
    """Checkpoints of folders that resume with other samples, as they are now sorted otherwise."""
    rng = random.Random(0)
    for _ in range(200):
        parts = ["".join(rng.choices("aB-_ .é0", k=rng.randint(1, 3))) for _ in range(3)]
        path = tmp_path.joinpath(*(f"x{part}x" for part in parts[: rng.randint(1, 3)]))
        touch(path.with_name(path.name + rng.choice([".png", ".txt", ".JPG"])))
    found, skipped = walk(tmp_path)
    assert found == sorted(p for p in tmp_path.rglob("*") if p.is_file()) and not skipped
    assert len(found) > 150


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    """Linked folders read as if empty, or twice: under two links, or beside what they lead to."""
    top, other = tmp_path / "top", tmp_path / "other"
    touch(top / "own" / "1.png", other / "2.png", other / "deep" / "3.png", tmp_path / "4.png")
    (top / "b").symlink_to(other)
    (top / "c").symlink_to(other)
    (top / "a own").symlink_to(top / "own")  # before it by name, and yet its path stays
    (top / "file.png").symlink_to(tmp_path / "4.png")
    (top / "own" / "relative").symlink_to("../../other/deep")
    assert names(top) == ["b/2.png", "b/deep/3.png", "file.png", "own/1.png"]
    assert names(top / "b") == ["2.png", "deep/3.png"]  # the folder itself may be a link


def test_links_behind_links(tmp_path: Path) -> None:
    """Only the first of a chain of links that is followed; an order that the disk decides."""
    top = tmp_path / "top"
    for letter, later in zip("abcdef", "bcdefa", strict=True):
        touch(tmp_path / letter / f"{letter}.png")
        (tmp_path / letter / "next").symlink_to(tmp_path / later)
    touch(top / "0.png")
    (top / "first").symlink_to(tmp_path / "c")
    found = names(top)
    assert sorted(Path(name).stem for name in found) == sorted("0abcdef")
    assert found[1] == "first/c.png" and found[-1].count("next") == 5


@pytest.mark.parametrize(
    "target", [".", "..", "../..", "/", "../loop", "../own", "/proc/self/cwd/"]
)
def test_loops_end(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to a folder around it, or to itself, that is followed for ever, or that takes in the
    neighbors of the folder and the whole disk."""
    top = tmp_path / "top"
    touch(top / "own" / "1.png", tmp_path / "neighbor.png")
    monkeypatch.chdir(top)
    (top / "own" / "loop").symlink_to(target)
    (top / "loop").symlink_to("own/loop")
    (top / "circle").symlink_to("circle")
    images = [name for name in names(top) if name.endswith(".png")]
    assert images == ["own/1.png"]


def test_files_that_are_none(tmp_path: Path) -> None:
    """A reader that waits for ever on a pipe in the folder, or opens a folder called x.png."""
    touch(tmp_path / "x.png" / "1.txt", tmp_path / "y.png")
    os.mkfifo(tmp_path / "z.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    assert names(tmp_path) == ["gone.png", "x.png/1.txt", "y.png"]


def test_skipped_files_are_counted(tmp_path: Path) -> None:
    """Files that are left out and nobody hears of it; a link in a bin that is followed."""
    touch(
        *(tmp_path / name for name in ("1.png", "._1.png", "Thumbs.db", "a/.DS_Store", "a/b.txt"))
    )
    touch(tmp_path / "__MACOSX" / "a" / "._b.txt", tmp_path / "__MACOSX" / "._1.png")
    (tmp_path / ".Trashes").symlink_to(tmp_path / "a")
    found, skipped = walk(tmp_path)
    assert [path.name for path in found] == ["1.png", "b.txt"] and skipped == 6


def test_captions_in_either_case(tmp_path: Path) -> None:
    """The .TXT of a camera's .JPG not seen; two captions of one name, of which each time another
    one is taken; a reader of one image that takes another one than the list."""
    given = {
        "IMG_1.JPG": ["IMG_1.TXT"],
        "img_2.jpg": ["img_2.TXT"],
        "IMG_3.PNG": ["IMG_3.txt"],
        "4.WebP": ["4.Txt"],
        "5.jpeg": ["5.TXT", "5.txt"],
        "6.Jpg": ["6.Txt", "6.TXT", "6.tXT"],
        "v1.2.JPG": ["v1.2.TXT"],
    }
    for image, captions in given.items():
        touch(tmp_path / image, *(tmp_path / caption for caption in captions))
    wanted = {
        "5.jpeg": "5.txt",
        "6.Jpg": "6.TXT",
    }
    touch(tmp_path / "img_1.txt", tmp_path / "7.png", tmp_path / "8.TXT")
    found = read_folder(tmp_path)
    assert {i.name: c.name if c else None for i, c in found.images.items()} == {
        **{image: wanted.get(image, captions[0]) for image, captions in given.items()},
        "7.png": None,
    }
    assert [path.name for path in found.lonely] == ["8.TXT", "img_1.txt"]
    assert all(
        caption_beside(image) == caption for image, caption in found.images.items() if caption
    )
    assert caption_beside(tmp_path / "7.png") == tmp_path / "7.txt"


def test_shards_in_either_case(tmp_path: Path) -> None:
    """Shards of a file system that shouts, which are not seen; twins of shards that are."""
    touch(*(tmp_path / f"{letter}.{end}" for letter in "ab" for end in ("tar", "TAR", "Tar.gz")))
    touch(tmp_path / "._a.tar", tmp_path / "deep" / "c.tar")
    assert [Path(p).name for p in shards_in(tmp_path, ".tar")] == [
        "a.TAR",
        "a.tar",
        "b.TAR",
        "b.tar",
    ]
    assert shards_in(tmp_path / "nowhere", ".tar") == []


def test_folders_that_are_called_like_shards(tmp_path: Path) -> None:
    """An unpacked tar beside the others that is opened as one, which ends the whole run."""
    touch(tmp_path / "0.tar" / "1.png", tmp_path / "1.tar", tmp_path / "there.tar")
    (tmp_path / "2.tar").symlink_to(tmp_path / "0.tar")
    (tmp_path / "3.tar").symlink_to("there.tar")
    found = [Path(path).name for path in shards_in(tmp_path, ".tar")]
    assert found == ["1.tar", "3.tar", "there.tar"]

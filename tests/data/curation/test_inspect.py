"""Inspection: what is counted, what is found wrong, and what the sheet shows."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalle1.commands.data import inspect as inspect_data
from dalle1.common.files import add_file
from dalle1.data import shapes
from dalle1.data.curation.inspect import InspectReport, describe, draw_contact_sheet, inspect
from dalle1.data.curation.write_shards import write_shards
from dalle1.data.shards.index import raw_samples
from dalle1.data.shards.loader import Batches
from dalle1.data.transforms import augment_dvae
from tests.data.images import write_members as write_tar

Files = list[tuple[str, bytes]]


def encoded(
    width: int = 20, height: int = 10, kind: str = "PNG", mode: str = "RGB", **options: Any
) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def pair(key: str, caption: str = "a red picture", **options: Any) -> Files:
    return [(f"{key}.png", encoded(**options)), (f"{key}.txt", caption.encode())]


def pairs(count: int) -> Files:
    return [file for i in range(count) for file in pair(f"{i}", f"number {i}", width=60 + i)]


def read_by_training(data: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return len(list(raw_samples(str(data))))


def test_counts_and_measures(tmp_path: Path) -> None:
    """Width and height swapped, words counted as characters, a shard left out."""
    sizes = [(10, 40), (20, 20), (30, 20), (90, 30), (400, 200)]
    rows = [pair(f"{i}", "wörd " * (i + 1), width=w, height=h) for i, (w, h) in enumerate(sizes)]
    write_tar(tmp_path / "0.tar", [*rows[0], *rows[1]])
    write_tar(tmp_path / "1.tar", [*rows[2], *rows[3], *rows[4]])
    report = inspect(str(tmp_path))
    assert (report.shards, report.samples, report.looked_at, report.good) == (2, 5, 5, 5)
    assert report.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert report.parts == {"png": 5, "txt": 5}
    measured = {
        name: (values[0], values[2], values[4]) for name, values in report.quantiles.items()
    }
    lengths = sorted(len(row[0][1]) for row in rows)
    assert measured == {
        "width": (10, 30, 400),
        "height": (20, 30, 200),
        "width / height": (0.25, 1.5, 3.0),
        "bytes": (lengths[0], lengths[2], lengths[4]),
        "characters": (4, 14, 24),
        "words": (1, 3, 5),
    }
    assert report.outside_ratios == 2 / 5  # 1:2 and 2:1 themselves are inside


def test_agrees_with_the_reader_on_what_was_packed(tmp_path: Path) -> None:
    """Samples grouped otherwise than training groups them."""
    shapes.write_shards(tmp_path / "shapes", "train", 25, side=16, samples_per_shard=10)
    report = inspect(str(tmp_path / "shapes"), caption_key="caption")
    assert report.samples == report.good == read_by_training(tmp_path / "shapes") == 25
    assert report.parts == {"png": 25, "txt": 25, "json": 25}
    assert report.json_keys == {"caption": 25, "split": 25}
    assert inspect(str(tmp_path / "shapes" / "train-0000{0..1}.tar")).samples == 20


def test_what_is_bad_is_counted_by_cause(tmp_path: Path) -> None:
    """Bad samples that the report passes over, and a run then stumbles on."""
    whole = encoded(64, 64, "JPEG")
    files = [*pair("good"), ("nopicture.txt", b"x"), ("nocaption.png", encoded())]
    files += [("html.jpg", b"<html>"), ("html.txt", b"x")]
    files += [("cut.jpg", whole[: len(whole) - 200]), ("cut.txt", b"x")]
    files += [*pair("blank", " \n"), ("latin.png", encoded()), ("latin.txt", b"B\xe4r")]
    write_tar(tmp_path / "a.tar", files)
    report = inspect(str(tmp_path))
    assert (report.samples, report.good) == (7, 1)
    assert (report.without_image, report.without_caption) == (1, 1)
    assert report.bad == {
        "no image": 1,
        "no caption under 'txt'": 1,
        "unreadable image (UnidentifiedImageError)": 1,
        "unreadable image (OSError)": 1,
        "empty caption": 1,
        "caption is not UTF-8": 1,
    }
    assert "1 x empty caption" in describe(report)


def test_captions_in_the_json(tmp_path: Path) -> None:
    """A wrong caption_key found out without a hint at the right one."""
    rows: list[Any] = [{"alt": "é 0", "id": 7}, {"alt": "é 1", "title": "t"}, {"alt": ""}, [1]]
    files: Files = []
    for i, row in enumerate(rows):
        files += [(f"{i}.png", encoded()), (f"{i}.json", json.dumps(row).encode())]
    files += [("5.png", encoded()), ("5.json", b"{")]
    write_tar(tmp_path / "a.tar", files)
    report = inspect(str(tmp_path), "alt")
    assert report.good == 2 and report.json_keys == {"alt": 2, "title": 1}
    assert report.bad == {
        "empty caption": 1,
        "no caption under 'alt'": 1,
        "invalid json": 1,
    }
    wrong = inspect(str(tmp_path))
    assert wrong.good == 0 and wrong.without_caption == 5
    assert "alt 2, title 1" in describe(wrong)


def test_duplicate_keys(tmp_path: Path) -> None:
    """A shard listed twice; neighbors of one key, of which the reader drops one."""
    write_tar(tmp_path / "a.tar", pair("0") + pair("1") + pair("1"))
    write_tar(tmp_path / "b.tar", pair("1") + pair("2"))
    report = inspect(str(tmp_path))
    assert (report.samples, report.duplicates) == (5, 2)
    write_tar(tmp_path / "b.tar", pair("x/1") + pair("y/1"))
    assert inspect(str(tmp_path)).duplicates == 1  # a folder inside of the tar is part of the key


def test_bad_samples_are_those_of_training(tmp_path: Path) -> None:
    """Limits other than training's; a second sample of a key, which training skips, called good."""
    wide, large = encoded(84, 4), encoded(8000, 6300, mode="1")
    files = [*pair("0"), *pair("1"), *pair("0"), *pair("2"), *pair("2")]
    files += [("wide.png", wide), ("wide.txt", b"x"), ("large.png", large), ("large.txt", b"x")]
    write_tar(tmp_path / "a.tar", files)
    report = inspect(str(tmp_path))
    assert (report.samples, report.looked_at, report.good, report.duplicates) == (7, 7, 3, 2)
    assert report.bad == {"duplicate key": 2, "extreme aspect ratio": 1, "image too large": 1}
    batches = Batches(str(tmp_path), 1, 8, augment_dvae, seed=0, buffer=99, max_bad=1.0)
    loader = batches.loader()
    read = [next(loader) for _ in range(report.good)]
    assert {key for batch in read for key in batch.keys} == {"0", "1", "2"}


def test_members_that_the_reader_leaves_out(tmp_path: Path) -> None:
    """Folders, WebDataset's own members or names without an extension counted as samples."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("x.y")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in [("__meta__/a.txt", b""), ("README", b""), *pair("A.b"), ("c.PNG", b"")]:
            add_file(tar, name, data)
    report = inspect(str(tmp_path))
    assert report.samples == read_by_training(tmp_path) == 2
    assert report.parts == {"b.png": 1, "b.txt": 1, "png": 1}


@pytest.mark.parametrize(
    "cut", ["inside", "caption", "between", "rubbish", "html", "empty", "tar.gz"]
)
def test_damaged_shards(tmp_path: Path, cut: str) -> None:
    """A download cut short, anywhere, that passes for a whole shard or ends the inspection."""
    files = pairs(6)
    path = write_tar(tmp_path / "a.tar", files)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    data = path.read_bytes()
    if cut == "inside":  # of the fourth image
        path.write_bytes(data[: members[6].offset_data + 10])
    elif cut == "caption":  # of the fourth sample, which has all of its headers
        path.write_bytes(data[: members[7].offset_data + 3])
    elif cut == "between":  # the fourth image and its caption, which is lost
        path.write_bytes(data[: members[7].offset])
    elif cut == "rubbish":
        start = members[7].offset
        path.write_bytes(data[:start] + b"?" * 512 + data[start + 512 :])
    elif cut == "tar.gz":
        path = write_tar(tmp_path / "b.tar.gz", files, "w:gz")
        path.write_bytes(path.read_bytes()[:-40])
    else:
        path.write_bytes(b"<html>gone</html>" if cut == "html" else b"")
    report = inspect(str(path))
    assert report.damaged == [str(path)]
    whole = {"html": 0, "empty": 0, "tar.gz": 5}.get(cut, 3)
    assert report.samples >= whole and report.good >= min(whole, 3)
    if cut != "tar.gz":
        assert report.samples == whole == read_by_training(path)
    assert str(path) in describe(report)


def test_compressed_shards(tmp_path: Path) -> None:
    """Offsets of the compressed file taken for those of what is in it."""
    report = inspect(str(write_tar(tmp_path / "a.tar.gz", pairs(5), "w:gz")), images=5)
    assert report.good == 5 and not report.damaged
    assert sorted(text for _, text in report.images) == [f"number {i}" for i in range(5)]


def test_a_random_part(tmp_path: Path) -> None:
    """The first samples alone, the same for every seed, or other ones at every call; counts of the
    part told as those of the whole."""
    write_tar(tmp_path / "a.tar", pairs(60))

    def seen(seed: int) -> list[str]:
        report = inspect(str(tmp_path), samples=10, seed=seed, images=60)
        assert (report.samples, report.looked_at, report.good) == (60, 10, 10)
        assert "of 10 samples (drawn at random)" in describe(report)
        return [text for _, text in report.images]

    assert seen(0) == seen(0) and seen(0) != seen(1)
    assert max(int(text.split()[1]) for text in seen(0)) > 20
    drawn = [text for _, text in inspect(str(tmp_path), samples=None, images=10).images]
    assert len(set(drawn)) == 10 and max(int(text.split()[1]) for text in drawn) > 20


def test_formats_modes_and_turned_images(tmp_path: Path) -> None:
    """Sizes before the turn that EXIF asks for, which are not those that training sees; the mode
    after the conversion, which is always RGB."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    files = [("0.jpg", encoded(40, 10, "JPEG", exif=exif)), ("0.txt", b"x")]
    files += pair("1", width=10, height=40, mode="LA")
    write_tar(tmp_path / "a.tar", files)
    report = inspect(str(tmp_path))
    assert report.formats == {"JPEG": 1, "PNG": 1} and report.modes == {"RGB": 1, "LA": 1}
    assert report.quantiles["width"] == [10] * 5 and report.quantiles["height"] == [40] * 5


def test_folder_of_pairs(tmp_path: Path) -> None:
    """Pairs in folders below, or of one name in two of them, taken for duplicates or left out."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").write_bytes(encoded())
        (tmp_path / folder / "0.txt").write_text("x")
    (tmp_path / "lonely.JPG").write_bytes(encoded(kind="JPEG"))
    report = inspect(str(tmp_path))
    assert (report.shards, report.samples, report.good, report.duplicates) == (0, 3, 2, 0)
    assert report.without_caption == 1 and report.parts == {"png": 2, "jpg": 1, "txt": 2}
    assert report.bytes == sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    write_shards(tmp_path, tmp_path / "out")
    assert inspect(str(tmp_path / "out")).good == 2


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ("no/{0..2}.tar", {}, "does not exist"),
        ("", {}, "neither"),
        ("", {"samples": 0}, "samples=0"),
        ("", {"images": -1}, "images=-1"),
        ("", {"seed": -1}, "seed=-1"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, data: str, settings: dict[str, Any], message: str
) -> None:
    """A report of nothing, or a traceback."""
    with pytest.raises(ValueError, match=message):
        inspect(data or str(tmp_path), **settings)


def test_the_sheet_shows_each_image_with_its_caption(tmp_path: Path) -> None:
    """Images stretched to squares, or with another's caption; a last column left out."""
    files: Files = []
    for i in range(10):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 20), (25 * i, 0, 255)).save(buffer, "PNG")
        files += [(f"{i}.png", buffer.getvalue()), (f"{i}.txt", f"{i}".encode())]
    write_tar(tmp_path / "a.tar", files)
    report = inspect(str(tmp_path), images=10)
    assert sorted(text for _, text in report.images) == [str(i) for i in range(10)]
    for image, text in report.images:
        assert image.size == (160, 160)
        assert image.getpixel((80, 80)) == (25 * int(text), 0, 255)
        assert image.getpixel((80, 20)) == image.getpixel((80, 140)) == (200, 200, 200)
    sheet = np.asarray(draw_contact_sheet(report.images))
    for i, (_, text) in enumerate(report.images):
        column, row = divmod(i, 8)
        y, x = 4 + 164 * row + 80, 354 * column + 190 + 80
        assert sheet[y, x].tolist() == [25 * int(text), 0, 255]
    with pytest.raises(ValueError, match="no good sample"):
        draw_contact_sheet([])


def test_the_report_is_a_table(tmp_path: Path) -> None:
    """Columns that do not stand under their names; a report that breaks where nothing was good."""
    write_tar(tmp_path / "a.tar", pair("0", "x" * 12345, width=1234, height=100))
    lines = describe(inspect(str(tmp_path))).splitlines()
    head = next(i for i, line in enumerate(lines) if "median" in line)
    assert len({len(line) for line in lines[head:]}) == 1 and len(lines[head:]) == 7
    assert lines[head + 5].split() == ["characters", *["12,345"] * 5]
    describe(InspectReport("nothing", "txt"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags that do nothing; the sheet's captions as a pair with the sheet, which a later run would
    train on; an hour's work lost to a sheet that cannot be saved."""
    data = tmp_path / "data"
    data.mkdir()
    for i in range(5):
        (data / f"{i}.png").write_bytes(encoded())
        (data / f"{i}.txt").write_text(f"ünï {i}", encoding="utf-8")
    sheet = data / "sheet.png"
    flags = ["--sheet", str(sheet), "--count", "3", "--samples", "4", "--seed", "2"]
    assert inspect_data.main([str(data), *flags]) == 0
    said = capsys.readouterr().out
    assert "of 4 samples" in said and str(sheet) in said
    with Image.open(sheet) as opened:
        assert opened.height == 4 + 3 * 164
    captions = (data / "sheet_captions.txt").read_text(encoding="utf-8").splitlines()
    wanted = inspect(str(data), samples=4, seed=2, images=3)
    assert len(captions) == 3 and all(line.split(": ")[1].startswith("ünï") for line in captions)
    assert wanted.without_caption == 1 and read_by_training(data) == 5
    assert inspect_data.main([str(data), "--all", "--caption-key", "alt"]) == 0
    assert "6 x no caption under 'alt'" in capsys.readouterr().out
    assert inspect_data.main([str(data), "--sheet", "sheet"]) == 2
    assert inspect_data.main([str(data), "--sheet", str(sheet), "--count", "0"]) == 2
    assert inspect_data.main([str(tmp_path / "none")]) == 2
    assert "Traceback" not in capsys.readouterr().err

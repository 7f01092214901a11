"""What users hand in, by all that reads it: training, counts, inspection, shards, filters."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dalle1.data.curation.filter_shards import filter_shards
from dalle1.data.curation.filters import FilterSettings
from dalle1.data.curation.inspect import describe, inspect
from dalle1.data.curation.write_shards import write_shards
from dalle1.data.precompute.crops import Decoding, ViewSettings
from dalle1.data.shards.index import count_samples, find_pairs, make_index, raw_samples
from dalle1.data.shards.loader import Batches
from dalle1.data.transforms import augment_dvae
from tests.data.images import encoded, write_members

Members = list[tuple[str, bytes]]
CAPTIONS = [f"a red number {i}" for i in range(6)]
TWIN = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X" + bytes(100)  # AppleDouble
ANY = FilterSettings(min_words=0, boilerplate_words=0, english="off", duplicates="off")


def members(name: Callable[[int, str], str], count: int = len(CAPTIONS)) -> Members:
    """The files of some samples, named by number and ending."""
    return [
        file
        for i in range(count)
        for file in ((name(i, "jpg"), encoded(i, "JPEG")), (name(i, "txt"), CAPTIONS[i].encode()))
    ]


def write_folder(folder: Path, files: Members) -> Path:
    for name, data in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def read_by_training(data: str, samples: int) -> list[str]:
    """An epoch's captions, sorted, of which none must be left out as bad."""
    batches = Batches(data, 1, 8, augment_dvae, seed=0, buffer=4)
    assert batches.index.samples == samples
    loader = batches.loader()
    read = [next(loader) for _ in range(samples)]
    assert not any(batch.dropped for batch in read)
    return sorted(caption for batch in read for caption in batch.captions)


def read_by_tokenizing(address: str) -> list[str]:
    captions: list[str] = []
    for chunk in Decoding([address], ViewSettings(), 4, 8):
        captions += (texts[0] for texts in chunk.captions)
        assert chunk.end is None or not (+chunk.end.dropped or chunk.end.damage)
    return captions


def with_twins(files: Members) -> Members:
    """As the tar of macOS has them: before each file."""
    twins = [(str(Path(name).parent / f"._{Path(name).name}"), TWIN) for name, _ in files]
    return [file for pair in zip(twins, files, strict=True) for file in pair]


def with_folder_of_twins(files: Members) -> Members:
    """As the zip tools of macOS have them."""
    return [*files, *((f"__MACOSX/{Path(n).parent}/._{Path(n).name}", TWIN) for n, _ in files)]


def with_notes(files: Members) -> Members:
    """The notes of systems, between the files of a sample too."""
    notes = (".DS_Store", "Thumbs.db", "desktop.ini", "Desktop.ini", ".directory", "ehthumbs.db")
    folder = Path(files[0][0]).parent
    return [
        file
        for i, given in enumerate(files)
        for file in (given, (str(folder / notes[i % len(notes)]), b"Bud1" * 20))
    ]


def with_copies(files: Members) -> Members:
    """Previews and former versions, which are good images with captions and yet no data."""
    places = ("@eaDir", ".ipynb_checkpoints", ".Trashes/501", "$RECYCLE.BIN", ".snapshots/1")
    folder, first = Path(files[0][0]).parent, files[:2]
    copies = [(str(folder / p / Path(n).name), data) for p in places for n, data in first]
    return [*copies[:4], *files, *copies[4:]]


CLUTTERS = [with_twins, with_folder_of_twins, with_notes, with_copies]


@pytest.mark.parametrize("place", ["", "train/", "./", "a.b/c/"])
@pytest.mark.parametrize("clutter", CLUTTERS)
def test_files_that_are_no_data_in_a_tar(
    tmp_path: Path, clutter: Callable[[Members], Members], place: str
) -> None:
    """Files of systems and tools read as samples, or breaking those between which they lie in two;
    or counted as bad samples, or copied on."""
    clean = members(lambda i, ending: f"{place}{i:04d}.{ending}")
    cluttered = clutter(clean)
    path = write_members(tmp_path / "in" / "0.tar", cluttered)
    packed = tmp_path / "0.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes(), 1))
    for address in (str(path), str(packed), f"pipe:cat {path}"):
        assert count_samples(address) == len(CAPTIONS)
        assert [raw["txt"].decode() for raw in raw_samples(address)] == CAPTIONS
        assert read_by_training(address, len(CAPTIONS)) == CAPTIONS
        assert read_by_tokenizing(address) == CAPTIONS
    report = inspect(str(path))
    assert (report.samples, report.good, report.duplicates) == (6, 6, 0) and not report.bad
    assert report.parts == {"jpg": 6, "txt": 6}
    assert report.skipped_files == len(cluttered) - len(clean)
    assert f"{report.skipped_files:,} that are no part of the data" in describe(report)
    filtered = filter_shards(str(path.parent), tmp_path / "out", ANY)
    assert (filtered.samples, filtered.kept, filtered.dropped.total()) == (6, 6, 0)
    assert inspect(str(tmp_path / "out")).skipped_files == 0


@pytest.mark.parametrize("clutter", CLUTTERS)
def test_files_that_are_no_data_in_a_folder(
    tmp_path: Path, clutter: Callable[[Members], Members]
) -> None:
    """Half of the pairs rubbish that is trained on, packed or reported as bad."""
    clean = members(lambda i, ending: f"{'ab'[i % 2]}/{i:04d}.{ending}")
    cluttered = clutter(clean)
    folder = write_folder(tmp_path / "in", cluttered)
    wanted = sorted(str(folder / name) for name, _ in clean if name.endswith("jpg"))
    assert make_index(str(folder)).shards == find_pairs(folder) == wanted
    assert read_by_training(str(folder), 6) == CAPTIONS
    report = inspect(str(folder))
    assert (report.samples, report.good) == (6, 6) and not report.bad
    assert report.skipped_files == len(dict(cluttered)) - len(clean)
    written = write_shards(folder, tmp_path / "out")
    assert written.samples == 6 and not written.skipped


@pytest.mark.parametrize("name", ["._0.tar", "._0.safetensors", ".DS_Store", "._0_stats.json"])
def test_twins_of_shards(tmp_path: Path, name: str) -> None:
    """A twin of a shard read as a shard, taken for another kind of shards, or in the way where
    shards are to be written."""
    folder = write_folder(tmp_path / "in", [(name, TWIN)])
    write_members(folder / "0.tar", members(lambda i, ending: f"{i}.{ending}"))
    assert make_index(str(folder)).shards == [str(folder / "0.tar")]
    report = inspect(str(folder))
    assert (report.good, report.damaged, report.skipped_files) == (6, [], 1)
    out = write_folder(tmp_path / "out", [(name, TWIN)])
    assert filter_shards(str(folder), out, ANY).kept == 6
    pairs = write_folder(tmp_path / "pairs", members(lambda i, ending: f"{i}.{ending}"))
    again = write_folder(tmp_path / "again", [(name, TWIN)])
    assert write_shards(pairs, again).samples == 6


@pytest.mark.parametrize("relative", [False, True])
def test_linked_folders(tmp_path: Path, relative: bool) -> None:
    """Linked sub-folders read as if they were empty, by some readers or by all; their loops."""
    folder, other = tmp_path / "in", tmp_path / "elsewhere"
    write_folder(other, members(lambda i, ending: f"{'deep/' * (i % 3)}{i}.{ending}"))
    folder.mkdir()
    (folder / "linked").symlink_to("../elsewhere" if relative else other)
    (folder / "again").symlink_to(other)
    (other / "deep" / "loop").symlink_to(other)
    (other / "deep" / "up").symlink_to("..")
    assert all(Path(pair).is_relative_to(folder / "again") for pair in find_pairs(folder))
    assert read_by_training(str(folder), 6) == CAPTIONS
    report = inspect(str(folder))
    assert (report.samples, report.good, report.without_caption) == (6, 6, 0)
    written = write_shards(folder, tmp_path / "out")
    assert written.samples == 6 and not written.skipped
    paths = [json.loads(raw["json"])["path"] for raw in raw_samples(str(tmp_path / "out"))]
    assert paths == sorted(paths) and "again/deep/deep/2.jpg" in paths


def test_a_link_to_nowhere(tmp_path: Path) -> None:
    """A dangling link that ends an inspection, which is there to find it."""
    folder = write_folder(tmp_path / "in", members(lambda i, ending: f"{i}.{ending}"))
    for ending in ("jpg", "txt"):
        (folder / f"6.{ending}").symlink_to(f"nowhere.{ending}")
    assert read_by_training(str(folder), 6) == CAPTIONS
    report = inspect(str(folder))
    assert (report.samples, report.good) == (7, 6) and report.bad.total() == 1


ENDINGS: list[dict[str, str]] = [
    {"jpg": "JPG", "txt": "TXT"},
    {"jpg": "jpg", "txt": "TXT"},
    {"jpg": "JPG", "txt": "txt"},
    {"jpg": "Jpeg", "txt": "Txt"},
    {"jpg": "PNG", "txt": "tXT"},
    {"jpg": "WEBP", "txt": "TxT"},
]


@pytest.mark.parametrize("endings", ENDINGS)
def test_endings_in_either_case(tmp_path: Path, endings: dict[str, str]) -> None:
    """The .TXT of a camera's .JPG not seen, in folders or in tars."""
    files = members(lambda i, ending: f"IMG_{i}.{endings[ending]}")
    folder = write_folder(tmp_path / "in", files)
    shard = write_members(tmp_path / "0.TAR", files)
    for data in (str(folder), str(shard)):
        assert [raw["txt"].decode() for raw in raw_samples(data)] == CAPTIONS
        assert read_by_training(data, 6) == CAPTIONS
        report = inspect(data)
        assert (report.samples, report.good, report.without_caption) == (6, 6, 0)
    assert write_shards(folder, tmp_path / "out").samples == 6
    assert read_by_tokenizing(str(shard)) == CAPTIONS


def test_json_in_capitals(tmp_path: Path) -> None:
    """The .JSON of a tar not seen."""
    files: Members = []
    for i, caption in enumerate(CAPTIONS):
        files += [(f"{i}.PNG", encoded(i)), (f"{i}.JSON", json.dumps({"alt": caption}).encode())]
    path = write_members(tmp_path / "0.TAR", files)
    batches = Batches(str(path), 6, 8, augment_dvae, seed=0, caption_key="alt")
    batch = next(batches.loader())
    assert sorted(batch.captions) == CAPTIONS and not batch.dropped
    assert inspect(str(path), "alt").good == 6


def test_shards_in_capitals(tmp_path: Path) -> None:
    """Shards and statistics of a file system that has capitals alone, called no shards, read from
    their beginning each time, counted anew, or refused by a tool that says how they must end."""
    folder = tmp_path / "in"
    for i in range(2):
        write_members(folder / f"{i}.TAR", members(lambda i, ending: f"{i}.{ending.upper()}"))
    assert make_index(str(folder)).counts == [6, 6]
    assert read_by_training(str(folder), 12) == sorted(CAPTIONS * 2)
    assert inspect(str(folder)).good == 12
    assert filter_shards(str(folder), tmp_path / "out", ANY).kept == 12
    assert make_index(str(tmp_path / "out")).counts == [6, 6]
    (folder / "0_STATS.JSON").write_text('{"successes": 4}')
    (folder / "1_stats.json").write_text('{"successes": 5}')
    assert make_index(str(folder)).counts == [4, 5]
    with pytest.raises(ValueError, match=r"already holds 0.TAR"):
        write_shards(folder, folder)
    shutil.copy(folder / "0.TAR", folder / "0.tar")
    with pytest.raises(ValueError, match="have one name"):
        filter_shards(str(folder), tmp_path / "other", ANY)

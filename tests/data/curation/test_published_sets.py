"""MS-COCO and CUB-200-2011 as shards: which captions go with which picture, and every fault."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dalle1.commands.data import shard
from dalle1.data.curation import coco
from dalle1.data.curation.captions import CaptionChoice
from dalle1.data.curation.write_shards import WrittenShards, write_shards
from dalle1.data.samples import caption_of, captions_of, image_of
from dalle1.data.shards.index import raw_samples
from tests.data.curation.published_sets import (
    BIRDS,
    COCO_CAPTIONS,
    COCO_IMAGES,
    TRAINING,
    coco_content,
    picture,
    write_coco,
    write_cub,
)


def cleaned(captions: list[str]) -> list[str]:
    return [caption.strip() for caption in captions]


def read(out: Path) -> dict[str, dict[str, Any]]:
    """The json of each sample by its path, with the captions as readers give them."""
    found = {}
    for sample in raw_samples(str(out)):
        columns = json.loads(sample["json"])
        columns["key"], columns["image"] = sample["__key__"], image_of(sample)
        columns["first"] = caption_of(sample, "txt")
        assert captions_of(sample, "captions") == columns["captions"]
        found[columns["path"]] = columns
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("inner", ["", "val2014"])
def test_coco(tmp_path: Path, inner: str) -> None:
    """Captions that go with another picture, since the lists of both are in orders of their own;
    captions of a picture that are lost, or joined to one; a folder around the pictures refused."""
    annotations = write_coco(tmp_path)
    written = write_shards(tmp_path / inner, tmp_path / "out", coco=annotations)
    assert written.samples == 4 and not written.skipped
    found = read(tmp_path / "out")
    assert list(found) == [name for _, name in COCO_IMAGES]
    for i, ((identity, name), captions) in enumerate(zip(COCO_IMAGES, COCO_CAPTIONS, strict=True)):
        sample = found[name]
        assert sample["image_id"] == identity and sample["key"] == f"{i:09d}"
        assert sample["captions"] == cleaned(captions) and sample["first"] == captions[0].strip()
        assert sample["image"] == (tmp_path / "val2014" / name).read_bytes()


def test_captions_that_stay(tmp_path: Path) -> None:
    """`first` that is another one's first; `one` that is always the first, that another seed does
    not change, that depends on the shuffle, or on which other pictures are bad."""
    captions = [[f"picture {i} caption {j}" for j in range(5)] for i in range(4)]
    annotations = write_coco(tmp_path, coco_content(COCO_IMAGES, captions))
    chosen: dict[str, list[list[str]]] = {}
    for name, more in {
        "first": {"captions": "first"},
        "one": {"captions": "one", "seed": 0},
        "again": {"captions": "one", "seed": 0, "workers": 1},
        "other": {"captions": "one", "seed": 1},
    }.items():
        write_shards(tmp_path, tmp_path / name, coco=annotations, **more)  # type: ignore[arg-type]
        samples = read(tmp_path / name)
        chosen[name] = [samples[file]["captions"] for _, file in COCO_IMAGES]
    assert chosen["first"] == [c[:1] for c in captions]
    assert all(len(c) == 1 and c[0] in captions[i] for i, c in enumerate(chosen["one"]))
    assert contents(tmp_path / "one") == contents(tmp_path / "again")
    assert chosen["one"] != chosen["first"] and chosen["one"] != chosen["other"]
    (tmp_path / "val2014" / COCO_IMAGES[0][1]).unlink()
    write_shards(tmp_path, tmp_path / "fewer", coco=annotations, captions="one", seed=0)
    fewer = read(tmp_path / "fewer")
    assert [fewer[file]["captions"] for _, file in COCO_IMAGES[1:]] == chosen["one"][1:]


def test_one_of_many_is_uniform() -> None:
    """A choice that some captions never win."""
    texts = ["a", "b", "c", "d", "e"]
    counts = dict.fromkeys(texts, 0)
    for number in range(1000):
        counts[CaptionChoice("one", 3).of(texts, number)[0]] += 1
    assert all(150 < count < 250 for count in counts.values())  # four deviations


Change = Callable[[dict[str, Any]], None]


def entry(**values: Any) -> Change:
    return lambda content: content["images"].append(values)


def annotation(**values: Any) -> Change:
    return lambda content: content["annotations"].append(values)


COCO_FAULTS: list[tuple[Change, str]] = [
    (entry(id=42, file_name="x.jpg"), coco.SAME_ID),
    (entry(id=91, file_name=COCO_IMAGES[0][1]), coco.SAME_FILE),
    (entry(id=92), coco.NO_ENTRY),
    (entry(file_name="x.jpg"), coco.NO_ENTRY),
    (entry(id=[1], file_name="x.jpg"), coco.NO_ENTRY),
    (entry(id=True, file_name="x.jpg"), coco.NO_ENTRY),
    (entry(id=93, file_name=7), coco.NO_ENTRY),
    (lambda content: content["images"].append("x.jpg"), coco.NO_ENTRY),
    (entry(id=94, file_name="../val2014/x.jpg"), "path that leads out of the folder"),
    (entry(id=95, file_name="/etc/passwd"), "path that leads out of the folder"),
    (entry(id=96, file_name=""), "path that leads out of the folder"),
    (entry(id=97, file_name="x.jpg"), "no caption"),
    (annotation(id=1, image_id=12345, caption="of no picture"), coco.ORPHAN),
    (annotation(id=2, caption="of no picture"), coco.ORPHAN),
    (annotation(id=3, image_id={}, caption="of no picture"), coco.ORPHAN),
    (annotation(id=4, image_id=42, caption=" \n"), coco.EMPTY_TEXT),
    (annotation(id=5, image_id=42), coco.NO_TEXT),
    (annotation(id=6, image_id=42, caption=["a"]), coco.NO_TEXT),
    (annotation(id=1000, image_id=42, caption="twice"), coco.SAME_ANNOTATION),
    (lambda content: content["annotations"].append(None), coco.NO_ANNOTATION),
]


@pytest.mark.parametrize(("change", "cause"), COCO_FAULTS)
def test_faults_of_coco(tmp_path: Path, change: Change, cause: str) -> None:
    """A bad entry that ends the packing, is left out without a word, or changes a neighbor."""
    content = coco_content()
    change(content)
    written = write_shards(tmp_path, tmp_path / "out", coco=write_coco(tmp_path, content))
    assert written.samples == 4 and dict(written.skipped) == {cause: 1}
    found = read(tmp_path / "out")
    assert [found[name]["captions"] for _, name in COCO_IMAGES] == list(map(cleaned, COCO_CAPTIONS))


def test_all_faults_at_once(tmp_path: Path) -> None:
    """Counts of one cause under another's name; a first of them that is not named."""
    content = coco_content()
    for change, _ in COCO_FAULTS:
        change(content)
    path = write_coco(tmp_path, content)
    (tmp_path / "val2014" / COCO_IMAGES[0][1]).unlink()
    (tmp_path / "val2014" / COCO_IMAGES[1][1]).write_bytes(b"no picture")
    written = write_shards(tmp_path, tmp_path / "out", coco=path)
    assert written.samples == 2
    assert written.skipped["missing file"] == written.skipped["unreadable image"] == 1
    assert written.first["missing file"] == f"image 391895, '{COCO_IMAGES[0][1]}'"
    assert written.first[coco.EMPTY_TEXT] == "annotation 4"
    assert written.skipped.total() == 2 + len(COCO_FAULTS)


def test_pictures_that_are_broken(tmp_path: Path) -> None:
    """A truncated picture, or one cut to nothing, that ends the packing; a link that leads out."""
    path = write_coco(tmp_path)
    folder = tmp_path / "val2014"
    (folder / COCO_IMAGES[2][1]).write_bytes(b"")
    (folder / COCO_IMAGES[3][1]).unlink()
    (folder / COCO_IMAGES[3][1]).mkdir()
    written = write_shards(tmp_path, tmp_path / "out", coco=path)
    assert written.samples == 2 and written.skipped.total() == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "coco: expected MS-COCO's caption annotations"),
        ("{", "coco: expected MS-COCO's caption annotations"),
        ("[1]", "with no keys"),
        ('{"images": [], "categories": []}', "with 'images', 'categories'"),
        ('{"images": {}, "annotations": []}', "with lists 'images' and 'annotations'"),
        ("[" * 100_000, "coco: expected MS-COCO's caption annotations"),
        ('{"images": [], "annotations": []}', "no usable row .*: the list has no images"),
    ],
)
def test_files_that_are_no_annotations(tmp_path: Path, text: str, message: str) -> None:
    """A traceback for another file of the download, or for one that was cut off."""
    path = write_coco(tmp_path)
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path, tmp_path / "out", coco=path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="coco: expected"):
        write_shards(tmp_path, tmp_path / "out", coco=path)


def test_annotations_of_another_kind_are_named(tmp_path: Path) -> None:
    """Boxes taken for captions: shards without a sample, and no word about why."""
    content = coco_content()
    for i, held in enumerate(content["annotations"]):
        content["annotations"][i] = {"id": held["id"], "image_id": held["image_id"], "bbox": []}
    with pytest.raises(ValueError, match=r"no usable row.*8 x annotation without a caption"):
        write_shards(tmp_path, tmp_path / "out", coco=write_coco(tmp_path, content))
    assert not (tmp_path / "out").exists()


def test_a_huge_caption_costs_its_picture_alone(tmp_path: Path) -> None:
    """A json of a sample that readers refuse for its size, written all the same."""
    content = coco_content()
    content["annotations"].append({"id": 1, "image_id": 42, "caption": "x" * 400_000})
    written = write_shards(tmp_path, tmp_path / "out", coco=write_coco(tmp_path, content))
    assert dict(written.skipped) == {"caption too large": 1} and written.samples == 3


def test_a_large_file_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of any length read into memory."""
    path = write_coco(tmp_path)
    with path.open("r+b") as file:
        file.truncate(2**40)  # of holes
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"coco: expected .* a file of 1,099\.5 GB"):
        write_shards(tmp_path, tmp_path / "out", coco=path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("around", [False, True])
def test_cub(tmp_path: Path, around: bool) -> None:
    """Captions of another bird; the ten lines of a file taken for one caption; the folder as it
    was unpacked refused."""
    texts = write_cub(tmp_path)
    source = tmp_path if around else tmp_path / "CUB_200_2011"
    written = write_shards(source, tmp_path / "out", cub=texts if around else texts / "text_c10")
    assert written.samples == 4 and not written.skipped
    found = read(tmp_path / "out")
    assert list(found) == BIRDS
    for i, path in enumerate(BIRDS):
        sample = found[path]
        assert sample["captions"] == [f"bird {i} has caption {j} ." for j in range(10)]
        assert sample["first"] == sample["captions"][0] and sample["image_id"] == str(i + 1)
        assert sample["class"] == path.split("/")[0]
        assert sample["bounding_box"] == [float(i), 2.0, 5.5, 6.0]
        assert sample["image"] == (tmp_path / "CUB_200_2011/images" / path).read_bytes()


def test_splits_of_cub(tmp_path: Path) -> None:
    """The training split taken for the test's; keys that a split changes."""
    texts = write_cub(tmp_path)
    for split, value in (("train", "1"), ("test", "0")):
        written = write_shards(tmp_path, tmp_path / split, cub=texts, split=split)
        found = read(tmp_path / split)
        assert list(found) == [p for p, t in zip(BIRDS, TRAINING, strict=True) if t == value]
        assert [s["key"] for s in found.values()] == [f"{BIRDS.index(p):09d}" for p in found]
        assert not written.skipped
    write_shards(tmp_path, tmp_path / "c", cub=texts, classes=texts / "testclasses.txt")
    assert list(read(tmp_path / "c")) == BIRDS[3:]


def break_list(name: str, text: str) -> Callable[[Path], None]:
    """Adds a line to a list of CUB_200_2011."""

    def change(folder: Path) -> None:
        with (folder / "CUB_200_2011" / name).open("a", encoding="utf-8") as file:
            file.write(text)

    return change


def text_of(bird: int, data: bytes | None) -> Callable[[Path], None]:
    """Replaces the captions of a bird, or removes them."""

    def change(folder: Path) -> None:
        path = (folder / "cvpr2016_cub/text_c10" / BIRDS[bird]).with_suffix(".txt")
        path.unlink() if data is None else path.write_bytes(data)

    return change


def picture_of(bird: int, data: bytes | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "CUB_200_2011/images" / BIRDS[bird]
        path.unlink() if data is None else path.write_bytes(data)

    return change


@pytest.mark.parametrize(
    ("change", "cause", "good"),
    [
        (break_list("images.txt", "9\n"), "line without id and path", 4),
        (break_list("images.txt", f"1 {BIRDS[0]}x\n"), "duplicate image id", 4),
        (break_list("images.txt", f"9 {BIRDS[0]}\n"), "duplicate path", 4),
        (break_list("images.txt", "9 ../x/y.jpg\n"), "path that leads out of the folder", 4),
        (break_list("images.txt", "9 /etc/passwd\n"), "path that leads out of the folder", 4),
        (break_list("images.txt", "9 002.Laysan_Albatross/none.jpg\n"), "no caption", 4),
        (break_list("images.txt", "9 002.Laysan_Albatross/n\0ne.jpg\n"), "no caption", 4),
        (break_list("bounding_boxes.txt", "4 nan 1\n5\n"), "", 4),
        (text_of(1, None), "no caption", 3),
        (text_of(1, b" \n\n"), "empty caption", 3),
        (text_of(1, b"\xff\xfe"), "caption is not UTF-8", 3),
        (text_of(1, b"x" * (2**20 + 1)), "caption too large", 3),
        (picture_of(1, None), "missing file", 3),
        (picture_of(1, b"GIF89a"), "unreadable image", 3),
    ],
)
def test_faults_of_cub(
    tmp_path: Path, change: Callable[[Path], None], cause: str, good: int
) -> None:
    """A bad line or file that ends the packing, or is left out without a word."""
    texts = write_cub(tmp_path)
    change(tmp_path)
    written = write_shards(tmp_path, tmp_path / "out", cub=texts)
    assert dict(written.skipped) == ({cause: 1} if cause else {}) and written.samples == good
    for i, path in enumerate(BIRDS):
        if found := read(tmp_path / "out").get(path):
            assert found["first"] == f"bird {i} has caption 0 ."


def test_a_picture_of_no_split(tmp_path: Path) -> None:
    """A picture that no list puts anywhere, in both splits or in none without a word."""
    texts = write_cub(tmp_path)
    path = tmp_path / "CUB_200_2011" / "train_test_split.txt"
    path.write_text("1 0\n2 1\n3 yes\n")
    for split in ("train", "test"):
        written = write_shards(tmp_path, tmp_path / split, cub=texts, split=split)
        assert written.samples == 1 and dict(written.skipped) == {"image of no split": 2}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"coco": "a.json", "cub": "b"}, "coco: expected none beside cub"),
        ({"captions": "first"}, "captions: expected none without coco or cub"),
        ({"split": "test"}, "split: expected none without cub"),
        ({"coco": "a.json", "classes": "c.txt"}, "classes: expected none without cub"),
        ({"cub": "b", "split": "val"}, "split: expected train or test, got 'val'"),
        ({"coco": "a.json", "captions": "some"}, "captions: expected all, first, one"),
        ({"coco": "none.json"}, "coco: .*none.json.* cannot be read"),
        ({"cub": "nowhere"}, "source: expected CUB_200_2011"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, more: dict[str, str], message: str) -> None:
    """An argument that nothing reads, or a traceback for a path that is not there."""
    write_coco(tmp_path)
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path, tmp_path / "out", **more)  # type: ignore[arg-type]


def test_lists_that_are_not_there(tmp_path: Path) -> None:
    """Captions, splits or classes that are missing, found out after hours or not at all."""
    texts = write_cub(tmp_path)

    def refused(message: str, **more: Any) -> None:
        with pytest.raises(ValueError, match=message):
            write_shards(tmp_path, tmp_path / "out", **{"cub": texts, **more})

    refused("cub: expected the captions of Reed et al.", cub=tmp_path / "CUB_200_2011")
    (texts / "other.txt").write_text("Common Yellowthroat\n")
    refused("classes: expected names of images.txt such as '001.Bl", classes=texts / "other.txt")
    (texts / "other.txt").write_text("\n")
    refused("classes: .*got 'none'", classes=texts / "other.txt")
    refused("classes: .*none.txt.* cannot be read", classes=texts / "none.txt")
    (tmp_path / "CUB_200_2011" / "train_test_split.txt").unlink()
    refused("source: .*train_test_split.txt.* cannot be read", split="test")


def test_archives_are_to_be_unpacked(tmp_path: Path) -> None:
    """A download given as it came, and a message about its bytes in place of what to do."""
    annotations, texts = write_coco(tmp_path), write_cub(tmp_path)

    def refused(name: str, setting: str, **more: Any) -> None:
        (tmp_path / name).write_bytes(b"PK\3\4")
        given = {setting: tmp_path / name}
        arguments: dict[str, Any] = {"source": tmp_path, **more, **given}
        with pytest.raises(ValueError, match=rf"^{setting}: expected .*{name}'; unpack it"):
            write_shards(out=tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()

    refused("pairs.zip", "source")
    refused("val2014.ZIP", "source", coco=annotations)
    refused("annotations_trainval2014.zip", "coco")
    refused("CUB_200_2011.tgz", "source", cub=texts)
    refused("cvpr2016_cub.tar.gz", "cub")
    # A folder may be called so, and a tar without these sets is data as it is.
    (tmp_path / "val2014").rename(tmp_path / "val2014.zip")
    assert write_shards(tmp_path / "val2014.zip", tmp_path / "out", coco=annotations).samples
    (tmp_path / "some.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="shards and other addresses need no packing"):
        write_shards(tmp_path / "some.tar", tmp_path / "none")


def said_by(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = shard.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out + err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options that do nothing, or entries left out without a word."""
    content = coco_content()
    content["annotations"].append({"id": 1, "image_id": 12345, "caption": "of no picture"})
    annotations = write_coco(tmp_path, content)
    out = tmp_path / "out"
    options = ["--coco", annotations, "--captions", "one", "--seed", 5]
    status, said = said_by(capsys, tmp_path, out, *options)
    assert status == 0 and "4 samples in 1 shard" in said
    assert "left out 1 of 5" in said
    assert "1 x annotation without an image (first: annotation 1)" in said
    write_shards(tmp_path, tmp_path / "same", coco=annotations, captions="one", seed=5)
    assert contents(out) == contents(tmp_path / "same")
    texts = write_cub(tmp_path)
    options = ["--cub", texts, "--split", "test", "--classes", texts / "testclasses.txt"]
    status, said = said_by(capsys, tmp_path, tmp_path / "birds", *options)
    assert status == 0 and "1 sample" in said
    status, said = said_by(capsys, tmp_path, tmp_path / "none", "--coco", tmp_path / "no.json")
    assert status == 2 and said.startswith("error: coco: ") and "Traceback" not in said


def test_captions_of_a_published_picture_are_read_by_training(tmp_path: Path) -> None:
    """Several captions that a run does not find under the key that the docs name."""
    from dalle1.data.shards.loader import Batches
    from dalle1.data.transforms import augment_dalle

    annotations = write_coco(tmp_path)
    for number, (_, name) in enumerate(COCO_IMAGES):
        picture(tmp_path / "val2014" / name, number, (40, 30))
    written: WrittenShards = write_shards(tmp_path, tmp_path / "out", coco=annotations)
    assert written.samples == 4
    batches = Batches(str(tmp_path / "out"), 4, 16, augment_dalle, seed=0, caption_key="captions")
    known = {caption for captions in COCO_CAPTIONS for caption in cleaned(captions)}
    read_ahead = batches.loader()
    seen = {caption for _ in range(30) for caption in next(read_ahead).captions}
    assert seen == known

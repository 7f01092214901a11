"""Refusals of data whose images and captions do not find each other, by all that reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dalle1.commands.data import inspect as inspect_command
from dalle1.data.curation.filter_shards import filter_shards
from dalle1.data.curation.filters import FilterSettings
from dalle1.data.curation.write_shards import write_shards
from dalle1.data.shards.explain import explain_folder, explain_tars
from dalle1.data.shards.index import check_readable, make_index, read_captions
from dalle1.data.shards.loader import Batches
from dalle1.data.transforms import augment_dvae
from tests.data.images import encoded, write_members

Members = list[tuple[str, bytes]]


def files(*names: str, count: int = 5) -> Members:
    """Files whose names have a place for a number."""
    return [
        (name.format(i), f"number {i}".encode() if name.endswith(("txt", "TXT")) else encoded(i))
        for i in range(count)
        for name in names
    ]


def apart(*names: str) -> Members:
    """All files of the first name, and then all of the next."""
    return [file for name in names for file in files(name)]


# What is in a tar, and what each refusal must say.
TARS: dict[str, tuple[Members, list[str]]] = {
    "two compound": (files("s{}.input.jpg", "s{}.outputs.txt"), ["'input.jpg'", "'outputs.txt'"]),
    "a compound image": (files("s{}.rgb.png", "s{}.txt"), ["'rgb.png'", "'txt'"]),
    "a compound caption": (files("s{}.jpg", "s{}.en.TXT"), ["'jpg'", "'en.txt'"]),
    "versions": (files("a/s{}.v1.2.webp", "a/s{}.v1.3.txt"), ["'v1.2.webp'", "'v1.3.txt'"]),
    "other endings": (files("s{}.gif", "s{}.caption"), ["'gif'", "'caption'"]),
    "images first": (apart("{}.jpg", "{}.txt"), ["side by side", "'jpg'", "'0'"]),
    "captions first": (apart("a/{}.txt", "a/{}.png"), ["side by side", "'png'", "'a/0'"]),
    "three parts": (apart("{}.png", "{}.json", "{}.txt"), ["side by side"]),
    "two names": (files("{}_in.jpg", "{}_out.txt"), ["one name", "'jpg'", "'txt'"]),
    "two folders": (apart("images/{}.jpg", "captions/{}.txt"), ["one name", "side by side"]),
}


@pytest.mark.parametrize("case", TARS)
def test_tars_are_refused_with_what_is_there(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a word on how a reader takes names, where samples that have a caption are said to have
    none; or a run that begins, as one of the two is there."""
    content, wanted = TARS[case]
    path = write_members(tmp_path / "in" / "0.tar", content)
    refusals: list[Callable[[], object]] = [
        lambda: check_readable(make_index(str(path)), "txt"),
        lambda: check_readable(make_index(f"pipe:cat {path}"), "txt"),
        lambda: next(Batches(str(path), 1, 8, augment_dvae, seed=0).loader()),
        lambda: filter_shards(str(path), tmp_path / "out", FilterSettings()),
    ]
    for refused in refusals:
        with pytest.raises(ValueError, match=r"expected|gives no caption|usable") as error:
            refused()
        assert all(part in str(error.value) for part in wanted), error.value
        assert "\n" not in str(error.value)
    assert inspect_command.main([str(path)]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in wanted), said


def test_text_alone(tmp_path: Path) -> None:
    """A tokenizer that is refused its captions because they lie behind the images."""
    path = write_members(tmp_path / "0.tar", apart("{}.jpg", "{}.txt"))
    assert read_captions(str(path), "txt", 9) == [f"number {i}" for i in range(5)]


FOLDERS: dict[str, tuple[Members, list[str]]] = {
    "two compound": (files("s{}.input.jpg", "s{}.outputs.txt"), ["'input.jpg'", "'outputs.txt'"]),
    "a compound caption": (files("s{}.jpg", "s{}.en.txt"), ["'jpg'", "'en.txt'", "one name"]),
    "two folders": (apart("images/{}.jpg", "captions/{}.txt"), ["side by side", "captions/0.txt"]),
    "two names": (files("{}_in.JPG", "{}_out.txt"), ["side by side", "0_in.JPG", "0_out.txt"]),
    "other captions": (files("{}.jpg", "{}.caption"), ["'jpg' (5)", "'caption' (5)"]),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_are_refused_with_what_is_there(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same of a folder: neither shards nor pairs, where both were meant to be there."""
    content, wanted = FOLDERS[case]
    folder = tmp_path / "in"
    for name, data in content:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    refusals: list[Callable[[], object]] = [
        lambda: make_index(str(folder)),
        lambda: write_shards(folder, tmp_path / "out"),
    ]
    for refused in refusals:
        with pytest.raises(ValueError, match=r"^(data|source): ") as error:
            refused()
        assert all(part in str(error.value) for part in wanted), error.value
        assert "\n" not in str(error.value)
    assert inspect_command.main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in wanted), said


def test_nothing_is_said_of_good_names(tmp_path: Path) -> None:
    """Advice on names where something else is wrong, or where there is nothing to read."""
    pairs = files("{}.JPG", "{}.txt")
    good = write_members(tmp_path / "in" / "0.tar", pairs)
    empty = write_members(tmp_path / "in" / "1.tar", [])
    twice = write_members(tmp_path / "in" / "2.tar", pairs + pairs)
    paths = [str(good), str(empty), str(twice)]
    assert [explain_tars([path]) for path in (*paths, str(tmp_path / "3.tar"))] == [""] * 4
    assert explain_tars(paths) == explain_tars([]) == ""
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"")
    assert explain_folder(tmp_path) == ""


def test_many_extensions_are_shortened(tmp_path: Path) -> None:
    """A line of a thousand extensions, where numbers lie behind the first dot."""
    path = write_members(
        tmp_path / "0.tar", files("photo.{:04d}.jpg", "photo.{:04d}.txt", count=50)
    )
    text = explain_tars([str(path)])
    assert "'0000.jpg' (1)" in text and "and 92 others" in text and len(text) < 500

"""Lists of captions as users and their editors make them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dalle1.evaluation.prompts import read_prompts, true_images
from tests.evaluation.conftest import SettingsMaker


@pytest.mark.parametrize("name", ["list.txt", "LIST.TXT", "List.Txt", "lüst #1.tXt"])
@pytest.mark.parametrize("head", ["", "\ufeff", "\ufeff\n \n"], ids=["plain", "mark", "empty"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_list_of_captions(
    name: str, head: str, end: str, make_settings: SettingsMaker, tmp_path: Path
) -> None:
    """U+FEFF as a part of the first caption; `LIST.TXT` taken for a tar, and its captions for no
    samples."""
    (tmp_path / name).write_bytes((head + end.join(["a red cat", "", "ein Füchslein"])).encode())
    settings = make_settings(data=str(tmp_path / name))
    assert [p.caption for p in read_prompts(settings)] == ["a red cat", "ein Füchslein"]
    assert true_images(settings, 8) is None


def test_odd_letters_of_a_list(make_settings: SettingsMaker, tmp_path: Path) -> None:
    """A caption with U+2028, U+0085 or a form feed taken for several; U+FEFF in the middle of two
    lists that were joined, or twice in front, as a part of a caption."""
    text = "\ufeff\ufeffa\u2028b\x0cc\x85d\r\n\ufefftwo\rthree\n \ufeff \n"
    (tmp_path / "list.txt").write_bytes(text.encode())
    prompts = read_prompts(make_settings(data=str(tmp_path / "list.txt")))
    assert [p.caption for p in prompts] == ["a\u2028b\x0cc\x85d", "two", "three"]


def test_a_list_that_is_not_utf8_is_named(make_settings: SettingsMaker, tmp_path: Path) -> None:
    """A traceback, or captions of other letters, for a list that an editor saved as UTF-16."""
    for encoding in ("utf-16", "latin-1"):
        (tmp_path / "list.TXT").write_text("a ü", encoding=encoding)
        with pytest.raises(ValueError, match=r"^data: .*list\.TXT .*; save it as UTF-8"):
            read_prompts(make_settings(data=str(tmp_path / "list.TXT")))


def test_a_folder_may_be_called_like_a_list(make_settings: SettingsMaker, tmp_path: Path) -> None:
    """A folder of pairs that is opened as a file for its name."""
    shutil.copytree(tmp_path / "pairs", tmp_path / "set.txt")
    settings = make_settings(data=str(tmp_path / "set.txt"))
    assert len(read_prompts(settings)) == 5 and true_images(settings, 8) is not None

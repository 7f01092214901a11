"""The table of families: what each says of itself, and which one files are of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dalle1.published import table
from dalle1.published.parts import Family
from dalle1.published.table import families, find_family
from tests.published import fakes

ROOT = Path(__file__).parents[2]


def test_every_reader_is_in_the_table() -> None:
    """A reader that no KIND leads to, or a KIND that two readers claim."""
    own = {"__init__", "parts", "table", "sources", "gathering", "importing", "tokenizers"}
    modules = {p.stem for p in (ROOT / "dalle1" / "published").glob("*.py")} - own
    readers = {m for m in modules if "Family(" in (ROOT / f"dalle1/published/{m}.py").read_text()}
    assert readers <= set(table.READERS)
    found = families()
    assert all(name == family.name for name, family in found.items())
    assert len({family.read for family in found.values()}) == len(found)


@pytest.mark.parametrize("family", families().values(), ids=lambda family: family.name)
def test_what_a_family_says_of_itself(family: Family, tmp_path: Path) -> None:
    """A license that is missing in the card; a reader that takes any folder for its own, or that
    ends in a traceback where there is nothing."""
    assert family.title and family.origin and family.license
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.bin").write_text("no weights at all")
    (tmp_path / "nothing.ckpt").touch()
    for path in (tmp_path, tmp_path / "empty", tmp_path / "text.bin", tmp_path / "nothing.ckpt"):
        assert not family.recognizes(path)
        with pytest.raises(ValueError):
            family.read(path)


@pytest.mark.usefixtures("fake_family")
def test_no_family_or_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess where two are possible; an error that does not say which there are."""
    with pytest.raises(ValueError, match=r"KIND: expected one of dvae, .*fake, got 'fakes'"):
        find_family(tmp_path, "fakes")
    with pytest.raises(ValueError, match=r"looks like none of the families: dvae \(OpenAI"):
        find_family(tmp_path)
    (tmp_path / fakes.FILES.prior).touch()
    assert find_family(tmp_path) is find_family(tmp_path, "fake") is fakes.FAMILY
    both = {**table.families(), "twin": replace(fakes.FAMILY, name="twin")}
    monkeypatch.setattr(table, "families", lambda: both)
    with pytest.raises(ValueError, match="may be of several families; say which: fake or twin"):
        find_family(tmp_path)

"""docs/config.md, the page of all settings, and the files of settings in configs/."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import BaseModel, Field, StringConstraints

from dalle1.commands import main as cli
from dalle1.commands import settings
from dalle1.commands.settings import ROOTS, page, sections, table
from dalle1.common.config import Section, load_settings
from dalle1.data.precompute.encode import TokenizeSettings
from dalle1.evaluation.config import CopySettings, RankSettings, RetrievalSettings
from dalle1.training.config import RunConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
KINDS: dict[str, type[Section]] = {
    **dict.fromkeys(("rank", "coco", "cub", "completion"), RankSettings),
    "copies": CopySettings,
    "retrieval": RetrievalSettings,
    "tokens": TokenizeSettings,
}
CLASSES = [(path, kind) for root in ROOTS for path, kind in sections(root.kind)]


class Part(Section):
    """A part
    of it.

    More about it.
    """

    renamed: ClassVar = {"most": "limit", "top": "limit"}

    limit: float | None = Field(1e-3, gt=0, le=1, description="a | b")
    sizes: list[int] = Field([1, 2], min_length=1, description="of all")
    counts: tuple[Annotated[int, Field(ge=1)], ...] = Field((1,), max_length=9, description="many")


class All(Section):
    """All."""

    renamed: ClassVar = {"piece": "part"}

    kind: Literal["a", "b"] = Field(description="which")
    pair: tuple[float, float] = Field((0, 1), description="two")
    width: int = Field(4, multiple_of=4, description="width")
    part: Part | str | None = Field(None, description="some")
    on: bool = Field(True, description="whether")
    text: str = Field("txt", description="key")


def test_a_table_says_what_the_fields_say() -> None:
    """A bound, a default, a choice or a former name that the page leaves out or shows as another;
    a description that breaks the row."""
    assert table(All).splitlines()[2:] == [
        "| `kind` | one of `a`, `b` | needed |  | which |",
        "| `pair` | list of 2 numbers | `[0, 1]` |  | two |",
        "| `width` | whole number | `4` | multiple of 4 | width |",
        "| `part` | [section](#part), text or null | `null` |  | some; was called `piece` |",
        "| `on` | true or false | `true` |  | whether |",
        "| `text` | text | `txt` |  | key |",
    ]
    assert [path for path, _ in sections(All)] == ["", "part"]
    assert table(Part, "part").splitlines()[2:] == [
        "| `part.limit` | number or null | `0.001` | > 0, ≤ 1 | "
        r"a \| b; was called `part.most`; was called `part.top` |",
        "| `part.sizes` | list of whole numbers | `[1, 2]` | length ≥ 1 | of all |",
        "| `part.counts` | list, each whole number | `[1]` | length ≤ 9 | many |",
    ]


def test_a_bound_without_words_is_refused() -> None:
    """A rule that the page silently leaves out."""

    class Odd(BaseModel):
        name: Annotated[str, StringConstraints(pattern="a+")] = Field("a", description="name")

    with pytest.raises(TypeError, match=r"settings: expected one of gt, .* got "):
        table(Odd)


@pytest.mark.parametrize(("path", "kind"), CLASSES, ids=lambda value: str(value))
def test_every_setting_is_described(path: str, kind: type[BaseModel]) -> None:
    """A setting that nobody explains."""
    assert (kind.__doc__ or "").strip()
    missing = [name for name, field in kind.model_fields.items() if not field.description]
    assert missing == []


@pytest.mark.parametrize(("path", "kind"), CLASSES, ids=lambda value: str(value))
def test_former_names_lead_to_settings(path: str, kind: type[BaseModel]) -> None:
    """A former name that leads nowhere, or that is a setting of its own again."""
    renamed: dict[str, str] = getattr(kind, "renamed", {})
    assert set(renamed.values()) <= kind.model_fields.keys()
    assert not renamed.keys() & kind.model_fields.keys()


def test_the_page_is_up_to_date() -> None:
    """Settings that were changed without `dalle1 settings --write`."""
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == page()


def test_settings_are_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--write that writes elsewhere or other text, or a traceback outside of a checkout."""
    assert cli.main(["settings"]) == 0
    assert capsys.readouterr().out == page()
    written = tmp_path / "docs" / "config.md"
    monkeypatch.setattr(settings, "PAGE", written)
    assert cli.main(["settings", "--write"]) == 2
    assert capsys.readouterr().err.startswith("error: --write: expected a checkout")
    written.parent.mkdir()
    assert cli.main(["settings", "--write"]) == 0
    assert written.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configs_use_the_names_of_today(path: Path) -> None:
    """An example that stops working when the former names go, and warns until then."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        load_settings(KINDS.get(path.stem, RunConfig), path)

"""Settings from files and overrides, and names that were renamed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field

from dalle1.common.config import Location, Section, differences, load_settings, save_settings


class Inner(Section):
    renamed: ClassVar = {"most": "limit"}

    limit: int = 1
    other: int = 2


class Outer(Section):
    renamed: ClassVar = {"optimiser": "optimizer", "old": "new"}

    optimizer: Inner = Inner()
    new: int = 0
    perhaps: Inner | None = None


class Part(Section):
    share: float = 0.5
    name: str | None = None


class Texts(Section):
    """One setting of each type that holds texts, and some that hold none."""

    renamed: ClassVar = {"former": "text"}

    text: str = "t"
    perhaps: str | None = "t"
    either: Part | Location | None = None
    texts: list[str] | None = None
    word: Literal["off", "on", "1e3"] = "on"
    word_or_none: Literal["no"] | None = None
    part: Part = Part()
    place: Location = "here"
    place_or_none: Location | None = None
    count: int | None = Field(1, ge=1)
    flag: bool = False
    numbers: list[float] = [1.0]  # noqa: RUF012


def load(tmp_path: Path, text: str, *overrides: str) -> Outer:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return load_settings(Outer, path, overrides)


def load_texts(tmp_path: Path, text: str, *overrides: str) -> Texts:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return load_settings(Texts, path, overrides)


@pytest.mark.parametrize(
    ("text", "overrides", "named"),
    [
        ("optimiser: {most: 5}\nold: 3", (), ["optimiser", "most", "old"]),
        ("optimizer: {limit: 4, other: 7}", ("optimiser.most=5", "old=3"), ["optimiser", "most"]),
        ("optimiser: {limit: 5}", ("new=3",), ["optimiser"]),
        ("new: 3\nperhaps: {most: 1}", ("optimizer.most=5",), ["most"]),
    ],
)
def test_former_names_work_and_warn(
    tmp_path: Path, text: str, overrides: tuple[str, ...], named: list[str]
) -> None:
    """A config of the release before that is refused, or read as if the setting were not there;
    a file's section that an override under the former name replaces."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = load(tmp_path, text, *overrides)
    assert (found.optimizer.limit, found.new) == (5, 3)
    assert found.optimizer.other == (7 if "other" in text else 2)
    messages = [str(w.message) for w in caught if issubclass(w.category, FutureWarning)]
    for name in named:
        assert any(f"setting {name!r} is called" in message for message in messages)


def test_former_names_as_keywords() -> None:
    """Settings made in Python under a former name, which pydantic alone would refuse."""
    with pytest.warns(FutureWarning, match="'most' is called 'limit'"):
        assert Outer(optimizer={"most": 9}).optimizer.limit == 9  # type: ignore[arg-type]


def test_both_names_are_refused(tmp_path: Path) -> None:
    """One of two values taken in silence."""
    with pytest.raises(ValueError, match="optimiser: this setting is called optimizer now"):
        load(tmp_path, "optimiser: {}\noptimizer: {}")


def test_new_names_do_not_warn(tmp_path: Path) -> None:
    """A warning at every start, which nobody reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path, "optimizer: {limit: 5}", "new=3", "perhaps.limit=2")


def test_an_override_replaces_what_it_names(tmp_path: Path) -> None:
    """`section={}` that keeps what the file says of the section."""
    assert load(tmp_path, "optimizer: {limit: 5}", "optimizer={}").optimizer.limit == 1
    with pytest.raises(ValueError, match="new is no section"):
        load(tmp_path, "new: 3", "new.limit=2")


def test_differences() -> None:
    """A setting that only one side has overlooked, or told under a name that nobody can set."""
    old, new = {"a": 1, "b": 2, "gone": 3}, {"b": 2.5, "a": 1, "new": None, "c": "x"}
    assert differences(old, new, {"b": "bee"}) == [
        "bee was 2 and is 2.5",
        "c was None and is 'x'",
        "gone was 3 and is None",
    ]
    assert differences(old, dict(old)) == []


TYPED = [
    "/mnt/set #1/{0..9}.tar",
    "pipe:curl -H 'Range: bytes=0-' http://x/{0..3}.tar",
    "a: b",
    "b:",
    "2024-11-25",
    "2024-13-45",
    "2024-11-25 10:00:00",
    "12:30:45",
    "007",
    "1e3",
    "1_000",
    "0x1F",
    ".inf",
    "nan",
    "yes",
    "no",
    "off",
    "True",
    "[a]",
    "[a, b]: c",
    "{a,b}",
    "{a,b}/{0..3}.tar",
    "x/{a,b}",
    "{a",
    "- a",
    "? a",
    "!tag a",
    "&a b",
    "*a",
    "@a",
    "%a",
    "'a'",
    '"a" b',
    "a\\b",
    " a ",
    "a=b",
    "~x",
    "| a",
    "> a",
    "ü",
]


@pytest.mark.filterwarnings("ignore:setting 'former'")
@pytest.mark.parametrize("text", TYPED)
def test_a_text_stays_as_it_is_typed(tmp_path: Path, text: str) -> None:
    """`data=/mnt/set #1/x.tar` read as `/mnt/set`, a `: ` as a dictionary, a run's date refused,
    `run=007` as another folder."""
    for key in ("text", "former", "perhaps", "either", "part.name", "place", "place_or_none"):
        found: Any = load_texts(tmp_path, "{}", f"{key}={text}")
        for name in key.replace("former", "text").split("."):
            found = getattr(found, name)
        assert found == text, key


def test_null_means_none_where_there_may_be_none(tmp_path: Path) -> None:
    """A folder called `null` in place of no value, or no value where a text is asked for."""
    keys = ("perhaps", "either", "part.name", "place_or_none", "texts", "word_or_none", "count")
    found = load_texts(tmp_path, "place_or_none: x", *(f"{key}=null" for key in keys))
    assert (found.perhaps, found.either, found.part.name, found.place_or_none) == (None,) * 4
    assert (found.texts, found.word_or_none, found.count) == (None,) * 3
    assert load_texts(tmp_path, "{}", "text=null", "place=null").place == "null"
    found = load_texts(tmp_path, "perhaps: null\neither: ~\nplace_or_none:")
    assert (found.perhaps, found.either, found.place_or_none) == (None,) * 3


def test_other_types_are_typed_as_yaml(tmp_path: Path) -> None:
    """Numbers, truth values, lists and sections that the rule for texts turns into texts."""
    found = load_texts(
        tmp_path,
        "either: a/b",
        *("count=1e2", "flag=yes", "numbers=[1, 2e-1]", "texts=[layers.3, 007, yes, 2024-11-25]"),
        *("part={share: 1e-2, name: 2024-11-25}", "either={share: 0.25}", "word=off"),
    )
    assert (found.count, found.flag, found.numbers) == (100, True, [1, 0.2])
    assert found.texts == ["layers.3", "007", "yes", "2024-11-25"]
    assert found.part == Part(share=0.01, name="2024-11-25") and found.word == "off"
    assert found.either == Part(share=0.25)
    assert load_texts(tmp_path, "{}", "word=1e3").word == "1e3"
    assert load_texts(tmp_path, "{}", "word_or_none=no", "word='on'").word_or_none == "no"
    found = load_texts(tmp_path, "{}", "either={}", "part={}", "part.share=.5", "count=007")
    assert (found.either, found.part, found.count) == (Part(), Part(), 7)
    for wrong in ("either={shape: 1}", "texts=a", "texts=[a", "texts={a: b}", "count=2024-11-25"):
        with pytest.raises(ValueError, match=wrong.partition("=")[0]):
            load_texts(tmp_path, "{}", wrong)
    for minutes in ({"overrides": "count=1:30"}, {"file": "count: 1:30"}):  # 90 to YAML 1.1
        with pytest.raises(ValueError, match=r"count: .*\(got '1:30'\)"):
            load_texts(tmp_path, minutes.get("file", "{}"), *minutes.get("overrides", "").split())


@pytest.mark.filterwarnings("ignore:setting 'former'")
@pytest.mark.parametrize(
    "text", ["2024-11-25", "2024-13-45", "007", "1e3", "1.50", "yes", "off", "12:30:45", "0x1F"]
)
def test_a_text_of_a_file_stays_as_it_is_written(tmp_path: Path, text: str) -> None:
    """`run: 2024-11-25` refused as a date, and `run: 007` read as 7; the same with quotes."""
    for written in (text, f"'{text}'", f"{text}  # said"):
        keys = ("former", "perhaps", "either", "place", "place_or_none")
        lines = [f"{key}: {written}" for key in keys]
        lines += [f"texts:\n- {written}", f"part:\n  name: {written}"]
        found = load_texts(tmp_path, "\n".join(lines))
        assert (found.text, found.perhaps, found.either) == (text, text, text)
        assert (found.place, found.place_or_none, found.texts) == (text, text, [text])
        assert found.part.name == text
        save_settings(found, tmp_path / "saved.yaml")
        assert load_settings(Texts, tmp_path / "saved.yaml") == found
    assert load_texts(tmp_path, "word: off").word == "off"
    (tmp_path / "007").write_text("text: 1_0\ncount: 7\nextends: 1.0", encoding="utf-8")
    (tmp_path / "1.0").write_text("perhaps: 2_0\ncount: 5", encoding="utf-8")
    found = load_texts(tmp_path, "extends: 007\nplace: 3_0")
    assert (found.text, found.perhaps, found.place, found.count) == ("1_0", "2_0", "3_0", 7)


@pytest.mark.parametrize("text", ["text: {a: b}", "text: [a, b]", "place:", "text: null"])
def test_what_is_no_text_in_a_file_asks_for_quotes(tmp_path: Path, text: str) -> None:
    """A refusal that does not say how to write the text; several lines for one mistake."""
    with pytest.raises(ValueError, match=r"settings\.yaml: (text|place): .*quote") as caught:
        load_texts(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_file_that_windows_saved(tmp_path: Path) -> None:
    """U+FEFF in front of the first key; a traceback for a file that is not UTF-8."""
    for text in ("\ufefftext: ü\r\ncount: 3\r\n", "\ufeff# said\ntext: ü\ncount: 3"):
        found = load_texts(tmp_path, text)
        assert (found.text, found.count) == ("ü", 3)
    (tmp_path / "parent.yaml").write_text("\ufeffcount: 4", encoding="utf-8")
    assert load_texts(tmp_path, "\ufeffextends: parent.yaml\ntext: a").count == 4
    for encoding in ("utf-16", "latin-1"):
        (tmp_path / "x.yaml").write_text("text: ü", encoding=encoding)
        with pytest.raises(ValueError, match=r"x\.yaml: not valid YAML in UTF-8") as caught:
            load_settings(Texts, tmp_path / "x.yaml")
        assert "\n" not in str(caught.value)


def test_a_tilde_in_a_setting_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run=~/out` that makes a folder called `~`; a `~` in a text that is no path, expanded."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "settings.yaml").write_text("place: ~/a\neither: ~/b", encoding="utf-8")
    (tmp_path / "child.yaml").write_text("extends: ~/settings.yaml\ntext: ~/c", encoding="utf-8")
    found = load_settings(Texts, "~/child.yaml", ["place_or_none=~/{0..3}.tar"])
    assert (found.place, found.either) == (f"{tmp_path}/a", f"{tmp_path}/b")
    assert (found.place_or_none, found.text) == (f"{tmp_path}/{{0..3}}.tar", "~/c")
    assert Texts(place="~/x", either="~").either == str(tmp_path)
    assert load_texts(tmp_path, "{}", "place=~", "either=a/~").either == "a/~"


def test_a_path_is_not_empty(tmp_path: Path) -> None:
    """`run=$RUN` with a variable that is not set, which would write into the working folder."""
    for key in ("place", "place_or_none", "either"):
        with pytest.raises(ValueError, match=f"{key}.*expected a path"):
            load_texts(tmp_path, "{}", f"{key}=")
    assert load_texts(tmp_path, "{}", "text=", "perhaps=").perhaps == ""

"""Settings from files and overrides, and names that were renamed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import ClassVar

import pytest

from dalle1.common.config import Section, differences, load_settings


class Inner(Section):
    renamed: ClassVar = {"most": "limit"}

    limit: int = 1
    other: int = 2


class Outer(Section):
    renamed: ClassVar = {"optimiser": "optimizer", "old": "new"}

    optimizer: Inner = Inner()
    new: int = 0
    perhaps: Inner | None = None


def load(tmp_path: Path, text: str, *overrides: str) -> Outer:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return load_settings(Outer, path, overrides)


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

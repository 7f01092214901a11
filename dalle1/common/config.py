"""Settings from YAML files: all of them read, none unknown.

`load_settings` reads a file, lays `key=value` overrides over it and checks the whole before
anything is built. `extends: other.yaml` starts from another file.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from dalle1.common.files import write_text

SHAPES = "shapes"  # the value of `data` that stands for the built-in data set


class Section(BaseModel):
    """A part of a file of settings; an unknown key is an error.

    `renamed` holds settings that were called otherwise in the release before: old names still work
    and warn, in files, in overrides and as keyword arguments.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    renamed: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _new_names(cls, values: Any) -> Any:
        return with_new_names(cls, cls.upgraded(values)) if isinstance(values, dict) else values

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Settings, under former names still, with what the release before left unsaid."""
        return values


S = TypeVar("S", bound=Section)


def with_new_names(kind: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a section under the names of today, those of its own sections included.

    Warns of each former name; ValueError where a setting is given under both.
    """
    result: dict[str, Any] = {}
    for name, value in values.items():
        new = kind.renamed.get(name, name)
        if new in result or (new != name and new in values):
            raise ValueError(f"{name}: this setting is called {new} now, and both are given")
        if new != name:
            warnings.warn(
                f"setting {name!r} is called {new!r} now; the former name works for one more "
                "release",
                FutureWarning,
                stacklevel=2,
            )
        section = _section(kind, new)
        nested = section is not None and isinstance(value, dict)
        result[new] = with_new_names(section, value) if section and nested else value
    return result


def _section(kind: type[Section], name: str) -> type[Section] | None:
    """The class of a setting that is a section itself, or may be one."""
    field = kind.model_fields.get(name)
    if field is None:
        return None
    choices = (field.annotation, *get_args(field.annotation))
    return next((c for c in choices if isinstance(c, type) and issubclass(c, Section)), None)


def load_settings(kind: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """The settings of a YAML file with overrides such as `optimizer.learning_rate=1e-3`.

    Raises ValueError that names the file and each setting that is unknown, missing or wrong.
    """
    content = _read(Path(path), kind)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r}: expected key=value")
        _lay(content, kind, key.split("."), _value(text), override)
    try:
        return kind(**content)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}"
            + (f" (got {e['input']!r})" if e["type"] != "missing" and e["loc"] else "")
            for e in error.errors()
        ]
        raise ValueError(f"{path}:\n" + "\n".join(lines)) from error


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> list[str]:
    """What differs between two sets of settings, a text such as "grid was 8 and is 4" for each.

    Args:
        old: a missing setting counts as None.
        new: the same. Its settings come first, in their order.
        names: what to call some settings in the texts.
    """
    called = names or {}
    return [
        f"{called.get(name, name)} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in dict.fromkeys([*new, *old])
        if old.get(name) != new.get(name)
    ]


def save_settings(settings: Section, path: Path) -> None:
    """Writes the resolved settings, defaults included, so that `load_settings` reads them back."""
    # None is left out where it is the default, as it is of a section that was not given.
    defaults = {name: field.default for name, field in type(settings).model_fields.items()}
    content = {
        name: value
        for name, value in settings.model_dump(mode="json").items()
        if value is not None or defaults[name] is not None
    }
    write_text(path, yaml.safe_dump(content, sort_keys=False))


def _read(path: Path, kind: type[Section]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"config {path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config {path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {path}: expected settings as 'key: value'")
    parent = content.pop("extends", None)
    try:
        content = with_new_names(kind, kind.upgraded(content))
    except ValueError as error:
        raise ValueError(f"config {path}: {error}") from error
    return content if parent is None else _merged(_read(path.parent / parent, kind), content)


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def _lay(
    content: dict[str, Any], kind: type[Section], keys: list[str], value: Any, override: str
) -> None:
    """Puts a value where the keys lead, in place of all that is there."""
    named: Any = value
    for key in reversed(keys):
        named = {key: named}
    named = with_new_names(kind, named)
    *sections, last = [_step(named, depth) for depth in range(len(keys))]
    for key in sections:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise ValueError(f"override {override!r}: {key} is no section")
    content[last] = value


def _step(nested: dict[str, Any], depth: int) -> str:
    """The key at a depth of {a: {b: {c: ...}}}."""
    for _ in range(depth):
        (nested,) = nested.values()
    return next(iter(nested))


def _value(text: str) -> Any:
    for number in (int, float):  # YAML 1.1 reads 1e-3 as a string
        try:
            return number(text)
        except ValueError:
            pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # a brace pattern such as path/{0000..0009}.tar

"""Settings from YAML files: all of them read, none unknown.

`load_settings` reads a file, lays `key=value` overrides over it and checks the whole before
anything is built. `extends: other.yaml` starts from another file. A file is given by its path, or
by the name of one that comes with the library (`dalle1.configs`).

A setting of text is what was written, whatever YAML makes of it: `run=2024-11-25` is no date, and
`data=a #1/{0..9}.tar` has no comment.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from dalle1 import configs
from dalle1.common.files import expand_home, read_text, write_text

SHAPES = "shapes"  # the value of `data` that stands for the built-in data set


def _located(path: str) -> str:
    if not path:
        raise ValueError("expected a path, got an empty text")
    return expand_home(path)


LOCATED = AfterValidator(_located)
# A setting that is a path or an address. A `~` in front is the home folder.
Location = Annotated[str, LOCATED]


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


def choices(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, without what annotates them; of any other type, itself."""
    if get_origin(annotation) is Annotated:
        return choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(c for part in get_args(annotation) for c in choices(part))
    return (annotation,)


def _section(kind: type[Section], name: str) -> type[Section] | None:
    """The class of a setting that is a section itself, or may be one."""
    field = kind.model_fields.get(name)
    return _types(field.annotation).section if field else None


class _Types(NamedTuple):
    """What a setting may be."""

    section: type[Section] | None
    text: bool
    texts: bool  # a list of them
    words: tuple[Any, ...]  # of a Literal
    none: bool


def _types(annotation: Any) -> _Types:
    kinds = choices(annotation)
    sections = [c for c in kinds if isinstance(c, type) and issubclass(c, Section)]
    words = [word for c in kinds if get_origin(c) is Literal for word in get_args(c)]
    texts = any(get_origin(c) is list and str in choices(*get_args(c)) for c in kinds)
    first = sections[0] if sections else None
    return _Types(first, str in kinds, texts, tuple(words), NoneType in kinds)


def load_settings(kind: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """The settings of a YAML file with overrides such as `optimizer.learning_rate=1e-3`.

    path: of the file, or a name such as shapes/dvae; see `dalle1.configs.find`.
    Raises ValueError that names the file and each setting that is unknown, missing or wrong.
    """
    content = _read(configs.find(expand_home(path)), kind)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r}: expected key=value")
        _lay(content, kind, key.split("."), text, override)
    try:
        return kind(**content)
    except ValidationError as error:
        lines = [
            f"{_name(e['loc'])}: {e['msg']}"
            + (f" (got {e['input']!r})" if e["type"] != "missing" and e["loc"] else "")
            + ("; in YAML, quote what is a text" if e["type"] == "string_type" else "")
            for e in error.errors()
        ]
        between = "\n  " if len(lines) > 1 else " "
        raise ValueError(f"{path}:" + "".join(between + line for line in lines)) from error


def _name(place: Sequence[int | str]) -> str:
    """A setting's name of pydantic's, which also tells the functions that check it."""
    parts = [str(part) for part in place if not str(part).startswith("function-")]
    return ".".join(parts) or "settings"


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
        text = read_text(path)
        content = yaml.load(text, _Loader)
        written = yaml.load(text, yaml.BaseLoader)
    except OSError as error:
        raise ValueError(f"config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"config {path}: not valid YAML in UTF-8: {why}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {path}: expected settings as 'key: value'")
    parent = written["extends"] if content.pop("extends", None) is not None else None
    content = _as_written(kind, content, written)
    try:
        content = with_new_names(kind, kind.upgraded(content))
    except ValueError as error:
        raise ValueError(f"config {path}: {error}") from error
    if parent is None:
        return content
    try:
        base = configs.find(expand_home(parent), beside=path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: extends: {error}") from error
    return _merged(_read(base, kind), content)


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def _lay(
    content: dict[str, Any], kind: type[Section], keys: list[str], text: str, override: str
) -> None:
    """Puts what was typed where the keys lead, in place of all that is there."""
    value = _typed(_annotation(kind, keys), text)
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


def _annotation(kind: type[Section], keys: Sequence[str]) -> Any:
    """The type of a setting, under its name of today or a former one; Any where there is none."""
    *sections, last = keys
    for key in sections:
        found = _section(kind, kind.renamed.get(key, key))
        if found is None:
            return Any
        kind = found
    field = kind.model_fields.get(kind.renamed.get(last, last))
    return field.annotation if field else Any


def _typed(annotation: Any, text: str) -> Any:
    """The value of a setting that was typed: text as it is, all else as YAML."""
    types = _types(annotation)
    if text == "null" and types.none:
        return None
    if text in types.words or (types.text and not (types.section and _is_mapping(text))):
        return text
    value = _value(text)
    try:
        return _as_written(annotation, value, yaml.load(text, yaml.BaseLoader))
    except yaml.YAMLError:
        return value


def _is_mapping(text: str) -> bool:
    """Whether what was typed is a section, as `{dropout: 0}` and `{}` are and `{a,b}` is not."""
    value = _value(text) if text[:1] == "{" else None
    return isinstance(value, dict) and all(inner is not None for inner in value.values())


def _value(text: str) -> Any:
    for number in (int, float):  # YAML 1.1 reads 1e-3 as a string
        try:
            return number(text)
        except ValueError:
            pass
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        return text


class _Loader(yaml.SafeLoader):
    """YAML without dates, which no setting is."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _as_written(annotation: Any, value: Any, written: Any) -> Any:
    """A value of YAML, with what was written where a text is asked for and YAML has made a number
    or a truth value of it.

    Args:
        annotation: type of the setting.
        value: as YAML has it.
        written: the same, each scalar a text.
    """
    types = _types(annotation)
    if isinstance(value, dict) and isinstance(written, dict) and types.section:
        kind = types.section
        return {
            key: _as_written(_annotation(kind, [str(key)]), inner, written.get(key))
            for key, inner in value.items()
        }
    if isinstance(value, list) and isinstance(written, list) and types.texts:
        return [_as_written(str, *pair) for pair in zip(value, written, strict=True)]
    if not isinstance(value, (bool, int, float)) or not isinstance(written, str):
        return value
    # To YAML 1.1, 1:30 is the number 90, which nobody means.
    return written if types.text or written in types.words or ":" in written else value

"""Settings from YAML files: all of them read, none unknown.

`load_settings` reads a file, lays `key=value` overrides over it and checks the whole before
anything is built. `extends: other.yaml` starts from another file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from dalle1.common.files import write_text

SHAPES = "shapes"  # the value of `data` that stands for the built-in data set


class Section(BaseModel):
    """A part of a file of settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Section)


def load_settings(kind: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """The settings of a YAML file with overrides such as `optimiser.learning_rate=1e-3`.

    Raises ValueError that names the file and each setting that is unknown, missing or wrong.
    """
    content = _read(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r}: expected key=value")
        _lay(content, key.split("."), _value(text), override)
    try:
        return kind(**content)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}"
            + (f" (got {e['input']!r})" if e["type"] != "missing" and e["loc"] else "")
            for e in error.errors()
        ]
        raise ValueError(f"{path}:\n" + "\n".join(lines)) from error


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


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"config {path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config {path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {path}: expected settings as 'key: value'")
    parent = content.pop("extends", None)
    return content if parent is None else _merged(_read(path.parent / parent), content)


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def _lay(content: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise ValueError(f"override {override!r}: {key} is no section")
    content[keys[-1]] = value


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

"""Where our docstrings and signatures are not what autodoc and napoleon expect."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel
from sphinx.application import Sphinx

BEFORE_NAPOLEON, AFTER_NAPOLEON = 400, 600  # priorities; napoleon has 500
ATTRIBUTES = ("attribute", "data", "property")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    plain: dict[str, list[str]] = {}

    def keep(app: Sphinx, what: str, name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
        if what in ATTRIBUTES:
            plain[name] = list(lines)

    def restore(
        app: Sphinx, what: str, name: str, _obj: Any, _options: Any, lines: list[str]
    ) -> None:
        lines[:] = plain.pop(name, lines)

    # Napoleon takes what stands before a colon in the docstring of a property for its type.
    app.connect("autodoc-process-docstring", keep, priority=BEFORE_NAPOLEON)
    app.connect("autodoc-process-docstring", restore, priority=AFTER_NAPOLEON)
    app.connect("autodoc-process-signature", plain_signature)
    return {"parallel_read_safe": True}


def plain_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str | None, str | None] | None:
    """Settings with their defaults, as types and bounds are on the page config.md; no signature of
    protocols, which are not made; `...` for defaults that are no value to read."""
    if what == "class" and issubclass(obj, BaseModel):
        fields = obj.model_fields.items()
        texts = (n if f.is_required() else f"{n}={_default(f)}" for n, f in fields)
        return f"({', '.join(texts)})", None
    if what == "class" and getattr(obj, "_is_protocol", False):
        return "", None
    return re.sub(r"<[^<>]*(<[^<>]*>)?[^<>]*>", "...", signature or "") or None, returns


def _default(field: Any) -> str:
    default = field.get_default(call_default_factory=True)
    return f"{type(default).__name__}()" if isinstance(default, BaseModel) else repr(default)

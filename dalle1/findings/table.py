"""The table of findings, by name; a finding's module is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from dalle1.findings.base import Finding

# Name: its module in this package, which holds it as FINDING. In the order of docs/findings.md.
MODULES: dict[str, str] = {
    "kl-weight": "kl_weight",
    "temperature": "temperature",
    "relaxation-kernel": "relaxation_kernel",
    "padding": "padding",
    "one-softmax": "one_softmax",
    "text-weight": "text_weight",
    "bpe": "bpe",
    "best-of-n": "best_of_n",
    "completion": "completion",
    "composition": "composition",
    "style-by-words": "style_by_words",
    "photographs": "photographs",
}


def find(name: str) -> Finding:
    """The finding of a name.

    Raises ValueError for a name that is not in the table.
    """
    if name not in MODULES:
        raise ValueError(f"NAME: expected {', '.join(MODULES)} or all, got {name!r}; see --list")
    finding: Finding = import_module(f"dalle1.findings.{MODULES[name]}").FINDING
    return finding


def all_findings() -> list[Finding]:
    """All of them, in the table's order."""
    return [find(name) for name in MODULES]

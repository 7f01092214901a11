"""The kinds of text tokenizers, and which one a file is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dalle1.text.bart import BARTTokenizer
from dalle1.text.base import kind_in
from dalle1.text.char_bpe import CharBPETokenizer
from dalle1.text.yttm import YTTMTokenizer
from dalle1.tokenizer import TOKENIZER, Tokenizer
from dvae.storage import CONFIG, read_config

# Classes with `save(path)` and `load(path)`: a tokenizer is one file. `registry` adds others.
TOKENIZERS: dict[str, Any] = {
    "bpe": Tokenizer,
    "yttm": YTTMTokenizer,
    "char_bpe": CharBPETokenizer,
    "bart": BARTTokenizer,
}


def kind_of_file(path: Path) -> str | None:
    """The kind of a tokenizer's file, as it says itself as "kind", or the `config.json` of a model
    folder around it; None where neither does.

    Raises ValueError where `config.json` cannot be read.
    """
    kind = kind_in(path)
    if kind is None and path.name == TOKENIZER and (path.parent / CONFIG).is_file():
        kind = (read_config(path.parent).get("tokenizer") or {}).get("kind")
    return kind

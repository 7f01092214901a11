"""The tokenizers of published models by the "kind" in their files."""

from __future__ import annotations

from dalle1.text.bart import BARTTokenizer
from dalle1.text.base import PublishedTokenizer
from dalle1.text.char_bpe import CharBPETokenizer
from dalle1.text.yttm import YTTMTokenizer

TOKENIZERS: dict[str, type[PublishedTokenizer]] = {
    "yttm": YTTMTokenizer,
    "char_bpe": CharBPETokenizer,
    "bart": BARTTokenizer,
}

"""Published tokenizers that are given apart from a prior, for its positions and its vocabulary:
what `--tokenizer` names. Those beside a prior's weights are read with it.

    bpe.model                                   YouTokenToMe's, of ruDALL-E
    bpe-16k-vocab.json  bpe-16k-merges.txt      characters with an end of word, of minDALL-E
    vocab.json  merges.txt, or tokenizer.json   bytes, of DALL-E mini; min-dalle has vocab_mini.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dalle1 import registry
from dalle1.common.files import read_text
from dalle1.published.parts import PublishedPart
from dalle1.text.bart import BARTTokenizer
from dalle1.text.char_bpe import WORD_END, CharBPETokenizer
from dalle1.text.kinds import kind_of_file
from dalle1.text.yttm import YTTMTokenizer

BPE_MODEL, FAST, WORDS = "bpe.model", "tokenizer.json", "enwiki-words-frequency.txt"
VOCABULARIES, MERGES = "*vocab*.json", "merges"
# Patterns of what may be a tokenizer's, in a folder or in its folder `tokenizer`.
FILES = (BPE_MODEL, VOCABULARIES, f"*{MERGES}*.txt", FAST, WORDS)
LARGEST_VOCABULARY = 2**26  # bytes


def find_tokenizer(folder: Path) -> Path:
    """The file in a folder, or in its folder `tokenizer`, that a tokenizer is read from.

    Raises ValueError where there is none, or where there are several.
    """
    for place in (folder, folder / "tokenizer"):
        held = [path for path in sorted(place.glob(VOCABULARIES)) if _merges(path).is_file()]
        held = held or [path for path in (place / FAST,) if path.is_file()]
        held += [path for path in (place / BPE_MODEL,) if path.is_file()]
        if len(held) == 1:
            return held[0]
        if held:
            names = ", ".join(path.name for path in held)
            raise ValueError(f"--tokenizer: {place}: expected one tokenizer, got {names}; name one")
    raise ValueError(
        f"--tokenizer: {folder} holds none: expected {BPE_MODEL}, vocab.json and merges.txt, or "
        f"{FAST}"
    )


def read_tokenizer(path: Path, prior: PublishedPart | None) -> Any:
    """The tokenizer of a file, ours or a published one. DALL-E mini's normalizes captions.

    path: of it; of a vocabulary whose merges lie beside it.
    prior: whose text positions and vocabulary a published one gets; None: those of its files.

    Raises ValueError where a file is missing or damaged, or has more tokens than the prior.
    """
    if (kind := _own_kind(path)) is not None:
        return registry.load_tokenizer(path, kind)
    sizes: dict[str, Any] = {}
    if prior is not None:
        config: Any = prior.config
        sizes = {"text_length": config.text_length, "vocab_size": config.text_vocab}
    if path.suffix != ".json":
        return YTTMTokenizer.from_published(path, **sizes)
    content = _content(path)
    if "bpe" in content:  # as `dalle1.Tokenizer` writes it
        return registry.load_tokenizer(path, "bpe")
    is_fast = isinstance(content.get("model"), dict)
    if not is_fast and any(isinstance(k, str) and k.endswith(WORD_END) for k in content):
        return CharBPETokenizer.from_published(path, _merges(path), **sizes)
    words = path.parent / WORDS
    return BARTTokenizer.from_published(
        path,
        None if is_fast else _merges(path),
        words=words if words.is_file() else None,
        **sizes,
    )


def _own_kind(path: Path) -> str | None:
    """The kind of a tokenizer's file of ours; None of others'."""
    try:
        return kind_of_file(path)
    except ValueError:  # the config.json beside it is somebody else's
        return None


def _merges(vocabulary: Path) -> Path:
    """The file of merges that belongs to a vocabulary's."""
    name = vocabulary.name.replace("vocab", MERGES).removesuffix(".json")
    return vocabulary.with_name(f"{name}.txt")


def _content(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > LARGEST_VOCABULARY:
            raise ValueError(f"expected a vocabulary, got {size:,} bytes")
        content = json.loads(read_text(path))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no vocabulary: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a vocabulary, got {type(content).__name__}")
    return content

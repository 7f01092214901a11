"""Finds the tokenizer among a published model's files, whatever they are called."""

from __future__ import annotations

from pathlib import Path

from dalle1.common.files import expand_home
from dalle1.text.bart import PADDING as BART_PADDING
from dalle1.text.bart import BARTTokenizer
from dalle1.text.base import PublishedTokenizer
from dalle1.text.char_bpe import PADDING as CHAR_BPE_PADDING
from dalle1.text.char_bpe import CharBPETokenizer
from dalle1.text.merges import read_fast, read_vocab
from dalle1.text.yttm import YTTMTokenizer

BPE_MODEL = "bpe.model"  # of ruDALL-E
FAST = "tokenizer.json"  # of DALL-E mini, instead of a pair
# Of minDALL-E; of DALL-E mini, DALL-E mega and min-dalle; of min-dalle's copy of mini.
PAIRS = (
    ("bpe-16k-vocab.json", "bpe-16k-merges.txt"),
    ("vocab.json", "merges.txt"),
    ("vocab_mini.json", "merges_mini.txt"),
)
FOLDER = "tokenizer"  # below minDALL-E's
WORDS = "enwiki-words-frequency.txt"  # beside DALL-E mini's weights


def find_tokenizer(
    path: str | Path, text_length: int, vocab_size: int | None = None, normalize: bool = True
) -> PublishedTokenizer | None:
    """The tokenizer of a file, or of the files in a folder or in its `tokenizer/`.

    A `vocab.json` goes with the merges beside it, and DALL-E mini's list of words is used where it
    lies there.

    Args:
        path: of a `bpe.model`, a vocabulary or a `tokenizer.json`; or of a folder with them. Where
            a folder has several, `bpe.model` is taken, then a pair in the order of PAIRS.
        text_length, vocab_size: of the prior.
        normalize: of DALL-E mini's settings, `normalize_text`.

    Returns:
        None where a folder holds none of these files.

    Raises:
        ValueError: a file is missing or damaged, or of a tokenizer that is none of these.
    """
    path = Path(expand_home(path))
    if path.is_dir():
        names = (BPE_MODEL, *(vocab for vocab, _ in PAIRS), FAST)
        places = [folder / name for folder in (path, path / FOLDER) for name in names]
        found = next((file for file in places if file.is_file()), None)
        return None if found is None else _open(found, text_length, vocab_size, normalize)
    return _open(path, text_length, vocab_size, normalize)


def _open(
    path: Path, text_length: int, vocab_size: int | None, normalize: bool
) -> PublishedTokenizer:
    if path.suffix != ".json":
        return YTTMTokenizer.from_published(path, text_length, vocab_size)
    merges = next((path.with_name(name) for vocab, name in PAIRS if vocab == path.name), None)
    tokens = read_fast(path)[0] if merges is None else read_vocab(path)
    if CHAR_BPE_PADDING in tokens and merges is not None:
        return CharBPETokenizer.from_published(path, merges, text_length, vocab_size)
    if BART_PADDING not in tokens:
        raise ValueError(
            f"{path}: expected {CHAR_BPE_PADDING!r} or {BART_PADDING!r} among the tokens, got the "
            "vocabulary of another model"
        )
    words = path.with_name(WORDS)
    return BARTTokenizer.from_published(
        path,
        merges,
        text_length,
        vocab_size,
        normalize=normalize,
        words=words if words.is_file() else None,
    )

"""The text tokenizer of a run: taken from a file, or learned from the captions (section 2.2).

It may be of any kind of `dalle1.registry`. What it must have is in `protocols.TextTokenizer`. The
run's folder keeps it in a file whose "kind" says which it is, or else it is of the kind that the
setting `tokenizer` points to.
"""

from __future__ import annotations

import hashlib
import tempfile
from datetime import timedelta
from pathlib import Path

from dalle1 import registry
from dalle1.clip.tokenizer import CLIP_TOKENIZER
from dalle1.common.files import expand_home
from dalle1.data.shards.index import read_captions
from dalle1.protocols import TextTokenizer
from dalle1.text.kinds import kind_of_file
from dalle1.tokenizer import TOKENIZER, Tokenizer
from dalle1.training import distributed
from dalle1.training.config import RunConfig


def run_tokenizer(config: RunConfig, vocab_size: int, text_length: int) -> TextTokenizer:
    """The tokenizer of a run, for so many text positions.

    The first rank takes it from where `config.tokenizer` points, or learns it from the training
    captions, and keeps it in the run's folder: what arrives later does not change the tokens.

    Raises ValueError, on all ranks, when there is none, its vocabulary is of another size, or it
    could not read any caption (its method `check_training`, where it has one).
    """
    path = Path(config.run) / TOKENIZER
    failure: Exception | None = None
    if distributed.rank() == 0:
        try:
            if path.exists():
                _check_same(config, path)
            else:
                _find(config, vocab_size, text_length).save(path)
        except (OSError, ValueError) as error:
            failure = error
    if distributed.world_size() > 1:
        distributed.make_barrier(timedelta(seconds=config.faults.save_timeout))()
    if distributed.any_rank(failure is not None):
        raise failure or ValueError("tokenizer: the first rank has none")
    tokenizer = _kept(config, path)
    _check_vocabulary(config, tokenizer, vocab_size)
    if hasattr(tokenizer, "check_training"):
        tokenizer.check_training()
    return _sized(tokenizer, text_length)


def open_tokenizer(path: str | Path) -> TextTokenizer:
    """The tokenizer of a file, or of the folder of a run or a model that holds one."""
    tokenizer: TextTokenizer = registry.load_tokenizer(_file(path))
    return tokenizer


def read_alike(one: TextTokenizer, other: TextTokenizer) -> bool:
    """Whether two tokenizers give every caption the same tokens.

    They are asked, where they can tell (`reads_like`). Others do if they are made of the same.
    """
    if type(one) is not type(other):
        return False
    if hasattr(one, "reads_like"):
        return bool(one.reads_like(other))
    return fingerprint_of(one) == fingerprint_of(other)


def fingerprint_of(tokenizer: TextTokenizer) -> str:
    """16 digits that are the same for the same tokens: the tokenizer's own (`fingerprint`), or
    those of the file that it writes."""
    if hasattr(tokenizer, "fingerprint"):
        return str(tokenizer.fingerprint())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / TOKENIZER
        tokenizer.save(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _file(path: str | Path) -> Path:
    """The tokenizer's file, of a file or of a folder that holds one."""
    path = Path(expand_home(path))
    if not path.is_dir():
        return path
    files = [path / name for name in (TOKENIZER, CLIP_TOKENIZER) if (path / name).is_file()]
    if not files:
        raise ValueError(
            f"tokenizer: the folder {path} holds no {TOKENIZER}; give a run that learned one, or a "
            "model folder"
        )
    return files[0]


def _kept(config: RunConfig, path: Path) -> TextTokenizer:
    """The tokenizer of the run's folder."""
    kind = kind_of_file(path)
    if kind is None and isinstance(config.tokenizer, str):
        try:
            kind = kind_of_file(_file(config.tokenizer))
        except ValueError:
            kind = None  # gone, and the run needs its own copy alone
    tokenizer: TextTokenizer = registry.load_tokenizer(path, kind)
    return tokenizer


def _find(config: RunConfig, vocab_size: int, text_length: int) -> TextTokenizer:
    settings, r = config.tokenizer, config.reader
    assert settings is not None
    tokenizer: TextTokenizer
    if isinstance(settings, str):
        tokenizer = open_tokenizer(settings)
    else:
        captions = read_captions(config.data, r.caption_key, settings.captions, r.caption_lines)
        tokenizer = Tokenizer.train(captions, vocab_size, text_length, settings.dropout)
    _check_vocabulary(config, tokenizer, vocab_size)
    return tokenizer


def _check_same(config: RunConfig, kept: Path) -> None:
    """Raises ValueError where the settings name a file that has changed since the run began."""
    if not isinstance(config.tokenizer, str):
        return
    try:
        given = open_tokenizer(config.tokenizer)
    except ValueError:
        return  # gone, and the run needs its own copy alone
    if not read_alike(given, _kept(config, kept)):
        raise ValueError(
            f"tokenizer: expected what the run began with, got another one in {config.tokenizer}; "
            f"set it to {kept}, or begin a new run (run=...)"
        )


def _check_vocabulary(config: RunConfig, tokenizer: TextTokenizer, vocab_size: int) -> None:
    if tokenizer.vocab_size == vocab_size:
        return
    given = isinstance(config.tokenizer, str)
    origin = f"{config.tokenizer} has" if given else "the captions give only"
    raise ValueError(
        f"tokenizer: {origin} {tokenizer.vocab_size} byte-pair tokens, and the model's text_vocab "
        f"asks for {vocab_size}: set text_vocab to {tokenizer.vocab_size} (for CLIP, 2 more)"
    )


def _sized(tokenizer: TextTokenizer, text_length: int) -> TextTokenizer:
    """The same tokens for so many text positions."""
    if tokenizer.text_length == text_length:
        return tokenizer
    if not hasattr(tokenizer, "resized"):
        raise ValueError(
            f"tokenizer: expected {text_length} text positions, as the model has, got "
            f"{tokenizer.text_length}; {type(tokenizer).__name__} has no other length"
        )
    resized: TextTokenizer = tokenizer.resized(text_length)
    return resized

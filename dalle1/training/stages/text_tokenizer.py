"""The text tokenizer of a run: taken from a file, or learned from the captions (section 2.2)."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from dalle1 import registry
from dalle1.clip.tokenizer import CLIP_TOKENIZER
from dalle1.common.files import expand_home
from dalle1.data.shards.index import read_captions
from dalle1.tokenizer import TOKENIZER, Tokenizer
from dalle1.training import distributed
from dalle1.training.config import RunConfig


def run_tokenizer(config: RunConfig, vocab_size: int, text_length: int) -> Tokenizer:
    """The tokenizer of a run, for so many text positions.

    The first rank takes it from where `config.tokenizer` points, or learns it from the training
    captions, and keeps it in the run's folder: what arrives later does not change the tokens.

    Raises ValueError, on all ranks, when there is none or its vocabulary is of another size.
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
    tokenizer = Tokenizer.load(path)
    _check_vocabulary(config, tokenizer, vocab_size)
    return tokenizer.resized(text_length)


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a file, or of the folder of a run or a model that holds one."""
    path = Path(expand_home(path))
    if path.is_dir():
        files = [path / name for name in (TOKENIZER, CLIP_TOKENIZER) if (path / name).is_file()]
        if not files:
            raise ValueError(
                f"tokenizer: the folder {path} holds no {TOKENIZER}; give a run that learned one, "
                "or a model folder"
            )
        path = files[0]
    tokenizer: Tokenizer = registry.load_tokenizer(path)
    return tokenizer


def _find(config: RunConfig, vocab_size: int, text_length: int) -> Tokenizer:
    settings, r = config.tokenizer, config.reader
    assert settings is not None
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
    if not given.reads_like(Tokenizer.load(kept)):
        raise ValueError(
            f"tokenizer: expected what the run began with, got another one in {config.tokenizer}; "
            f"set it to {kept}, or begin a new run (run=...)"
        )


def _check_vocabulary(config: RunConfig, tokenizer: Tokenizer, vocab_size: int) -> None:
    if tokenizer.vocab_size == vocab_size:
        return
    given = isinstance(config.tokenizer, str)
    origin = f"{config.tokenizer} has" if given else "the captions give only"
    raise ValueError(
        f"tokenizer: {origin} {tokenizer.vocab_size} byte-pair tokens, and the model's text_vocab "
        f"asks for {vocab_size}: set text_vocab to {tokenizer.vocab_size} (for CLIP, 2 more)"
    )

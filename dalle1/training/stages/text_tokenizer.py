"""The byte-pair vocabulary of the training captions (section 2.2)."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from dalle1.data.shards.index import read_captions
from dalle1.tokenizer import Tokenizer
from dalle1.training import distributed
from dalle1.training.config import RunConfig, TokenizerSettings

TOKENIZER = "tokenizer.json"  # in the run's folder, where the run learns one


def train_tokenizer(
    config: RunConfig, settings: TokenizerSettings, vocab_size: int, text_length: int
) -> Tokenizer:
    """The byte-pair vocabulary of the training captions: learned once, by the first rank, and kept
    in the run's folder, so that captions that arrive later do not change the tokens."""
    path, r = Path(config.run) / TOKENIZER, config.reader
    failure: Exception | None = None
    if distributed.rank() == 0 and not path.exists():
        try:
            captions = read_captions(config.data, r.caption_key, settings.captions, r.caption_lines)
            tokenizer = Tokenizer.train(captions, vocab_size, text_length, settings.dropout)
            _check_vocabulary(tokenizer, vocab_size)
            tokenizer.save(path)
        except (OSError, ValueError) as error:
            failure = error
    if distributed.world_size() > 1:
        distributed.make_barrier(timedelta(seconds=config.faults.save_timeout))()
    if distributed.any_rank(failure is not None):
        raise failure or ValueError("the first rank could not learn the tokenizer")
    tokenizer = Tokenizer.load(path)
    _check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def _check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"the captions give only {tokenizer.vocab_size} byte-pair tokens of the {vocab_size} "
            f"that the model's text_vocab asks for: set text_vocab to {tokenizer.vocab_size} "
            "(for CLIP, 2 more)"
        )

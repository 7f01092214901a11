"""DALL-E mini's tokenizer: its normalizer, then byte pairs over bytes as BART has them.

A caption is <s>, tokens, </s> and <pad>; one that is cut keeps the end. The files are `vocab.json`
and `merges.txt`, or `tokenizer.json`, of DALL-E mini, DALL-E mega and of min-dalle, which has the
same under names of its own. min-dalle reads captions otherwise: it has no normalizer, drops what is
not ASCII and cuts at spaces alone. The models were trained with the reading here.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers

from dalle1.common.files import expand_home
from dalle1.text.merges import (
    MergesFile,
    MergesTokenizer,
    made_of,
    read_fast,
    read_merges,
    read_vocab,
)
from dalle1.text.normalizer import Normalizer, packages, read_words

START, END, PADDING = "<s>", "</s>", "<pad>"


class BARTFile(MergesFile):
    """Tokens and merges of a byte-level BPE, and how captions are normalized."""

    kind: Literal["bart"] = "bart"
    normalize: bool = Field(description="whether captions go through DALL-E mini's normalizer")
    words: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, description="English words, frequent first"
    )


class BARTTokenizer(MergesTokenizer):
    """Captions as DALL-E mini and mega read them."""

    Content: ClassVar = BARTFile
    MARKS: ClassVar = (START, END, PADDING, "<unk>", "<mask>")
    keeps_end = True

    def __init__(self, content: BARTFile) -> None:
        super().__init__(content)
        self.start_id, self.end_id = self._mark(START), self._mark(END)
        self.padding = self._mark(PADDING)
        self._normalizer = Normalizer(content.words) if content.normalize else None

    @classmethod
    def from_published(
        cls,
        vocab: str | Path,
        merges: str | Path | None = None,
        text_length: int = 64,
        vocab_size: int | None = None,
        normalize: bool = True,
        words: str | Path | None = None,
        dropout: float = 0.0,
    ) -> BARTTokenizer:
        """Reads `vocab.json` and `merges.txt`, or a `tokenizer.json`.

        Args:
            vocab: of `vocab.json`, or of `tokenizer.json`.
            merges: of `merges.txt`; None for a `tokenizer.json`.
            text_length: text positions of the prior.
            vocab_size: its text tokens, 50264 in mini and 50272 in mega; None: as many as the
                files have.
            normalize: as `normalize_text` of the published settings.
            words: `enwiki-words-frequency.txt`, which hashtags are split by; None: they are not.
            dropout: share of merges that are skipped in training.

        Raises:
            ValueError: a file is missing or damaged, or they do not fit each other.
        """
        path = Path(expand_home(vocab))
        if merges is None:
            tokens, pairs = read_fast(path)
        else:
            tokens, pairs = read_vocab(path), read_merges(merges)
        content = made_of(
            BARTFile,
            path,
            vocab=tokens,
            merges=pairs,
            text_length=text_length,
            vocab_size=vocab_size,
            dropout=dropout,
            normalize=normalize,
            words=None if words is None else read_words(words),
        )
        assert isinstance(content, BARTFile)
        try:
            return cls(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def check_training(self) -> None:
        """Raises ValueError where the packages of the normalizer are missing: some caption would
        stop a run."""
        if self._normalizer is not None:
            packages("tokenizer: expected what normalizes all captions of the training data")

    def _read_as(self, caption: str, rng: random.Random | None) -> str:
        return caption if self._normalizer is None else self._normalizer(caption, rng)

    def _build(self, content: MergesFile) -> BPE:
        bpe = BPE(models.BPE(content.vocab, content.merges))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        return bpe

    def _parts(self, word: str) -> list[int]:
        # A byte that the vocabulary lacks is left out, as by the library.
        return [self._vocab[byte] for byte in word if byte in self._vocab]

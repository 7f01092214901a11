"""minDALL-E's tokenizer: byte pairs over characters, with a sign at a word's end.

A caption is cleaned of control characters, lower-cased, and cut at white space and around every
punctuation mark and Chinese character. A character that the vocabulary lacks is "[UNK]". There is
no start and no end: what follows a caption is one id of padding, "[PAD]".
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, normalizers, pre_tokenizers

from dalle1.common.files import expand_home
from dalle1.text.merges import MergesFile, MergesTokenizer, made_of, read_merges, read_vocab

WORD_END = "</w>"
UNKNOWN, PADDING = "[UNK]", "[PAD]"


class CharBPEFile(MergesFile):
    """Tokens and merges of a `CharBPETokenizer` of the `tokenizers` library."""

    kind: Literal["char_bpe"] = "char_bpe"


class CharBPETokenizer(MergesTokenizer):
    """Captions as minDALL-E reads them."""

    Content: ClassVar = CharBPEFile
    MARKS: ClassVar = (UNKNOWN, PADDING)
    has_end = False

    def __init__(self, content: CharBPEFile) -> None:
        super().__init__(content)
        self._unknown = self._mark(UNKNOWN)
        self.padding = self.end_id = self._mark(PADDING)

    @classmethod
    def from_published(
        cls,
        vocab: str | Path,
        merges: str | Path,
        text_length: int = 64,
        vocab_size: int | None = None,
        dropout: float = 0.0,
    ) -> CharBPETokenizer:
        """Reads `bpe-16k-vocab.json` and `bpe-16k-merges.txt`.

        Args:
            vocab, merges: of the files.
            text_length: text positions of the prior.
            vocab_size: its text tokens; None: as many as the vocabulary has.
            dropout: share of merges that are skipped in training; minDALL-E names none.

        Raises:
            ValueError: a file is missing or damaged, or they do not fit each other.
        """
        path = Path(expand_home(vocab))
        content = made_of(
            CharBPEFile,
            path,
            vocab=read_vocab(path),
            merges=read_merges(merges),
            text_length=text_length,
            vocab_size=vocab_size,
            dropout=dropout,
        )
        assert isinstance(content, CharBPEFile)
        try:
            return cls(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _build(self, content: MergesFile) -> BPE:
        model = models.BPE(
            content.vocab, content.merges, unk_token=UNKNOWN, end_of_word_suffix=WORD_END
        )
        bpe = BPE(model)
        # The first one would take accents off if it made lower case itself.
        clean = normalizers.BertNormalizer(lowercase=False)
        bpe.normalizer = normalizers.Sequence([clean, normalizers.Lowercase()])
        bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        bpe.decoder = decoders.BPEDecoder(suffix=WORD_END)
        return bpe

    def _parts(self, word: str) -> list[int]:
        letters = [*word[:-1], word[-1] + WORD_END]
        return [self._vocab.get(letter, self._unknown) for letter in letters]

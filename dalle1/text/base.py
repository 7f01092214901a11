"""What the tokenizers of other people's models share: marks, cutting, padding, one file each.

The ids that a prior takes are

    0 ... vocab_size - 1    the vocabulary of the published model, with marks and, where there is
                            one, the id of padding
    vocab_size + p          the padding of text position p, in models that pad by position

A prior may have more rows than the files have tokens; `vocab_size` is the prior's number.

Dimensions: b captions, t text positions.
"""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from dalle1.common.files import expand_home, write_text
from dalle1.protocols import CaptionCut
from dalle1.tokenizer import padding_id

# Letters of a caption that are read. A longer one would stop training for seconds, and the few
# positions that a model has are full long before.
LETTERS_READ = 2**16
# Bytes of a tokenizer's file, and of a published list of words, which have 30 and 34 million; of
# other published files, which have at most 2 million.
MAX_FILE, MAX_PUBLISHED = 2**26, 2**24
MAX_TEXT_LENGTH = 2**16

Self = TypeVar("Self", bound="PublishedTokenizer")


class TokenizerFile(BaseModel):
    """The content of a tokenizer's file; each kind adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: str
    text_length: int = Field(ge=4, le=MAX_TEXT_LENGTH, description="text positions")
    vocab_size: int = Field(ge=1, lt=2**31, description="text vocabulary of the prior")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of merges skipped in training")


class PublishedTokenizer(ABC):
    """A tokenizer of a published model, which `dalle1.protocols.TextTokenizer` describes.

    Attributes:
        start_id: in front of every caption; None where there is none.
        end_id: behind every caption; in models without an end, what a caption's end is told by.
        keeps_end: whether a caption that is cut keeps the end, in the last position.
        padding: the id of padding; None where each position has its own.
    """

    Content: ClassVar[type[TokenizerFile]]
    start_id: int | None = None
    end_id: int
    has_end: bool = True
    keeps_end: bool = False
    padding: int | None = None

    def __init__(self, content: TokenizerFile) -> None:
        self._content = content
        self.text_length, self.vocab_size = content.text_length, content.vocab_size
        self.dropout = content.dropout

    @abstractmethod
    def _ids(self, text: str, most: int, rng: random.Random | None) -> list[int]:
        """The ids of a text without marks; where there are more than `most`, at least so many.

        With `rng`, merges are dropped at random (BPE dropout, Provilkov et al. 2020).
        """

    @abstractmethod
    def _text(self, ids: Sequence[int]) -> str:
        """The text of ids without marks and padding."""

    def _read_as(self, caption: str, rng: random.Random | None) -> str:
        """A caption as it is before it becomes ids, such as in lower case."""
        return caption

    def _caption_ids(self, caption: str, most: int, rng: random.Random | None) -> list[int]:
        """The ids of a caption without marks, see `_ids`; ValueError for an empty one."""
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"caption: expected text, got {caption!r}")
        if len(caption) > LETTERS_READ:
            caption = caption.strip()[:LETTERS_READ]
        if not caption.isascii():  # half of a surrogate pair is no character, and left out
            caption = caption.encode("utf-8", "ignore").decode("utf-8")
        return self._ids(self._read_as(caption, rng), most, rng)

    def encode(self, captions: str | Sequence[str], rng: random.Random | None = None) -> Tensor:
        """Padded ids for the prior: one caption or b of them -> int64 [b, text_length].

        A longer caption is cut, as the published model has it, with a `CaptionCut`. With `rng`,
        merges are dropped at random with probability `dropout`: only for training. Raises
        ValueError for a caption that is empty or no string.
        """
        rows = []
        for caption in [captions] if isinstance(captions, str) else captions:
            ids = [] if self.start_id is None else [self.start_id]
            ids += self._caption_ids(caption, self.text_length, rng)
            if self.has_end:
                ids.append(self.end_id)
            if len(ids) > self.text_length:
                _warn(caption, self.text_length, rng)
                ids = ids[: self.text_length]
                if self.has_end and self.keeps_end:
                    ids[-1] = self.end_id
            rows.append([*ids, *self._padding[len(ids) :]])
        return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, self.text_length)

    @property
    def _padding(self) -> list[int]:
        """The padding of each position."""
        if self.padding is not None:
            return [self.padding] * self.text_length
        return [padding_id(self.vocab_size, p) for p in range(self.text_length)]

    def encode_for_clip(
        self, captions: str | Sequence[str], length: int, rng: random.Random | None = None
    ) -> Tensor:
        """Ids for a CLIP that is trained here on the same tokens -> int64 [b, length].

        As `dalle1.Tokenizer` has them: vocab_size, the tokens, vocab_size + 1, zeros.
        """
        marks = self.vocab_size, self.vocab_size + 1
        return self._between(marks, captions, length, rng)

    def _between(
        self,
        marks: tuple[int, int],
        captions: str | Sequence[str],
        length: int,
        rng: random.Random | None = None,
    ) -> Tensor:
        """Start, tokens of which the last are cut, end, zeros: int64 [b, length]."""
        captions = [captions] if isinstance(captions, str) else captions
        result = torch.zeros(len(captions), length, dtype=torch.int64, device="cpu")
        for row, caption in zip(result, captions, strict=True):
            ids = self._caption_ids(caption, length, rng)
            if len(ids) > length - 2:
                _warn(caption, length, rng)
            ids = [marks[0], *ids[: length - 2], marks[1]]
            row[: len(ids)] = torch.tensor(ids, device="cpu")
        return result

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of ids up to the caption's end or the first padding."""
        kept = []
        for i in ids.tolist() if isinstance(ids, Tensor) else ids:
            if i in (self.end_id, self.padding) or i >= self.vocab_size:
                break
            kept.append(i)
        return self._text(kept).strip()

    def resized(self: Self, text_length: int) -> Self:
        """The same tokens for another number of text positions."""
        return self._with(text_length=text_length)

    def with_dropout(self: Self, dropout: float) -> Self:
        """The same tokens with another share of merges that are skipped in training."""
        return self._with(dropout=dropout)

    def _with(self: Self, **changed: Any) -> Self:
        content = {name: getattr(self._content, name) for name in type(self._content).model_fields}
        try:
            return type(self)(self.Content(**{**content, **changed}))
        except ValidationError as error:
            raise ValueError(f"tokenizer.{told(error)}") from error

    def reads_like(self, other: object) -> bool:
        """Whether both give every caption the same tokens."""
        if not isinstance(other, PublishedTokenizer) or type(self) is not type(other):
            return False
        return self._digest("dropout") == other._digest("dropout")

    def fingerprint(self) -> str:
        """The same 16 digits for the same tokens, drawn with the same dropout, whatever the number
        of text positions."""
        return self._digest()

    def _digest(self, *without: str) -> str:
        content = self._content.model_dump(mode="json", exclude={"text_length", *without})
        # The order of a vocabulary's entries says nothing.
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Writes one JSON file with all that the tokenizer is made of."""
        path = Path(expand_home(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self._content.model_dump_json())

    @classmethod
    def load(cls: type[Self], path: str | Path) -> Self:
        """Reads what `save` wrote; ValueError, which names the file, when it is missing or not of
        this kind."""
        path = Path(expand_home(path))
        content = read_bytes(path)
        try:
            return cls(cls.Content.model_validate_json(content))
        except ValidationError as error:
            raise ValueError(f"{path}: not a tokenizer of this library: {told(error)}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _warn(caption: str, length: int, rng: random.Random | None) -> None:
    """Tells of a caption that is cut, to the caller of a public function of a tokenizer."""
    if rng is not None:  # with dropped merges a caption is longer by chance: no news
        return
    warnings.warn(
        f"caption has more tokens than the {length} positions hold, and its end is cut off: "
        f"{caption[:60]!r}...",
        CaptionCut,
        stacklevel=3,
    )


def told(error: ValidationError) -> str:
    """The first of pydantic's mistakes, in a line."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"]) or "content"
    message = first["msg"].replace("Input should be", "expected", 1)
    if first["type"] == "extra_forbidden":
        message = "expected no setting of this name"
    found = repr(first["input"])
    return f"{name}: {message}, got {found if len(found) < 60 else found[:60] + ' ...'}"


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """A file of at most so many bytes, MAX_FILE if None; ValueError that names it otherwise."""
    most = MAX_FILE if most is None else most
    try:
        if not path.is_file():
            raise ValueError(f"{path}: expected a tokenizer's file, got none; see dalle1 import")
        size = path.stat().st_size
        if size > most:
            raise ValueError(
                f"{path}: expected a tokenizer's file of at most {most:,} bytes, got {size:,}"
            )
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error


def kind_in(path: Path) -> str | None:
    """The kind that a tokenizer's file says it is of; None where it says nothing, as that of
    `dalle1.Tokenizer`, or cannot be read."""
    try:
        content = json.loads(read_bytes(path).decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    kind = content.get("kind") if isinstance(content, dict) else None
    return kind if isinstance(kind, str) else None


def check_ids(ids: Collection[int], vocab_size: int, what: str) -> None:
    """Raises ValueError for ids that are used twice or are not below the vocabulary's size."""
    if len(set(ids)) < len(ids):
        raise ValueError(f"{what}: expected an id for each token, got one twice")
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(
            f"{what}: expected ids in [0, {vocab_size - 1}], got [{min(ids)}, {max(ids)}]; "
            "vocab_size is the number of text tokens of the prior"
        )

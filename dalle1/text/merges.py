"""Tokenizers of a vocabulary and a list of merges, `vocab.json` and `merges.txt`.

What the `tokenizers` library does with them depends on how a caption is cut into words and a word
into its smallest parts, which each kind says. Text that spells out a mark, such as "</s>", is text
like any other; the published programs take it for the mark.
"""

from __future__ import annotations

import json
import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError
from tokenizers import Tokenizer as BPE

from dalle1.common.files import expand_home
from dalle1.text.base import (
    MAX_PUBLISHED,
    PublishedTokenizer,
    TokenizerFile,
    check_ids,
    read_bytes,
    told,
)
from dalle1.tokenizer import merge

Id = Annotated[int, Field(ge=0, lt=2**31)]


class MergesFile(TokenizerFile):
    """Tokens and merges, the first merge first."""

    vocab: dict[str, Id]
    merges: list[tuple[str, str]]


class MergesTokenizer(PublishedTokenizer):
    """A tokenizer of tokens and merges."""

    MARKS: ClassVar[tuple[str, ...]] = ()  # tokens that are no text, where the vocabulary has them
    _content: MergesFile

    def __init__(self, content: MergesFile) -> None:
        super().__init__(content)
        self._vocab = content.vocab
        self._no_text = {self._vocab[mark] for mark in self.MARKS if mark in self._vocab}
        check_ids(list(self._vocab.values()), self.vocab_size, "vocab")
        self._ranks: dict[tuple[int, int], int] = {}  # of a merge, by the ids of its two parts
        self._merged: list[int] = []  # the id that a merge makes, by its rank
        for rank, (left, right) in enumerate(content.merges):
            parts = [self._vocab.get(token) for token in (left, right, left + right)]
            if None in parts:
                raise ValueError(
                    f"merges: expected parts and result of {left!r} {right!r} in the vocabulary, "
                    "got a merge of another one"
                )
            self._ranks[parts[0], parts[1]] = rank  # type: ignore[index]
            self._merged.append(parts[2])  # type: ignore[arg-type]
        try:
            self._bpe = self._build(content)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ValueError(f"merges: expected those of the vocabulary, got {error}") from error

    @abstractmethod
    def _build(self, content: MergesFile) -> BPE:
        """The library's tokenizer: how text becomes words and words become tokens."""

    @abstractmethod
    def _parts(self, word: str) -> list[int]:
        """The ids of a word's smallest parts."""

    def _mark(self, token: str) -> int:
        """The id of a token that the kind has by name."""
        if token not in self._vocab:
            raise ValueError(f"vocab: expected {token!r} among the tokens, got none")
        return self._vocab[token]

    def _ids(self, text: str, most: int, rng: random.Random | None) -> list[int]:
        if rng is None or not self.dropout:
            return list(self._bpe.encode(text, add_special_tokens=False).ids)
        # Done here because the library's own dropout cannot be seeded.
        if self._bpe.normalizer is not None:
            text = self._bpe.normalizer.normalize_str(text)
        ids: list[int] = []
        for word, _ in self._bpe.pre_tokenizer.pre_tokenize_str(text):
            ids += merge(self._parts(word), self._ranks, self._merged, self.dropout, rng.random)
            if len(ids) > most:
                break
        return ids

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._bpe.decode([i for i in ids if i not in self._no_text]))


def made_of(content: type[MergesFile], origin: Path, **settings: Any) -> MergesFile:
    """A file's content; ValueError that names where it is from."""
    vocab = settings["vocab"]
    if settings.get("vocab_size") is None:
        settings["vocab_size"] = max([0, *vocab.values()]) + 1
    try:
        return content(**settings)
    except ValidationError as error:
        raise ValueError(f"{origin}: {told(error)}") from error


def read_vocab(path: str | Path) -> dict[str, int]:
    """A `vocab.json`: ids by token; ValueError that names the file."""
    path = Path(expand_home(path))
    vocab = _json(path)
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError(f"{path}: expected a vocab.json, an id for each token, got something else")
    return vocab


def read_merges(path: str | Path) -> list[tuple[str, str]]:
    """A `merges.txt`, after a line of version two tokens a line; ValueError that names the file."""
    path = Path(expand_home(path))
    try:
        lines = read_bytes(path, MAX_PUBLISHED).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected merges.txt in UTF-8: {error}") from error
    lines = [line.removesuffix("\r") for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    return [_pair(line, path) for line in lines if not line.startswith("#version")]


def read_fast(path: str | Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens and merges of a `tokenizer.json`; ValueError that names the file."""
    path = Path(expand_home(path))
    content = _json(path)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{path}: expected a tokenizer.json of byte pairs, got something else")
    vocab, merges = dict(model["vocab"]), model.get("merges")
    added = content.get("added_tokens") or []
    if not isinstance(merges, list) or not isinstance(added, list):
        raise ValueError(f"{path}: expected lists of merges and added tokens, got something else")
    for token in added:  # marks, which need not be in the vocabulary
        if isinstance(token, Mapping) and isinstance(token.get("content"), str):
            vocab.setdefault(token["content"], token.get("id"))
    if not all(type(i) is int for i in vocab.values()):
        raise ValueError(f"{path}: expected an id for each token, got something else")
    return vocab, [_pair(pair, path) for pair in merges]


def _pair(merge: object, path: Path) -> tuple[str, str]:
    """A merge, written as a line of two tokens or, in newer files, as a list of them."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if isinstance(parts, list) and len(parts) == 2 and all(isinstance(p, str) and p for p in parts):
        return parts[0], parts[1]
    raise ValueError(f"{path}: expected merges of two tokens, got {str(merge)[:60]!r}")


def _json(path: Path) -> Any:
    try:
        return json.loads(read_bytes(path, MAX_PUBLISHED).decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: truncated or not JSON: {error}") from error

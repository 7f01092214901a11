"""The published CLIP's tokenizer: byte-pair merges from the vocabulary file that the user gives.

The file is `bpe_simple_vocab_16e6.txt(.gz)`: a line of version, then a merge a line. Ids are, in
order: 256 bytes, the same 256 at a word's end, the merges, start of text, end of text. The
published code also repairs broken Unicode with ftfy (curly quotes become straight); here captions
are taken as they are, but for HTML entities, white space and case.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import io
import json
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as BPE
from tokenizers.models import BPE as Merges
from torch import Tensor

from dalle1.common.files import expand_home, read_text, write_text
from dalle1.protocols import CaptionCut
from dalle1.text.base import MAX_PUBLISHED, read_bytes
from dalle1.text.kinds import TOKENIZERS, kind_of_file
from dalle1.tokenizer import TOKENIZER, Tokenizer

WORD_END = "</w>"
# Contractions, runs of letters, single digits, runs of other signs.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
VOCAB = 49408
CLIP_TOKENIZER = "clip_tokenizer.json"  # in a model folder


class CLIPTokenizer:
    """Captions to the ids that a published CLIP was trained on."""

    def __init__(self, bpe: BPE) -> None:
        self._bpe = bpe

    @property
    def vocab_size(self) -> int:
        """All ids, start and end of text included."""
        return int(self._bpe.get_vocab_size()) + 2

    @classmethod
    def from_published(cls, path: str | Path, vocab_size: int = VOCAB) -> CLIPTokenizer:
        """Reads the first vocab_size - 514 merges of the published file, gzipped or not.

        Raises ValueError when the file is missing, no vocabulary, or has fewer merges.
        """
        path = Path(expand_home(path))
        try:
            content = read_bytes(path, MAX_PUBLISHED)
            if content[:2] == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
                    content = file.read(MAX_PUBLISHED + 1)
            if len(content) > MAX_PUBLISHED:
                raise ValueError(f"{path}: unpacks to more than {MAX_PUBLISHED:,} bytes")
            lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")[1:]
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: no CLIP vocabulary: {error}") from error
        count = vocab_size - 2 * 256 - 2
        merges = [(a, b) for line in lines[:count] for a, _, b in [line.partition(" ")]]
        if count < 0 or len(merges) < count or not all(a and b for a, b in merges):
            raise ValueError(f"{path}: expected a line of version and {count} merges 'a b'")
        bytes_ = _byte_signs()
        signs = [*bytes_, *(sign + WORD_END for sign in bytes_), *(a + b for a, b in merges)]
        vocab = {sign: i for i, sign in enumerate(signs)}
        try:
            bpe = BPE(Merges(vocab, merges, end_of_word_suffix=WORD_END))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ValueError(f"{path}: no CLIP vocabulary: {error}") from error
        bpe.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Replace(Regex(r"\s+"), " "),
                normalizers.Strip(),
                normalizers.Lowercase(),
            ]
        )
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return cls(bpe)

    def encode_for_clip(self, captions: str | Sequence[str], length: int) -> Tensor:
        """Start, tokens, end, zeros: one caption or b of them -> int64 [b, length].

        A caption beyond length - 2 tokens is cut, with a warning.
        """
        captions = [captions] if isinstance(captions, str) else captions
        result = torch.zeros(len(captions), length, dtype=torch.int64, device="cpu")
        for row, caption in zip(result, captions, strict=True):
            tokens = self._bpe.encode(html.unescape(html.unescape(caption))).ids
            if len(tokens) > length - 2:
                warnings.warn(
                    f"caption has {len(tokens)} tokens and is cut to {length - 2}: "
                    f"{caption[:60]!r}...",
                    CaptionCut,
                    stacklevel=2,
                )
            start = self.vocab_size - 2
            ids = [start, *tokens[: length - 2], start + 1]
            row[: len(ids)] = torch.tensor(ids, device="cpu")
        return result

    def fingerprint(self) -> str:
        """The same 16 digits for the same ids, whatever the release that wrote the file."""
        model = json.loads(self._bpe.to_str())["model"]
        content = [sorted(model["vocab"].items()), [list(pair) for pair in model["merges"]]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Writes one JSON file."""
        write_text(Path(expand_home(path)), self._bpe.to_str())

    @classmethod
    def load(cls, path: str | Path) -> CLIPTokenizer:
        """Reads what `save` wrote; ValueError when it is missing or not of its kind."""
        path = Path(expand_home(path))
        try:
            return cls(BPE.from_str(read_text(path)))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ValueError(f"{path}: not a CLIP tokenizer of this library: {error}") from error


def _byte_signs() -> list[str]:
    """A printable sign for each byte, in the published order: those that are printable in
    Latin-1 stand for themselves and come first; the others become signs from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(others))]


def load_clip_tokenizer(folder: Path, vocab_size: int) -> Any:
    """What the CLIP of a model folder reads captions by; None where the folder says nothing.

    Folders of format 1 hold a file of its own only where the vocabulary is a published one; other
    CLIPs share the prior's, of vocab_size tokens.
    """
    path = folder / CLIP_TOKENIZER
    if not path.exists():
        shared = folder / TOKENIZER
        kind = TOKENIZERS.get(kind_of_file(shared) or "bpe") if shared.exists() else None
        tokenizer = None if kind is None else kind.load(shared)
        return tokenizer if getattr(tokenizer, "vocab_size", None) == vocab_size else None
    try:
        content = json.loads(read_text(path))
        kind = TOKENIZERS.get(content["kind"]) if "kind" in content else None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a tokenizer of this library: {error}") from error
    if "kind" in content and kind is None:
        raise ValueError(f"{path}: kind: expected one of {', '.join(TOKENIZERS)}, got another one")
    return (kind or (Tokenizer if "bpe" in content else CLIPTokenizer)).load(path)

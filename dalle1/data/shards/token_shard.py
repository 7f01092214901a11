"""Token shards: images as the dVAE's tokens, computed once, with their captions as text.

    00000.safetensors, one for each raw shard:
      tokens    uint16 [samples, views, rows * columns], row by row
      keys      uint8 [bytes]     the samples' keys, a JSON list
      captions  uint8 [bytes]     a JSON list of lists of texts: an image may have several
    and in its header what they were made with and of, see `TokenSettings` and `SourceShard`.

A file is mapped into memory, so that a sample costs what is read of it. The same content is the
same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dalle1.common.files import flush, replacing, saying_what_is_missing
from dalle1.data.samples import current_causes

END = ".safetensors"
FORMAT = "dalle1-tokens-1"
HEADER = "tokens"  # the one entry: safetensors writes several in another order each time


@dataclass(frozen=True)
class TokenSettings:
    """What the tokens and captions of a shard were made with."""

    codebook_size: int  # tokens are below it; at most 65,536
    grid: int  # rows, and columns
    views: int  # of each image
    augmented: bool  # whether views are crops of listing 2, rather than the middle of the image
    dvae: str  # fingerprint of the dVAE's config and weights
    precision: str = "fp32"
    seed: int = 0  # of the views
    caption_key: str = "txt"
    caption_lines: bool = False
    max_aspect: float | None = None
    max_pixels: int | None = None


@dataclass(frozen=True)
class SourceShard:
    """The raw shard that a token shard was made of."""

    name: str = ""
    bytes: int | None = None  # none: remote
    dropped: dict[str, int] = field(default_factory=dict)  # its bad samples by cause
    damage: str = ""  # why its rest is lost


@dataclass(frozen=True)
class TokenSample:
    """A sample of a token shard."""

    key: str
    captions: list[str]
    tokens: np.ndarray  # uint16 [views, rows * columns]


class TokenShard:
    """A token shard on a disk; ValueError where it is none or damaged."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            self._file = _opened(self.path)
            header = json.loads((self._file.metadata() or {}).get(HEADER, "{}"))
            if header.get("format") != FORMAT:
                raise ValueError(f"format {header.get('format')!r}, expected {FORMAT!r}")
            self.settings = TokenSettings(**header["settings"])
            source = SourceShard(**header["source"])
            self.source = replace(source, dropped=dict(current_causes(source.dropped)))
            tokens = self._file.get_slice("tokens")
            self.count, views, length = tokens.get_shape()
            s = self.settings
            if (views, length, tokens.get_dtype()) != (s.views, s.grid**2, "U16"):
                raise ValueError(
                    f"tokens are {tokens.get_dtype()} [{self.count}, {views}, {length}]"
                )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"data: {self.path} is no token shard: {error}") from error
        self._tokens = tokens
        self._texts: tuple[list[str], list[list[str]]] | None = None

    def _read_texts(self) -> tuple[list[str], list[list[str]]]:
        if self._texts is None:
            try:
                keys, captions = (
                    json.loads(self._file.get_tensor(name).tobytes())
                    for name in ("keys", "captions")
                )
                found = len(keys), len(captions)
            except (SafetensorError, ValueError, TypeError) as error:
                raise ValueError(f"data: {self.path} is damaged: {error}") from error
            if found != (self.count, self.count):
                raise ValueError(
                    f"data: {self.path} is damaged: {self.count} samples, {found[0]} keys and "
                    f"{found[1]} captions"
                )
            self._texts = keys, captions
        return self._texts

    def keys(self) -> list[str]:
        """The samples' keys."""
        return self._read_texts()[0]

    def captions(self, most: int | None = None) -> list[list[str]]:
        """The captions of the first `most` samples."""
        return self._read_texts()[1][:most]

    def read(self, first: int, last: int) -> list[TokenSample]:
        """Samples [first, last), as far as there are any."""
        last = min(last, self.count)
        if not 0 <= first < last:  # safetensors has no empty slices
            return []
        keys, captions = self._read_texts()
        tokens = self._tokens[first:last]
        return [TokenSample(keys[i], captions[i], tokens[i - first]) for i in range(first, last)]


def write_token_shard(
    path: Path,
    keys: Sequence[str],
    captions: Sequence[Sequence[str]],
    tokens: np.ndarray,
    settings: TokenSettings,
    source: SourceShard | None = None,
) -> None:
    """Writes a token shard to a temporary file and renames it.

    Args:
        path: of the file.
        keys: of the samples.
        captions: of each sample.
        tokens: [samples, views, rows * columns], of any type of integers.
        settings: what the tokens were made with.
        source: the raw shard that they were made of.

    Raises:
        ValueError: tokens outside of the codebook, or not one for each place.
        OSError: the disk is full; says how much is missing.
    """
    if settings.codebook_size > 2**16:
        raise ValueError(f"codebook_size {settings.codebook_size}: 16 bits hold 65,536")
    if tokens.shape != (len(keys), settings.views, settings.grid**2) or len(captions) != len(keys):
        raise ValueError(
            f"tokens {list(tokens.shape)} of {len(keys)} keys and {len(captions)} captions: "
            f"expected [{len(keys)}, {settings.views}, {settings.grid**2}]"
        )
    if tokens.size and (tokens.min() < 0 or tokens.max() >= settings.codebook_size):
        raise ValueError(
            f"tokens from {tokens.min()} to {tokens.max()}: the codebook has "
            f"{settings.codebook_size}"
        )
    content = {
        "tokens": tokens.astype(np.uint16),
        "keys": _bytes(list(keys)),
        "captions": _bytes([list(texts) for texts in captions]),
    }
    header = {
        "format": FORMAT,
        "settings": asdict(settings),
        "source": asdict(source or SourceShard()),
    }
    # Not safetensors' own writing to a file, which does not say why it failed.
    data = save(content, {HEADER: json.dumps(header)})
    with (
        saying_what_is_missing(path.parent, path.name, len(data)),
        replacing(path) as temporary,
        temporary.open("wb") as file,
    ):
        file.write(data)
        flush(file)


def _opened(path: str) -> Any:
    return safe_open(path, framework="numpy")


def _bytes(value: Any) -> np.ndarray:
    # ASCII: keys need not be valid Unicode.
    return np.frombuffer(json.dumps(value).encode(), np.uint8)

"""Captions to token ids and back: lower-cased byte-level BPE (paper section 2.2).

Text ids:
    0 ... vocab_size - 1    byte-pair tokens; END_OF_CAPTION is one of them
    vocab_size + p          the padding of text position p, one for each position

Dropout of merges (10 % in the paper) is applied only where it is asked for: in training.

Dimensions: b captions, t text positions.
"""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from dalle1.common.files import expand_home, read_text, write_text
from dalle1.protocols import CaptionCut

END_OF_CAPTION = 0  # the target at the first padding position; never an input
END_TOKEN = "<|endofcaption|>"  # as the vocabulary spells it
TOKENIZER = "tokenizer.json"  # in a model folder, and in the folder of a run that learned it
BYTES = 256  # a byte-level vocabulary holds every byte, so no caption is out of it
# In training a caption is cut before it is encoded: to so many bytes for each text position (the
# mean of words is 5 in English, and under 10 in scripts of 3 bytes a letter), and to a few tokens
# more than are kept, so that what merges at the cut is not kept.
MAX_BYTES_PER_TOKEN = 10
CUT_MARGIN = 16


def padding_id(text_vocab: int, position: int) -> int:
    """The id that stands for padding at a text position (appendix B.1: each has its own)."""
    return text_vocab + position


def merge(
    ids: list[int],
    ranks: Mapping[tuple[int, int], int],
    merged: Sequence[int],
    dropout: float,
    uniform: Callable[[], float],
) -> list[int]:
    """The ids of a word, of its smallest parts at first, after merges with dropout.

    The algorithm (Provilkov et al. 2020, algorithm 1) tosses a coin for every possible merge at
    every turn and applies the best that is left. Only coins of merges that are better than that one
    matter. So possible merges are held in order, and coins are tossed from the best on until one is
    not dropped, in place of a scan of all of them. The places are a linked list.

    Args:
        ids: of the parts; the list is used up.
        ranks: of a merge, by the ids of its two parts.
        merged: the id that a merge makes, by its rank.
        dropout: probability that a possible merge is passed over, at every turn.
        uniform: draws a number in [0, 1).
    """
    bits = len(ids).bit_length()
    mask = (1 << bits) - 1
    # Of each place: the rank of the merge with the next part, -1 for none.
    rank_at = [ranks.get(pair, -1) for pair in pairwise(ids)] + [-1]
    # A merge is a number, its rank and then its place, so the heap has the algorithm's order:
    # of equal ranks the leftmost. One whose place has another rank by now is out of date.
    possible = [rank << bits | i for i, rank in enumerate(rank_at) if rank >= 0]
    heapify(possible)
    ids.append(-1)  # behind the last part, where nothing merges
    following, previous = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))
    dropped: list[int] = []
    while possible:
        found = heappop(possible)
        i, rank = found & mask, found >> bits
        if rank_at[i] != rank:
            continue
        if uniform() < dropout:
            dropped.append(found)
            continue
        gone = following[i]
        after = following[i] = following[gone]
        previous[after] = i
        ids[i] = merged[rank]
        ids[gone] = rank_at[gone] = -1
        for left, right in ((previous[i], i), (i, after)):
            if left >= 0:
                rank_at[left] = rank = ranks.get((ids[left], ids[right]), -1)
                if rank >= 0:
                    heappush(possible, rank << bits | left)
        for again in dropped:  # possible again at the next turn
            heappush(possible, again)
        dropped.clear()
    return [part for part in ids if part >= 0]


class Tokenizer:
    """A trained byte-level BPE with the transformer's padding and CLIP's start and end marks."""

    def __init__(self, bpe: BPE, text_length: int, dropout: float = 0.1) -> None:
        if bpe.token_to_id(END_TOKEN) != END_OF_CAPTION:
            raise ValueError(f"tokenizer: token {END_OF_CAPTION} must be {END_TOKEN}")
        if not 0 <= dropout < 1:
            raise ValueError(f"tokenizer.dropout must be in [0, 1), got {dropout}")
        self.text_length = text_length
        self.dropout = dropout
        # A caption that spells out the end mark is text like any other, as it is with dropout.
        bpe.encode_special_tokens = True
        self._bpe = bpe
        model = json.loads(bpe.to_str())["model"]
        self._vocab: dict[str, int] = model["vocab"]
        self._longest = max(map(len, self._vocab))  # bytes of a token
        self._ranks: dict[tuple[int, int], int] = {}  # of a merge, by the ids of its two parts
        self._merged: list[int] = []  # the id that a merge makes, by its rank
        for rank, (left, right) in enumerate(model["merges"]):
            self._ranks[self._vocab[left], self._vocab[right]] = rank
            self._merged.append(self._vocab[left + right])

    @classmethod
    def train(
        cls,
        captions: Iterable[str],
        vocab_size: int = 16384,
        text_length: int = 256,
        dropout: float = 0.1,
    ) -> Tokenizer:
        """Learns merges from captions until `vocab_size` tokens (or until none is left).

        Raises ValueError when vocab_size cannot hold the bytes and the end mark.
        """
        if vocab_size < BYTES + 1:
            raise ValueError(
                f"tokenizer.vocab_size must be at least {BYTES + 1} (the bytes and "
                f"{END_TOKEN}), got {vocab_size}"
            )
        bpe = BPE(models.BPE())
        bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_TOKEN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(captions, trainer)
        return cls(bpe, text_length, dropout)

    def resized(self, text_length: int) -> Tokenizer:
        """The same tokens for another number of text positions."""
        return Tokenizer(self._bpe, text_length, self.dropout)

    def reads_like(self, other: Tokenizer) -> bool:
        """Whether both give every caption the same tokens."""
        return bool(self._bpe.to_str() == other._bpe.to_str())

    def fingerprint(self) -> str:
        """The same 16 digits for the same tokens, drawn with the same dropout, whatever the number
        of text positions and the release that wrote the file."""
        content = [sorted(self._vocab.items()), list(self._ranks), self.dropout]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    @property
    def vocab_size(self) -> int:
        """Tokens of the text vocabulary, END_OF_CAPTION included; paddings are not counted."""
        return int(self._bpe.get_vocab_size())

    def tokens(self, caption: str, rng: random.Random | None = None) -> list[int]:
        """The caption's tokens, at most text_length - 1, without end or padding.

        With `rng`, merges are dropped at random (BPE dropout), and no more of a long caption is
        read than the text positions can hold: only for training. A longer caption is cut with a
        `CaptionCut`, since the last position must hold the end. Raises ValueError for a caption
        that is empty or no string.
        """
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"caption: expected text, got {caption!r}")
        caption, limit = caption.strip(), self.text_length - 1
        # Tokens of more letters than these are beyond the limit, however long each of them is.
        needed = self._longest * (limit + CUT_MARGIN)
        more = "more than " if len(caption) > needed else ""
        caption = caption[:needed] if rng is None else self._readable(caption)
        if rng is not None and self.dropout:
            ids = self._dropped_out(caption, rng)
        else:
            ids = self._bpe.encode(caption, add_special_tokens=False).ids
        if len(ids) > limit:
            if rng is None:  # with dropped merges a caption is longer by chance: no news
                warnings.warn(
                    f"caption has {more}{len(ids)} tokens and is cut to {limit}: "
                    f"{caption[:60]!r}...",
                    CaptionCut,
                    stacklevel=3,
                )
            ids = ids[:limit]
        return ids

    def _readable(self, caption: str) -> str:
        """The beginning of a caption that its tokens can come from."""
        size = MAX_BYTES_PER_TOKEN * self.text_length
        # Letters first: most of a caption of 1 MB need not be encoded at all.
        caption = caption[:size].encode(errors="replace")[:size].decode(errors="ignore")
        enough = self.text_length - 1 + CUT_MARGIN
        if len(caption) <= enough:
            return caption
        found = self._bpe.encode(caption, add_special_tokens=False)
        return caption if len(found) <= enough else caption[: found.offsets[enough - 1][1]]

    def _dropped_out(self, caption: str, rng: random.Random) -> list[int]:
        """Ids with each possible merge passed over with probability `dropout`, at every turn.

        Provilkov et al. 2020, algorithm 1. Done here because the library's own dropout cannot be
        seeded, and a resumed run must see the same tokens.
        """
        ids: list[int] = []
        normal = self._bpe.normalizer.normalize_str(caption)
        for word, _ in self._bpe.pre_tokenizer.pre_tokenize_str(normal):
            parts = [self._vocab[byte] for byte in word]
            ids += merge(parts, self._ranks, self._merged, self.dropout, rng.random)
            if len(ids) >= self.text_length:
                break
        return ids

    def encode(self, captions: str | Sequence[str], rng: random.Random | None = None) -> Tensor:
        """Padded ids for the transformer: one caption or b of them -> int64 [b, text_length].

        With `rng`, BPE dropout is applied; an empty string is refused, see `tokens`.
        """
        captions = [captions] if isinstance(captions, str) else captions
        rows = []
        for caption in captions:
            ids = self.tokens(caption, rng)
            padding = (padding_id(self.vocab_size, p) for p in range(len(ids), self.text_length))
            rows.append([*ids, *padding])
        padded = torch.tensor(rows, dtype=torch.int64, device="cpu")
        return padded.reshape(len(rows), self.text_length)

    def encode_for_clip(
        self, captions: str | Sequence[str], length: int, rng: random.Random | None = None
    ) -> Tensor:
        """Ids as CLIP reads them: start, tokens, end, zeros -> int64 [b, length].

        As in the published vocabulary, start and end are the two highest ids (vocab_size and
        vocab_size + 1), so that the end is where the ids have their maximum.
        """
        captions = [captions] if isinstance(captions, str) else captions
        result = torch.zeros(len(captions), length, dtype=torch.int64, device="cpu")
        for row, caption in zip(result, captions, strict=True):
            ids = [self.vocab_size, *self.tokens(caption, rng)[: length - 2], self.vocab_size + 1]
            row[: len(ids)] = torch.tensor(ids, device="cpu")
        return result

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of ids up to the end of the caption or the first padding."""
        kept = []
        for i in ids.tolist() if isinstance(ids, Tensor) else ids:
            if i == END_OF_CAPTION or i >= self.vocab_size:
                break
            kept.append(i)
        return str(self._bpe.decode(kept)).strip()

    def save(self, path: str | Path) -> None:
        """Writes one JSON file: the BPE and, beside it, text_length and dropout."""
        path = Path(expand_home(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "text_length": self.text_length,
            "dropout": self.dropout,
            "bpe": json.loads(self._bpe.to_str()),
        }
        write_text(path, json.dumps(content))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads what `save` wrote; ValueError when the file is missing or not of its kind."""
        path = Path(expand_home(path))
        try:
            content = json.loads(read_text(path))
            bpe = BPE.from_str(json.dumps(content["bpe"]))
            return cls(bpe, int(content["text_length"]), float(content["dropout"]))
        except FileNotFoundError as error:
            raise ValueError(f"{path}: missing; a tokenizer is written by training") from error
        except Exception as error:  # the tokenizers library raises bare Exception on bad JSON
            raise ValueError(f"{path}: not a tokenizer of this library: {error}") from error

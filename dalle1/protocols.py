"""What a text tokenizer, a prior and a ranker are to the rest of the library.

Whoever draws, ranks, trains or stores a model knows these and `dvae.codec.Codec`, never a class of
a part itself: a second prior or ranker is a class with these methods and a line in
`dalle1.registry` (docs/extending.md).

Dimensions: b images, c captions, n rows (candidates of all captions), k positions of one step,
t text positions, m image positions, H W image height and width.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from dvae.codec import Codec


class CaptionCut(UserWarning):
    """A caption has more tokens than a model reads, and its end is cut off."""


@contextmanager
def cuts_told_once() -> Iterator[None]:
    """In this block each `CaptionCut` is told once, however often a caption is encoded."""
    told: set[str] = set()
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, CaptionCut):
            if str(message) in told:
                return
            told.add(str(message))
        usual(message, category, *where, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


@contextmanager
def cuts_untold() -> Iterator[None]:
    """In this block no `CaptionCut` is told: the captions are ours, or were told of before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptionCut)
        yield


class TextTokenizer(Protocol):
    """Captions to the ids that a prior reads, and back.

    Attributes:
        vocab_size: number of tokens; ids from there on are padding, of a position each, unless one
            of the tokens is.
        text_length: text positions t.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def text_length(self) -> int: ...

    def encode(self, captions: str | Sequence[str], rng: random.Random | None = None) -> Tensor:
        """Padded ids, int64 [c, t]; rng: for what is random in training, such as BPE dropout.

        Raises ValueError for a caption that is empty or no text; a caption that is too long is cut
        with a `CaptionCut`.
        """
        ...

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of ids up to the caption's end."""
        ...

    def save(self, path: str | Path) -> None:
        """Writes one file."""
        ...


class DecodingState(Protocol):
    """Caches of c captions with b candidates each, n = c * b rows, caption by caption.

    One state serves many batches of candidates: each begins with `prefill`. On CUDA, a few steps
    come before the first `prefill`, while the step is recorded as a graph; what a static state
    keeps is therefore allocated when it is started and written in place.
    """

    def prefill(self, text: Tensor, prefix: Tensor | None = None) -> None:
        """Reads the captions, int64 [c, t], and the first image tokens of all rows, int64 [p]."""
        ...

    def step(self, tokens: Tensor, position: int | Tensor) -> Tensor:
        """Logits of the tokens at positions `position` ... + k - 1.

        Positions that are fed again are written over, and what was behind them is forgotten.

        Args:
            tokens: int64 [n, k], what stands before each of those positions: the image token of
                the position before, or `image_vocab`, the start, at position 0.
            position: one number for all rows; or int64 [1] or [n], on the device. Where a state
                was started as static, it is an int64 [1] and k is 1.

        Returns:
            float32 [n, k, image_vocab].
        """
        ...


class Prior(Protocol):
    """Models a caption's image tokens; an `nn.Module`, whose device is that of its parameters.

    To be saved and loaded, it also has a `config`, a pydantic model (see `dvae.storage.Kind`).

    Attributes:
        text_vocab, text_length: what its tokenizer must have.
        image_vocab: what its codec must have.
        grid: rows and columns of the image's token grid; positions are in raster order.
    """

    @property
    def text_vocab(self) -> int: ...
    @property
    def text_length(self) -> int: ...
    @property
    def image_vocab(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int]: ...

    def empty_caption(self) -> Tensor:
        """The text of no caption, int64 [t], which guidance compares with."""
        ...

    def start(self, captions: int, candidates: int, static: bool) -> DecodingState:
        """Empty caches for so many captions and candidates of each.

        Args:
            captions: of a batch.
            candidates: of each caption.
            static: positions will be tensors and shapes never change, so that a step can be
                recorded as a CUDA graph.
        """
        ...

    def decoding_bytes(self) -> tuple[int, int]:
        """Bytes that a state holds and works with, for each caption and for each candidate."""
        ...

    def log_prob(self, text: Tensor, image: Tensor) -> Tensor:
        """ln p(image | text) in nats, float32 [b], of int64 [b, t] and [b, m]."""
        ...


@runtime_checkable
class WindowPrior(Protocol):
    """A prior whose steps of several positions cost less than as many steps of one."""

    def best_window(self, rows: int) -> int:
        """How many positions of a step pay for so many rows, those of empty captions included; 1
        where none do."""
        ...

    def window_bytes(self, window: int) -> int:
        """Bytes that a state holds and works with for each row, for steps of so many positions."""
        ...


@runtime_checkable
class TextPrior(Protocol):
    """A prior that models captions too.

    Where another token than 0 ends a caption, it has an attribute `end_of_caption`, its id.
    """

    def next_text_logits(self, ids: Sequence[int]) -> Tensor:
        """Logits of the next text token, float32 [text_vocab], behind the first ids of a caption,
        the caption's end among them."""
        ...


def end_of_caption(prior: TextPrior) -> int:
    """The id of the text token that ends a caption."""
    return int(getattr(prior, "end_of_caption", 0))


@runtime_checkable
class TokenwisePrior(Protocol):
    """A prior that tells the log-probability of each token in one pass."""

    def token_log_probs(self, text: Tensor, image: Tensor) -> Tensor:
        """ln p(token | text, tokens before it) in nats, float32 [b, m], of int64 [b, t] and
        [b, m]; `log_prob` is its sum."""
        ...


class Ranker(Protocol):
    """Scores images against captions; to be saved, it has a `config` like a prior."""

    def score(self, captions: Sequence[str], images: Tensor) -> Tensor:
        """Scores, float32 [captions, b] on the CPU, of images, float [b, 3, H, W] in [0, 1]; more
        is a better fit."""
        ...


@runtime_checkable
class TokenRanker(Protocol):
    """A ranker that scores image tokens, where images were drawn as tokens."""

    def score_tokens(self, captions: Sequence[str], tokens: Tensor) -> Tensor:
        """Scores, float32 [captions, b] on the CPU, of int64 [b, m]; as `Ranker.score`."""
        ...


@runtime_checkable
class EmbeddingRanker(Protocol):
    """A ranker that compares embeddings, which FID and Inception Score can be computed on."""

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings [b, e] of images, float [b, 3, H, W] in [0, 1]."""
        ...

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Unit embeddings [c, e]."""
        ...

    def scale(self) -> Tensor:
        """The factor [] that turns cosines into logits."""
        ...


@runtime_checkable
class NeedsTokenizer(Protocol):
    """A ranker that reads captions by the model's tokenizer where it has none of its own."""

    def adopt_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Takes the tokenizer unless there is one already; ValueError when it does not fit."""
        ...


class TokenModel(Protocol):
    """What images are drawn with: `dalle1.Model` is one."""

    @property
    def tokenizer(self) -> TextTokenizer: ...
    @property
    def prior(self) -> Prior: ...
    @property
    def codec(self) -> Codec: ...


@runtime_checkable
class NeedsModel(Protocol):
    """A ranker that scores by the model that it ranks for."""

    def bound_to(self, model: TokenModel) -> Ranker:
        """The same ranker for this model; this one stays as it is."""
        ...

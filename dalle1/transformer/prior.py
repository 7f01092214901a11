"""What the priors that are trained here share: layers, initial weights, likelihoods, checks.

Dimensions: b batch, n rows of a decoding state, t text positions, m image positions.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from dalle1.transformer.residual import ResidualLayer
from dvae.calls import isolated

PADDED = " (the tokenizer pads to them)"  # a remedy of `check_ids`


class PriorShape(Protocol):
    """What every prior's config says.

    Attributes:
        text_vocab: tokens of the text vocabulary, without paddings.
        text_length: text positions.
        image_vocab: image tokens.
        grid: tokens of the image's side.
    """

    @property
    def text_vocab(self) -> int: ...
    @property
    def text_length(self) -> int: ...
    @property
    def image_vocab(self) -> int: ...
    @property
    def grid(self) -> int: ...


class ResidualPrior(nn.Module, ABC):
    """A `protocols.Prior` that is made of residual layers and trained by the stage `dalle`."""

    config: PriorShape

    @property
    @abstractmethod
    def residual_layers(self) -> Sequence[ResidualLayer]:
        """The layers, in the order that they are run in."""

    @abstractmethod
    def initial_std(self, name: str) -> float:
        """Standard deviation that the weight of this name begins with, if it is no norm or bias."""

    @abstractmethod
    def image_logits(self, text: Tensor, image: Tensor) -> Tensor:
        """Logits that predict image tokens, int64 [b, m], each given the text, int64 [b, t], and
        the tokens before it: float32 [b, m, image_vocab].

        Raises ValueError when a shape, type or token does not fit.
        """

    @property
    def text_vocab(self) -> int:
        """Tokens of the text vocabulary, without paddings."""
        return self.config.text_vocab

    @property
    def text_length(self) -> int:
        """Text positions."""
        return self.config.text_length

    @property
    def image_vocab(self) -> int:
        """Image tokens."""
        return self.config.image_vocab

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image's token grid."""
        return self.config.grid, self.config.grid

    @torch.no_grad()
    def initialize(
        self,
        seed: int,
        whole: Callable[[nn.Parameter], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Scales 1, biases 0, all else from N(0, `initial_std`).

        What a weight begins with is a function of the seed and its name, so that it is the same
        however the weights are spread. whole: makes a sharded weight whole while it is set.
        """
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            with whole(parameter):
                if name.endswith("norm.weight"):
                    parameter.fill_(1)
                elif name.endswith("bias"):
                    parameter.zero_()
                else:
                    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
                    values = torch.empty(parameter.shape, device="cpu")
                    parameter.copy_(values.normal_(0, self.initial_std(name), generator=generator))

    @isolated()
    @torch.no_grad()
    def log_prob(self, text: Tensor, image: Tensor) -> Tensor:
        """ln p(image | text) in nats, float32 [b]: int64 [b, text_length] and [b, grid^2].

        Raises ValueError when a shape, type or token does not fit.
        """
        total: Tensor = self.token_log_probs(text, image).sum(dim=-1)
        return total

    def token_log_probs(self, text: Tensor, image: Tensor) -> Tensor:
        """ln p(token | text, tokens before it) in nats, float32 [b, grid^2]; see `log_prob`."""
        log_probs = self.image_logits(text, image).log_softmax(dim=-1)
        chosen: Tensor = log_probs.gather(-1, image[..., None])[..., 0]
        return chosen


def check_ids(name: str, tokens: Tensor, least: int, most: int, remedy: str = "") -> None:
    """Raises ValueError where tokens are no int64 [b, least to most positions].

    Args:
        name: of the argument, for the message.
        tokens: of any device.
        least: positions that there must be.
        most: positions that there may be.
        remedy: of a wrong number of positions, added to the message.
    """
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise ValueError(
            f"{name}: expected int64 [batch, positions], got {tokens.dtype} {list(tokens.shape)}"
        )
    if not least <= tokens.shape[1] <= most:
        low = f"{least} to " if least else "at most "
        count = f"{'' if least == most else low}{most} positions{remedy}"
        raise ValueError(f"{name}: expected {count}, got {tokens.shape[1]}")


def check_same_batch(text_tokens: Tensor, image_tokens: Tensor) -> None:
    """Raises ValueError where captions [b, t] and images [b, m] are of different numbers."""
    if len(text_tokens) != len(image_tokens):
        raise ValueError(
            f"text_tokens and image_tokens differ in batch: {len(text_tokens)} and "
            f"{len(image_tokens)}"
        )


def check_values(name: str, tokens: Tensor, vocab: int) -> None:
    """Raises ValueError where tokens on the CPU, of any shape, are not in [0, vocab).

    Of others the values are not read, which would stall the device: its embedding look-up asserts.
    """
    if tokens.device.type != "cpu" or not tokens.numel():
        return
    low, high = int(tokens.min()), int(tokens.max())
    if not 0 <= low <= high < vocab:
        raise ValueError(f"{name}: expected values in [0, {vocab - 1}], got [{low}, {high}]")


def first_positions(position: int | Tensor, count: int, fed: Tensor, length: int) -> Tensor:
    """Each row's first position of a step, int64 [n] on the CPU; see `protocols.DecodingState`.

    Args:
        position: of all rows, or int64 [1] or [n].
        count: positions of the step.
        fed: how many each row was fed already, int64 [n] on the CPU.
        length: image positions m.

    Raises:
        ValueError: a row would leave out a position, or go beyond the last one.
    """
    if isinstance(position, int):
        first = torch.full_like(fed, position)
    else:
        first = position.to("cpu", torch.int64).expand(len(fed))
    if int(first.min()) < 0 or bool((first > fed).any()):
        raise ValueError(
            f"position: expected at most the next one, {int(fed.max())}, got {int(first.max())}"
        )
    if int(first.max()) + count > length:
        raise ValueError(
            f"position: expected at most {length - count} for {count} tokens, got "
            f"{int(first.max())}"
        )
    return first

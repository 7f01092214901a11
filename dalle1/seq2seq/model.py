"""An encoder of captions and a decoder of image tokens: DALL-E mini and mega (Dayma et al. 2021).

The encoder reads the caption in both directions. The decoder models the image tokens alone, one
after the other, and attends to the encoder's states. Captions have no probability here: the prior
is no `protocols.TextPrior`.

Dimensions: b batch, t text positions, m image positions, w width, v rows of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from dalle1.seq2seq.config import Seq2SeqConfig
from dalle1.seq2seq.decoding import Seq2SeqState, cache_bytes, window_bytes, working_bytes
from dalle1.seq2seq.stacks import Decoder, Encoder
from dalle1.seq2seq.tokens import check_tokens, is_token
from dalle1.transformer.config import Execution
from dalle1.transformer.loss import linear_cross_entropy
from dalle1.transformer.prior import ResidualPrior
from dalle1.transformer.residual import ResidualLayer
from dvae.storage import Kind


@dataclass
class Loss:
    """Mean in nats an image token."""

    loss: Tensor

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Values for the log, detached."""
        return {"image": self.loss.detach()}


class Seq2Seq(ResidualPrior):
    """Encoder-decoder model of a caption's image tokens.

    A `protocols.Prior`, a `protocols.WindowPrior` and a `protocols.TokenwisePrior`.
    """

    config: Seq2SeqConfig

    def __init__(
        self,
        config: Seq2SeqConfig | None = None,
        execution: Execution | None = None,
        seed: int | None = None,
    ) -> None:
        """seed: of the initial weights; None draws one from torch's generator."""
        super().__init__()
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        self.config = config or Seq2SeqConfig()
        execution = execution or Execution()
        self.encoder = Encoder(self.config, execution)
        self.decoder = Decoder(self.config, execution)
        self.initialize(seed)

    def initial_std(self, name: str) -> float:
        """That of all matrices, as published."""
        return self.config.init_std

    @property
    def residual_layers(self) -> Sequence[ResidualLayer]:
        """The layers of encoder and decoder, in the order that they are run in."""
        return cast(list[ResidualLayer], [*self.encoder.layers, *self.decoder.layers])

    def empty_caption(self) -> Tensor:
        """The text of no caption, int64 [text_length]: its tokens, then padding."""
        c = self.config
        padding = c.text_vocab if c.padding is None else c.padding
        device = self.decoder.head.weight.device
        text = torch.full((c.text_length,), padding, device=device)
        if c.padding is None:
            text += torch.arange(c.text_length, device=device)
        text[: len(c.empty_caption)] = torch.tensor(c.empty_caption, device=device)
        return text

    def start(self, captions: int, candidates: int, static: bool = False) -> Seq2SeqState:
        """Empty caches for so many captions and candidates of each; see `protocols.Prior`."""
        return Seq2SeqState(self.encoder, self.decoder, captions, candidates, static)

    def decoding_bytes(self) -> tuple[int, int]:
        """Bytes that decoding holds and works with, for each caption and for each candidate."""
        c, dtype = self.config, self.decoder.head.weight.dtype
        shared, each = cache_bytes(c, dtype)
        return shared, each + working_bytes(c, dtype)

    def best_window(self, rows: int) -> int:
        """1: see `protocols.WindowPrior`, and `SamplingOptions.window` for others.

        On a CPU a step of 8 positions costs 1.6 times a step of one for the two rows of a guided
        image, and twice as much for four. It pays where a row advances by more than that, which is
        not known of the published weights: tokens of natural images are hard to guess.
        """
        return 1

    def window_bytes(self, window: int) -> int:
        """Bytes that decoding holds and works with for each row; see `protocols.WindowPrior`."""
        return window_bytes(self.config, window, self.decoder.head.weight.dtype)

    def image_logits(self, text: Tensor, image: Tensor) -> Tensor:
        """See `forward`: the ids beyond the codec's vocabulary have no probability."""
        logits: Tensor = self(text, image)
        return logits

    def forward(self, text_tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """Logits of every image position, float32 [b, m, image_vocab].

        The head's further rows are left out: an id that the codec does not have is never drawn.

        text_tokens: int64 [b, text_length], padded; image_tokens: int64 [b, m], m <= grid^2, raster
        order. Raises ValueError when a shape, type or token does not fit.
        """
        logits: Tensor = self.decoder.head(self.states(text_tokens, image_tokens))
        return logits[..., : self.config.image_vocab].float()

    def states(self, text_tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """What the head reads, [b, m, w]; as `forward`."""
        check_tokens(self.config, text_tokens, image_tokens)
        counts = is_token(self.config, text_tokens)
        states: Tensor = self.decoder(image_tokens, self.encoder(text_tokens, counts), counts)
        return states

    def loss(
        self, text_tokens: Tensor, image_tokens: Tensor, text_count: float | None = None
    ) -> Loss:
        """Mean cross-entropy of the image tokens, over all rows of the head, as published.

        Shapes as for `forward`. text_count: not read, there is no loss of the text.
        """
        states = self.states(text_tokens, image_tokens)
        return Loss(
            linear_cross_entropy(
                rearrange(states, "b m w -> (b m) w"),
                self.decoder.head,
                rearrange(image_tokens, "b m -> (b m)"),
            )
        )

    def count_text_targets(self, text_tokens: Tensor) -> int:
        """0: no token of the text is a target."""
        return 0


KIND: Kind = Kind("prior", "seq2seq", Seq2SeqConfig, Seq2Seq, "seq2seq.safetensors")

"""The smallest parts that fit the seams: a palette codec, a unigram prior, a brightness ranker.

None of them knows a part of the paper's. Whoever draws, encodes, ranks or stores a model is tested
with these too; what works with the paper's alone fails here.

Dimensions: b images, n rows, k positions of a step, v colors of the palette.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from dvae.storage import Kind

PALETTE = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1))


class PaletteConfig(BaseModel):
    stride: int = 2


class PaletteCodec(nn.Module):
    """A token is the color of the palette that is nearest to the mean of a square; its images are
    twice as large as those that it reads, and it decodes full grids alone."""

    decodes_rows = False
    vocab_size = len(PALETTE)

    def __init__(self, config: PaletteConfig) -> None:
        super().__init__()
        self.config, self.stride, self.out_stride = config, config.stride, 2 * config.stride
        self.register_buffer("palette", torch.tensor(PALETTE, dtype=torch.float32))

    def encode(self, images: Tensor) -> Tensor:
        if images.shape[-1] % self.stride:
            raise ValueError(f"images: expected sides of {self.stride}n, got {images.shape[-1]}")
        means = nn.functional.avg_pool2d(images, self.stride).movedim(1, -1)
        return (means[..., None, :] - self.palette).square().sum(-1).argmin(-1)

    def decode(self, tokens: Tensor) -> Tensor:
        assert tokens.shape[1] == tokens.shape[2], "rows alone"
        grid = self.palette[tokens].movedim(-1, 1)
        return nn.functional.interpolate(grid, scale_factor=self.out_stride)


class UnigramConfig(BaseModel):
    text_vocab: int
    text_length: int
    side: int = 4


class UnigramPrior(nn.Module):
    """Every position has the same distribution, which the caption's first token tilts."""

    image_vocab = len(PALETTE)

    def __init__(self, config: UnigramConfig) -> None:
        super().__init__()
        self.config, self.grid = config, (config.side, config.side)
        self.text_vocab, self.text_length = config.text_vocab, config.text_length
        self.tilt = nn.Embedding(config.text_vocab + config.text_length, len(PALETTE))

    def empty_caption(self) -> Tensor:
        return self.text_vocab + torch.arange(self.text_length)

    def start(self, captions: int, candidates: int, static: bool) -> UnigramState:
        return UnigramState(self, candidates)

    def decoding_bytes(self) -> tuple[int, int]:
        return 0, 4 * len(PALETTE)

    def log_prob(self, text: Tensor, image: Tensor) -> Tensor:
        return self.tilt(text[:, 0]).log_softmax(-1).gather(1, image).sum(1)


class UnigramState:
    def __init__(self, prior: UnigramPrior, candidates: int) -> None:
        self.prior, self.candidates = prior, candidates

    def prefill(self, text: Tensor, prefix: Tensor | None = None) -> None:
        self.logits = self.prior.tilt(text[:, 0]).repeat_interleave(self.candidates, 0)

    def step(self, tokens: Tensor, position: int | Tensor) -> Tensor:
        assert len(tokens) == len(self.logits) and bool((tokens <= len(PALETTE)).all())
        return self.logits[:, None].expand(-1, tokens.shape[1], -1)


class BrightnessConfig(BaseModel):
    pass


class BrightnessRanker:
    """Bright images fit every caption, and more so those that say so. No module, no weights."""

    def __init__(self, config: BrightnessConfig | None = None) -> None:
        self.config = config or BrightnessConfig()

    def score(self, captions: Sequence[str], images: Tensor) -> Tensor:
        said = torch.tensor([2.0 if "bright" in caption else 1.0 for caption in captions])
        return said[:, None] * images.mean(dim=(1, 2, 3))


KINDS = (
    Kind("codec", "palette", PaletteConfig, PaletteCodec, "palette.safetensors"),
    Kind("prior", "unigram", UnigramConfig, UnigramPrior, "unigram.safetensors"),
    Kind("ranker", "brightness", BrightnessConfig, BrightnessRanker, None),
)

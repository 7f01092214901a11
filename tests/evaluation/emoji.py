"""A folder of emoji data of patterns, and the smallest model that draws them.

The codec's tokens are numbers of known images, one for each quarter of an image. The prior knows
the image of each caption and takes it as the first token with a probability of its own; then it
goes on with what it has begun, or was given. The ranker knows the images too.

Dimensions: b images, n rows, k positions of a step, v known images, t text positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from pydantic import BaseModel
from torch import Tensor, nn

from dalle1.data.emoji import EmojiDataset, read_emoji
from dalle1.data.emoji.export import write_emoji
from dalle1.data.emoji.packages import NAMES, PACKAGES, find_packages
from dvae.storage import Kind
from tests.data.emoji.packages import draw_patterns, write_packages

SPLITS = ("train", "test", "heldout_styles", "heldout_pairs")
COUNT, SEED, SIDE = 80, 3, 48


def write_data(folder: Path) -> tuple[Path, Path, EmojiDataset]:
    """The data, the folder of their packages, and what draws the same scenes."""
    styles, names = write_packages(folder / "written")
    draw_patterns(read_emoji(styles, names))
    packages = folder / "packages"
    for use, package in PACKAGES.items():
        (packages / package.name).parent.mkdir(parents=True, exist_ok=True)
        (names if use == NAMES else styles[use]).rename(packages / package.name)
    found = find_packages(PACKAGES, packages)
    write_emoji(folder / "data", found, SPLITS, COUNT, SEED, SIDE)
    emoji = read_emoji({s: found[s].folder for s in styles}, found[NAMES].folder)
    return folder / "data", packages, EmojiDataset(emoji)


class KnownConfig(BaseModel):
    count: int
    text_vocab: int = 0
    text_length: int = 0
    right: float = 0.5  # probability of the caption's own image


class QuarterCodec(nn.Module):
    decodes_rows = False
    stride = out_stride = SIDE // 2

    def __init__(self, config: KnownConfig) -> None:
        super().__init__()
        self.config, self.vocab_size = config, config.count
        self.register_buffer("images", torch.zeros(config.count, 3, SIDE, SIDE))

    def quarters(self, images: Tensor) -> Tensor:
        return rearrange(images, "b c (h y) (w x) -> b h w (c y x)", h=2, w=2)

    def encode(self, images: Tensor) -> Tensor:
        pairs = zip(self.quarters(images).flatten(1, 2).unbind(1), self._known(), strict=True)
        nearest = [torch.cdist(q, known).argmin(1) for q, known in pairs]
        return torch.stack(nearest, 1).reshape(-1, 2, 2)

    def decode(self, tokens: Tensor) -> Tensor:
        pairs = zip(tokens.flatten(1).unbind(1), self._known(), strict=True)
        found = [known[t] for t, known in pairs]
        folded = torch.stack(found, 1).reshape(len(tokens), 2, 2, -1)
        return rearrange(folded, "b h w (c y x) -> b c (h y) (w x)", c=3, y=self.stride)

    def _known(self) -> Sequence[Tensor]:
        return self.quarters(self.images).flatten(1, 2).unbind(1)


class KnowingPrior(nn.Module):
    grid = (2, 2)

    def __init__(self, config: KnownConfig) -> None:
        super().__init__()
        self.config, self.image_vocab = config, config.count
        self.text_vocab, self.text_length = config.text_vocab, config.text_length
        self.register_buffer("texts", torch.zeros(config.count, config.text_length).long())

    def empty_caption(self) -> Tensor:
        return self.text_vocab + torch.arange(self.text_length)

    def start(self, captions: int, candidates: int, static: bool) -> KnowingState:
        return KnowingState(self, candidates)

    def decoding_bytes(self) -> tuple[int, int]:
        return 0, 4 * self.image_vocab

    def log_prob(self, text: Tensor, image: Tensor) -> Tensor:
        raise NotImplementedError


class KnowingState:
    def __init__(self, prior: KnowingPrior, candidates: int) -> None:
        self.prior, self.candidates = prior, candidates

    def prefill(self, text: Tensor, prefix: Tensor | None = None) -> None:
        wanted = (text[:, None] == self.prior.texts).all(-1).long().argmax(1)
        self.wanted = wanted.repeat_interleave(self.candidates)

    def step(self, tokens: Tensor, position: int | Tensor) -> Tensor:
        count, right = self.prior.image_vocab, self.prior.config.right
        first = torch.full((len(tokens), count), (1 - right) / (count - 1)).log()
        first[torch.arange(len(tokens)), self.wanted] = torch.tensor(right).log()
        same = torch.where(torch.arange(count) == tokens, 0.0, -1e9)
        return torch.where(tokens == count, first, same)[:, None]


class KnowingRanker(nn.Module):
    """The nearer to the caption's own image, the better."""

    def __init__(self, config: KnownConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("images", torch.zeros(config.count, 3, SIDE, SIDE))
        self.captions: list[str] = []

    def score(self, captions: Sequence[str], images: Tensor) -> Tensor:
        own = torch.stack([self.images[self.captions.index(c)] for c in captions])
        return -(own[:, None] - images).square().mean(dim=(2, 3, 4))


KINDS = (
    Kind("codec", "quarters", KnownConfig, QuarterCodec, "quarters.safetensors"),
    Kind("prior", "knowing", KnownConfig, KnowingPrior, "knowing.safetensors"),
    Kind("ranker", "knowing", KnownConfig, KnowingRanker, "ranker.safetensors"),
)

"""The published dVAE restated as plain modules, from paper.md's facts alone: nothing of `dvae`.

Its classes bear the published package's names, so that `torch.save` writes files as published.
"""

from __future__ import annotations

import math
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv2d(nn.Module):
    def __init__(self, n_in: int, n_out: int, kw: int) -> None:
        super().__init__()
        self.n_in, self.n_out, self.kw = n_in, n_out, kw
        self.use_float16, self.device, self.requires_grad = True, torch.device("cpu"), False
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) / math.sqrt(n_in * kw * kw))
        self.b = nn.Parameter(0.2 * torch.randn(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=(self.kw - 1) // 2)


class Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, n_layers: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.post_gain = 1 / n_layers**2
        self.id_path: nn.Module = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = [n_in, n_out // 4, n_out // 4, n_out // 4, n_out]
        path: list[tuple[str, nn.Module]] = []
        for i, kernel in enumerate(kernels):
            path.append((f"relu_{i + 1}", nn.ReLU()))
            path.append((f"conv_{i + 1}", Conv2d(widths[i], widths[i + 1], kernel)))
        self.res_path = nn.Sequential(OrderedDict(path))

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.post_gain * self.res_path(x)


class EncoderBlock(Block):
    pass


class DecoderBlock(Block):
    pass


class Encoder(nn.Module):
    def __init__(self, n_hid: int, vocab: int, channels: int = 3) -> None:
        super().__init__()
        self.group_count, self.n_blk_per_group = 4, 2
        n, groups = n_hid, []
        for g, width in enumerate((1, 2, 4, 8)):
            blocks: list[tuple[str, nn.Module]] = []
            for i in range(2):
                blocks.append((f"block_{i + 1}", EncoderBlock(n, width * n_hid, 8, (3, 3, 3, 1))))
                n = width * n_hid
            if g < 3:
                blocks.append(("pool", nn.MaxPool2d(kernel_size=2)))
            groups.append((f"group_{g + 1}", nn.Sequential(OrderedDict(blocks))))
        last = nn.Sequential(OrderedDict([("relu", nn.ReLU()), ("conv", Conv2d(n, vocab, 1))]))
        self.blocks = nn.Sequential(
            OrderedDict([("input", Conv2d(channels, n_hid, 7)), *groups, ("output", last)])
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Decoder(nn.Module):
    def __init__(self, n_hid: int, vocab: int, n_init: int, channels: int = 3) -> None:
        super().__init__()
        self.group_count, self.n_blk_per_group = 4, 2
        n, groups = n_init, []
        for g, width in enumerate((8, 4, 2, 1)):
            blocks: list[tuple[str, nn.Module]] = []
            for i in range(2):
                blocks.append((f"block_{i + 1}", DecoderBlock(n, width * n_hid, 8, (1, 3, 3, 3))))
                n = width * n_hid
            if g < 3:
                blocks.append(("upsample", nn.Upsample(scale_factor=2, mode="nearest")))
            groups.append((f"group_{g + 1}", nn.Sequential(OrderedDict(blocks))))
        last = nn.Sequential(
            OrderedDict([("relu", nn.ReLU()), ("conv", Conv2d(n, 2 * channels, 1))])
        )
        self.blocks = nn.Sequential(
            OrderedDict([("input", Conv2d(vocab, n_init, 1)), *groups, ("output", last)])
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@contextmanager
def published_names() -> Iterator[None]:
    """While it lasts, the classes here are found, and written, under the published names."""
    places = {
        "dall_e.utils": (Conv2d,),
        "dall_e.encoder": (Encoder, EncoderBlock),
        "dall_e.decoder": (Decoder, DecoderBlock),
    }
    own = {c: c.__module__ for classes in places.values() for c in classes}
    sys.modules["dall_e"] = types.ModuleType("dall_e")
    for place, classes in places.items():
        sys.modules[place] = types.ModuleType(place)
        for c in classes:
            setattr(sys.modules[place], c.__name__, c)
            c.__module__ = place
    try:
        yield
    finally:
        for place in ("dall_e", *places):
            del sys.modules[place]
        for c, module in own.items():
            c.__module__ = module

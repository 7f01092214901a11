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


def _body(
    block: type[Block], n: int, widths: list[int], kernels: tuple[int, ...], between: nn.Module
) -> list[tuple[str, nn.Module]]:
    """Groups of two blocks, each but the last followed by `between`."""
    groups: list[tuple[str, nn.Module]] = []
    name = "pool" if isinstance(between, nn.MaxPool2d) else "upsample"
    for g, width in enumerate(widths):
        parts: list[tuple[str, nn.Module]] = []
        for i in range(2):
            parts.append((f"block_{i + 1}", block(n, width, 8, kernels)))
            n = width
        if g + 1 < len(widths):
            parts.append((name, between))
        groups.append((f"group_{g + 1}", nn.Sequential(OrderedDict(parts))))
    return groups


def _whole(first: Conv2d, body: list[tuple[str, nn.Module]], last: Conv2d) -> nn.Sequential:
    output = nn.Sequential(OrderedDict([("relu", nn.ReLU()), ("conv", last)]))
    return nn.Sequential(OrderedDict([("input", first), *body, ("output", output)]))


class Encoder(nn.Module):
    def __init__(self, n_hid: int, vocab: int, channels: int = 3) -> None:
        super().__init__()
        self.group_count, self.n_blk_per_group = 4, 2
        widths = [width * n_hid for width in (1, 2, 4, 8)]
        body = _body(EncoderBlock, n_hid, widths, (3, 3, 3, 1), nn.MaxPool2d(kernel_size=2))
        self.blocks = _whole(Conv2d(channels, n_hid, 7), body, Conv2d(8 * n_hid, vocab, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Decoder(nn.Module):
    def __init__(self, n_hid: int, vocab: int, n_init: int, channels: int = 3) -> None:
        super().__init__()
        self.group_count, self.n_blk_per_group = 4, 2
        widths = [width * n_hid for width in (8, 4, 2, 1)]
        between = nn.Upsample(scale_factor=2, mode="nearest")
        body = _body(DecoderBlock, n_init, widths, (1, 3, 3, 3), between)
        self.blocks = _whole(Conv2d(vocab, n_init, 1), body, Conv2d(n_hid, 2 * channels, 1))

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

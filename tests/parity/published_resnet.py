"""CLIP's ResNets restated: names and shapes as a list, the network as functions of a dictionary.

Nothing of `dalle1` and no module: weights are looked up by the published names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Name: layers, width, image side, embedding, text width, parameters of the whole CLIP.
PUBLISHED = {
    "RN50": ((3, 4, 6, 3), 64, 224, 1024, 512, 102_007_137),
    "RN101": ((3, 4, 23, 3), 64, 224, 512, 512, 119_688_033),
    "RN50x4": ((4, 6, 10, 6), 80, 288, 640, 640, 178_300_601),
    "RN50x16": ((6, 8, 18, 8), 96, 384, 768, 768, 290_979_217),
    "RN50x64": ((3, 15, 36, 10), 128, 448, 1024, 1024, 623_258_305),
}


def norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias", "running_mean", "running_var")
    shapes: dict[str, tuple[int, ...]] = {f"{name}.{part}": (channels,) for part in parts}
    return {**shapes, f"{name}.num_batches_tracked": ()}


def resnet_shapes(
    layers: tuple[int, ...], width: int, side: int, out: int
) -> dict[str, tuple[int, ...]]:
    """All names of the image encoder, with shapes."""
    half = width // 2
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (half, 3, 3, 3),
        "conv2.weight": (half, half, 3, 3),
        "conv3.weight": (width, half, 3, 3),
    }
    for number, channels in ((1, half), (2, half), (3, width)):
        shapes |= norm_shapes(f"bn{number}", channels)
    given = width
    for stage, blocks in enumerate(layers):
        c = width << stage
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            shapes[f"{name}.conv1.weight"] = (c, given, 1, 1)
            shapes[f"{name}.conv2.weight"] = (c, c, 3, 3)
            shapes[f"{name}.conv3.weight"] = (4 * c, c, 1, 1)
            for number, channels in ((1, c), (2, c), (3, 4 * c)):
                shapes |= norm_shapes(f"{name}.bn{number}", channels)
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * c, given, 1, 1)
                shapes |= norm_shapes(f"{name}.downsample.1", 4 * c)
            given = 4 * c
    shapes["attnpool.positional_embedding"] = ((side // 32) ** 2 + 1, given)
    for letter in "qkvc":
        rows = out if letter == "c" else given
        shapes[f"attnpool.{letter}_proj.weight"] = (rows, given)
        shapes[f"attnpool.{letter}_proj.bias"] = (rows,)
    return {f"visual.{name}": shape for name, shape in shapes.items()}


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Numbers under which no norm, stride or position can be left out unseen."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            state[name] = 0.5 + torch.rand(shape, generator=g)
        elif len(shape) == 1:
            state[name] = 0.3 * torch.randn(shape, generator=g) + float(name.endswith("weight"))
        else:
            state[name] = torch.randn(shape, generator=g) * math.prod(shape[1:]) ** -0.5
    return state


def resnet_embedding(state: dict[str, Tensor], x: Tensor, heads: int) -> Tensor:
    """What the image encoder gives for normalized pixels [b, 3, h, h]: [b, e]."""
    w = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}

    def normed(name: str, y: Tensor) -> Tensor:
        scale = w[f"{name}.weight"] / (w[f"{name}.running_var"] + 1e-5).sqrt()
        shift = w[f"{name}.bias"] - w[f"{name}.running_mean"] * scale
        return y * scale[:, None, None] + shift[:, None, None]

    def halved(y: Tensor) -> Tensor:  # the mean of squares of 2 x 2
        return (y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 4

    for i in (1, 2, 3):
        stride = 2 if i == 1 else 1
        y = F.conv2d(x, w[f"conv{i}.weight"], stride=stride, padding=1)
        x = normed(f"bn{i}", y).clamp(min=0)
    x = halved(x)
    for stage in (1, 2, 3, 4):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in w:
            name = f"layer{stage}.{block}"
            strided = block == 0 and stage > 1
            y = normed(f"{name}.bn1", F.conv2d(x, w[f"{name}.conv1.weight"])).clamp(min=0)
            y = F.conv2d(y, w[f"{name}.conv2.weight"], padding=1)
            y = normed(f"{name}.bn2", y).clamp(min=0)
            y = halved(y) if strided else y
            y = normed(f"{name}.bn3", F.conv2d(y, w[f"{name}.conv3.weight"]))
            if block == 0:
                x = halved(x) if strided else x
                x = normed(f"{name}.downsample.1", F.conv2d(x, w[f"{name}.downsample.0.weight"]))
            x = (x + y).clamp(min=0)
            block += 1
    tokens = x.flatten(2).mT
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
    tokens = tokens + w["attnpool.positional_embedding"]
    q, k, v = (
        tokens @ w[f"attnpool.{letter}_proj.weight"].T + w[f"attnpool.{letter}_proj.bias"]
        for letter in "qkv"
    )
    size = q.shape[-1] // heads
    pooled = []
    for head in range(heads):
        here = slice(head * size, (head + 1) * size)
        scores = (q[:, :1, here] @ k[:, :, here].mT) / math.sqrt(size)
        pooled.append((scores.softmax(-1) @ v[:, :, here])[:, 0])
    return torch.cat(pooled, 1) @ w["attnpool.c_proj.weight"].T + w["attnpool.c_proj.bias"]

"""Encoders, decoders and quantizers of the published VQGANs, restated from published.md's facts
alone: nothing of `dvae`.

Functions of a dictionary of weights under the published names of taming-transformers. They compute
in float64 and in other ways than a library would: norms from moments, attention position by
position, convolutions as sums over shifted maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
GROUPS = 32


def conv(
    x: Tensor, weights: Weights, name: str, stride: int = 1, pad: Sequence[int] = ()
) -> Tensor:
    """A convolution as a sum over its kernel's cells; pad: left, right, top, bottom."""
    kernel, bias = weights[f"{name}.weight"].double(), weights[f"{name}.bias"].double()
    side = kernel.shape[-1]
    left, right, top, bottom = pad or [side // 2] * 4
    b, c, h, w = x.shape
    framed = x.new_zeros(b, c, h + top + bottom, w + left + right)
    framed[:, :, top : top + h, left : left + w] = x
    rows = (framed.shape[2] - side) // stride + 1
    columns = (framed.shape[3] - side) // stride + 1
    result = bias.view(1, -1, 1, 1).expand(b, -1, rows, columns)
    for i in range(side):
        for j in range(side):
            part = framed[:, :, i::stride, j::stride][:, :, :rows, :columns]
            result = result + torch.einsum("bchw,dc->bdhw", part, kernel[:, :, i, j])
    return result


def norm(x: Tensor, weights: Weights, name: str, eps: float) -> Tensor:
    parts = []
    for group in x.chunk(GROUPS, dim=1):
        mean = group.mean(dim=(1, 2, 3), keepdim=True)
        variance = ((group - mean) ** 2).mean(dim=(1, 2, 3), keepdim=True)
        parts.append((group - mean) / (variance + eps) ** 0.5)
    scale, shift = (weights[f"{name}.{end}"].double() for end in ("weight", "bias"))
    return torch.cat(parts, dim=1) * scale[:, None, None] + shift[:, None, None]


def swish(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def block(x: Tensor, weights: Weights, name: str, eps: float) -> Tensor:
    y = conv(swish(norm(x, weights, f"{name}.norm1", eps)), weights, f"{name}.conv1")
    y = conv(swish(norm(y, weights, f"{name}.norm2", eps)), weights, f"{name}.conv2")
    if f"{name}.nin_shortcut.weight" in weights:
        x = conv(x, weights, f"{name}.nin_shortcut")
    return x + y


def attention(x: Tensor, weights: Weights, name: str, eps: float) -> Tensor:
    y = norm(x, weights, f"{name}.norm", eps)
    q, k, v = (conv(y, weights, f"{name}.{part}").flatten(2) for part in "qkv")
    columns = []
    for position in range(q.shape[2]):
        scores = (q[:, :, position, None] * k).sum(dim=1) * q.shape[1] ** -0.5
        shares = (scores - scores.max(dim=1, keepdim=True).values).exp()
        shares = shares / shares.sum(dim=1, keepdim=True)
        columns.append((v * shares[:, None]).sum(dim=2))
    mixed = torch.stack(columns, dim=2).view_as(x)
    return x + conv(mixed, weights, f"{name}.proj_out")


def _count(weights: Weights, stem: str) -> int:
    return len({name[len(stem) :].split(".")[0] for name in weights if name.startswith(stem)})


def _blocks(x: Tensor, weights: Weights, stem: str, eps: float) -> Tensor:
    for j in range(_count(weights, f"{stem}.block.")):
        x = block(x, weights, f"{stem}.block.{j}", eps)
        if f"{stem}.attn.{j}.q.weight" in weights:
            x = attention(x, weights, f"{stem}.attn.{j}", eps)
    return x


def _middle(x: Tensor, weights: Weights, stem: str, eps: float) -> Tensor:
    x = block(x, weights, f"{stem}.block_1", eps)
    return block(attention(x, weights, f"{stem}.attn_1", eps), weights, f"{stem}.block_2", eps)


def encoder(pixels: Tensor, weights: Weights, eps: float = 1e-6, stem: str = "encoder") -> Tensor:
    """Latent maps of pixels in the net's range."""
    x = conv(pixels.double(), weights, f"{stem}.conv_in")
    levels = _count(weights, f"{stem}.down.")
    for i in range(levels):
        x = _blocks(x, weights, f"{stem}.down.{i}", eps)
        if i < levels - 1:
            x = conv(x, weights, f"{stem}.down.{i}.downsample.conv", stride=2, pad=(0, 1, 0, 1))
    x = _middle(x, weights, f"{stem}.mid", eps)
    return conv(swish(norm(x, weights, f"{stem}.norm_out", eps)), weights, f"{stem}.conv_out")


def decoder(z: Tensor, weights: Weights, eps: float = 1e-6, stem: str = "decoder") -> Tensor:
    """Pixels in the net's range, or bands, of latent maps."""
    x = _middle(conv(z.double(), weights, f"{stem}.conv_in"), weights, f"{stem}.mid", eps)
    for i in reversed(range(_count(weights, f"{stem}.up."))):
        x = _blocks(x, weights, f"{stem}.up.{i}", eps)
        if i > 0:
            doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = conv(doubled, weights, f"{stem}.up.{i}.upsample.conv")
    return conv(swish(norm(x, weights, f"{stem}.norm_out", eps)), weights, f"{stem}.conv_out")


def nearest(z: Tensor, codes: Tensor, normalized: bool = False) -> Tensor:
    """Tokens [b, h, w]: of each position the first code of the least distance."""
    codes = codes.double()
    rows = z.double().movedim(1, -1)
    if normalized:
        codes = codes / codes.norm(dim=1, keepdim=True)
        rows = rows / rows.norm(dim=-1, keepdim=True)
    return ((rows[..., None, :] - codes) ** 2).sum(dim=-1).argmin(dim=-1)


def largest_logit(z: Tensor, weights: Weights) -> Tensor:
    """Tokens [b, h, w] of a Gumbel quantizer without noise."""
    return conv(z, weights, "quantize.proj").argmax(dim=1)


def from_bands(maps: Tensor) -> Tensor:
    """Images [b, 3, 2h, 2w] of Sber's 12 maps, pixel by pixel."""
    b, _, h, w = maps.shape
    images = maps.new_zeros(b, 3, 2 * h, 2 * w)
    for color in range(3):
        ll = maps[:, color]
        lh, hl, hh = (maps[:, 3 + 3 * color + band] for band in range(3))
        images[:, color, 0::2, 0::2] = 0.5 * (ll + lh + hl + hh)
        images[:, color, 1::2, 0::2] = 0.5 * (ll - lh + hl - hh)
        images[:, color, 0::2, 1::2] = 0.5 * (ll + lh - hl - hh)
        images[:, color, 1::2, 1::2] = 0.5 * (ll - lh - hl + hh)
    return images


def shapes(
    width: int,
    multipliers: Sequence[int],
    attention_levels: Sequence[int],
    latent: int,
    dim: int,
    codes: int,
    gumbel: bool = False,
    out: int = 3,
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a published file's weights."""
    found: dict[str, tuple[int, ...]] = {}

    def add(name: str, n_out: int, n_in: int = 0, side: int = 1) -> None:
        found[f"{name}.weight"] = (n_out, n_in, side, side) if n_in else (n_out,)
        found[f"{name}.bias"] = (n_out,)

    def add_block(name: str, n_in: int, n_out: int) -> None:
        add(f"{name}.norm1", n_in)
        add(f"{name}.conv1", n_out, n_in, 3)
        add(f"{name}.norm2", n_out)
        add(f"{name}.conv2", n_out, n_out, 3)
        if n_in != n_out:
            add(f"{name}.nin_shortcut", n_out, n_in)

    def add_attention(name: str, n: int) -> None:
        add(f"{name}.norm", n)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{name}.{part}", n, n)

    def add_middle(name: str, n: int) -> None:
        add_block(f"{name}.block_1", n, n)
        add_attention(f"{name}.attn_1", n)
        add_block(f"{name}.block_2", n, n)

    last = len(multipliers) - 1
    add("encoder.conv_in", width, 3, 3)
    n = width
    for i, multiplier in enumerate(multipliers):
        for j in range(2):
            add_block(f"encoder.down.{i}.block.{j}", n, width * multiplier)
            n = width * multiplier
            if i in attention_levels:
                add_attention(f"encoder.down.{i}.attn.{j}", n)
        if i < last:
            add(f"encoder.down.{i}.downsample.conv", n, n, 3)
    add_middle("encoder.mid", n)
    add("encoder.norm_out", n)
    add("encoder.conv_out", latent, n, 3)
    add("decoder.conv_in", n, latent, 3)
    add_middle("decoder.mid", n)
    for i in range(last, -1, -1):
        for j in range(3):
            add_block(f"decoder.up.{i}.block.{j}", n, width * multipliers[i])
            n = width * multipliers[i]
            if i in attention_levels:
                add_attention(f"decoder.up.{i}.attn.{j}", n)
        if i > 0:
            add(f"decoder.up.{i}.upsample.conv", n, n, 3)
    add("decoder.norm_out", n)
    add("decoder.conv_out", out, n, 3)
    add("quant_conv", dim, latent)
    add("post_quant_conv", latent, dim)
    if gumbel:
        add("quantize.proj", codes, dim)
    found["quantize.embed.weight" if gumbel else "quantize.embedding.weight"] = (codes, dim)
    return found


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Weights of such names, none of them near zero, so that each is seen in what comes out."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        numbers = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            numbers /= (shape[1] * shape[2] * shape[3]) ** 0.5
        elif len(shape) == 1:
            numbers = 0.2 * numbers + ("norm" in name and name.endswith("weight"))
        weights[name] = numbers
    return weights

"""minDALL-E's second stage restated as functions of its published weights, from published.md's
section 3 alone: nothing of `dalle1`, and the original's order of operations.

Dimensions: b batch, t text positions, m image positions, n = t + m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What the weights alone do not tell."""

    layers: int = 3
    width: int = 16
    heads: int = 2
    text_length: int = 6
    side: int = 4
    text_classes: int = 20
    image_classes: int = 9


def make_weights(s: Shape, seed: int = 0) -> Weights:
    """Random weights under the published names."""
    g = torch.Generator().manual_seed(seed)
    d = s.width
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb_img.weight": (s.image_classes, d),
        "tok_emb_txt.weight": (s.text_classes, d),
        "pos_emb_img.weight": (s.side**2, d),
        "pos_emb_txt.weight": (s.text_length, d),
    }
    for i in range(s.layers):
        for name, rows, columns in (
            ("attn.key", d, d), ("attn.query", d, d), ("attn.value", d, d), ("attn.proj", d, d),
            ("mlp.0", 4 * d, d), ("mlp.2", d, 4 * d),
        ):  # fmt: skip
            shapes[f"blocks.{i}.{name}.weight"] = (rows, columns)
            shapes[f"blocks.{i}.{name}.bias"] = (rows,)
        for name in ("ln1", "ln2"):
            shapes[f"blocks.{i}.{name}.weight"] = (d,)
            shapes[f"blocks.{i}.{name}.bias"] = (d,)
    shapes |= {"ln_f.weight": (d,), "ln_f.bias": (d,)}
    shapes |= {"head_img.weight": (s.image_classes, d), "head_txt.weight": (s.text_classes, d)}
    weights = {name: 0.3 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return {
        name: x + 1 if ".ln" in f".{name}" and name.endswith("weight") else x
        for name, x in weights.items()
    }


def logits(w: Weights, s: Shape, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Of text 1 ... t - 1 and of image 0 ... m', int64 [b, t] and [b, m']."""
    x = w["tok_emb_txt.weight"][text] + w["pos_emb_txt.weight"][: s.text_length]
    pictures = w["tok_emb_img.weight"][image] + w["pos_emb_img.weight"][: image.shape[1]]
    x = torch.cat([x, pictures], dim=1)
    for i in range(s.layers):
        at = f"blocks.{i}"
        x = x + _attention(w, f"{at}.attn", _norm(w, f"{at}.ln1", x), s.heads)
        h = F.gelu(_linear(w, f"{at}.mlp.0", _norm(w, f"{at}.ln2", x)))
        x = x + _linear(w, f"{at}.mlp.2", h)
    x = _norm(w, "ln_f", x)
    t = s.text_length
    return x[:, : t - 1] @ w["head_txt.weight"].t(), x[:, t - 1 :] @ w["head_img.weight"].t()


def _attention(w: Weights, at: str, x: Tensor, heads: int) -> Tensor:
    b, n, d = x.shape
    q, k, v = (
        _linear(w, f"{at}.{name}", x).reshape(b, n, heads, d // heads).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    scores = q @ (k.transpose(-1, -2) * (1.0 / math.sqrt(d // heads)))
    scores = scores.masked_fill(torch.ones(n, n).tril() == 0, -math.inf)
    y = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, d)
    return _linear(w, f"{at}.proj", y)


def _linear(w: Weights, at: str, x: Tensor) -> Tensor:
    return x @ w[f"{at}.weight"].t() + w[f"{at}.bias"]


def _norm(w: Weights, at: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{at}.weight"], w[f"{at}.bias"], 1e-5)


def draw(w: Weights, s: Shape, text: Tensor) -> Tensor:
    """Image ids of captions, int64 [b, m], each the likeliest behind those before it."""
    image = text[:, :0]
    for _ in range(s.side**2):
        last = logits(w, s, text, image)[1][:, -1]
        image = torch.cat([image, last.argmax(dim=-1, keepdim=True)], dim=1)
    return image

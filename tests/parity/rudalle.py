"""ruDALL-E restated as functions of its published weights, from published.md's section 2 alone.

Nothing of `dalle1` is used, and everything is in the original's order: whole boolean masks made
cell by cell, -10,000 for what is masked, scores divided by 32 and multiplied again, the whole
stream run anew for every token. Weights are a dictionary under their published names.

Dimensions: b batch, t text positions, m = side^2 image positions, n stream positions, v classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
BOS = 2
RADIUS = 5  # of the convolution's kernel of 11


@dataclass(frozen=True)
class Shape:
    """What the weights alone do not tell."""

    version: str  # "v2" or "v3"
    layers: int = 3
    width: int = 16
    heads: int = 2
    text_length: int = 6
    side: int = 4
    text_classes: int = 26  # tokens, and a padding for each text position
    image_classes: int = 9

    @property
    def tokens(self) -> int:
        return self.text_classes - self.text_length

    @property
    def length(self) -> int:
        return self.text_length + self.side**2


def masks(s: Shape) -> Weights:
    """row_mask, col_mask, conv_mask: bool [length, length], [query, key]."""
    n, t = s.length, s.text_length
    found = {}
    for name in ("row_mask", "col_mask", "conv_mask"):
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        for key in range(t, n):
            for query in range(key + 1, n):
                mask[query, key] = _sees(name, query - t, key - t, s)
        found[name] = mask
    return found


def _sees(name: str, query: int, key: int, s: Shape) -> bool:
    """Whether an image cell sees an earlier one."""
    if name == "row_mask":
        return query - key <= s.side
    if name == "col_mask":
        return (query - key) % s.side == 0
    (row, column), (r, c) = divmod(query, s.side), divmod(key, s.side)
    steps = range(-RADIUS, RADIUS + 1)
    if s.version == "v2":  # the window around the key goes on at the opposite edges
        return any((r + i) % s.side == row for i in steps) and any(
            (c + j) % s.side == column for j in steps
        )
    return abs(row - r) <= RADIUS and abs(column - c) <= RADIUS


def make_weights(s: Shape, seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    """Random weights under the published names, the masks among them."""
    g = torch.Generator().manual_seed(seed)
    d = s.width
    maps = {
        "attention.query_key_value": (3 * d, d),
        "attention.dense": (d, d),
        "mlp.dense_h_to_4h": (4 * d, d),
        "mlp.dense_4h_to_h": (d, 4 * d),
    }
    norms = ("input", "before_first_addition", "post_attention", "before_second_addition")
    shapes: dict[str, tuple[int, ...]] = {
        "text_embeddings.weight": (s.text_classes, d),
        "image_embeddings.weight": (s.image_classes, d),
        "text_pos_embeddings.weight": (s.text_length + 1, d),
        "image_row_embeddings.weight": (s.side, d),
        "image_col_embeddings.weight": (s.side, d),
    }
    for i in range(s.layers):
        for name, (rows, columns) in maps.items():
            shapes[f"transformer.layers.{i}.{name}.weight"] = (rows, columns)
            shapes[f"transformer.layers.{i}.{name}.bias"] = (rows,)
        for name in norms:
            shapes[f"transformer.layers.{i}.{name}_layernorm.weight"] = (d,)
            shapes[f"transformer.layers.{i}.{name}_layernorm.bias"] = (d,)
    for name in ("transformer.final_layernorm", "to_logits.0"):
        shapes[f"{name}.weight"] = (d,)
        shapes[f"{name}.bias"] = (d,)
    shapes["to_logits.1.weight"] = (s.text_classes + s.image_classes, d)
    shapes["to_logits.1.bias"] = (s.text_classes + s.image_classes,)
    weights = {}
    for name, shape in shapes.items():
        x = 0.3 * torch.randn(shape, generator=g)
        weights[name] = (x + 1 if "norm.weight" in name or name == "to_logits.0.weight" else x).to(
            dtype
        )
    number = torch.bool if s.version == "v3" else dtype
    for name, mask in masks(s).items():
        weights[f"transformer.{name}"] = mask.to(number)
    return weights


def logits(w: Weights, s: Shape, ids: Tensor) -> Tensor:
    """Every position's, [b, n, v], of text and then image ids, int64 [b, t + m']."""
    text, image = ids[:, : s.text_length], ids[:, s.text_length :]
    own = torch.arange(s.text_length) + s.tokens
    text = torch.where(text == 0, own, text)
    if s.version == "v2":
        text = torch.cat([torch.full_like(text[:, :1], BOS), text], dim=1)
    x = w["text_embeddings.weight"][text] + w["text_pos_embeddings.weight"][: text.shape[1]]
    k = torch.arange(image.shape[1])
    rows, columns = w["image_row_embeddings.weight"], w["image_col_embeddings.weight"]
    pictures = w["image_embeddings.weight"][image] + rows[k // s.side] + columns[k % s.side]
    x = torch.cat([x, pictures], dim=1)[:, : s.length]
    x = x * 0.1 + x.detach() * 0.9
    made = masks(s)
    for i in range(s.layers):
        name = "col_mask" if (i - 1) % 4 == 0 else "row_mask" if i < s.layers - 1 else "conv_mask"
        x = _layer(w, f"transformer.layers.{i}", x, made[name], s.heads)
    x = _norm(w, "transformer.final_layernorm", x)
    return _linear(w, "to_logits.1", _norm(w, "to_logits.0", x))


def _layer(w: Weights, at: str, x: Tensor, mask: Tensor, heads: int) -> Tensor:
    a = _attention(w, f"{at}.attention", _norm(w, f"{at}.input_layernorm", x), mask, heads)
    y = x + _norm(w, f"{at}.before_first_addition_layernorm", a)
    h = _linear(w, f"{at}.mlp.dense_h_to_4h", _norm(w, f"{at}.post_attention_layernorm", y))
    h = 0.5 * h * (1 + torch.tanh(0.7978845608028654 * h * (1 + 0.044715 * h * h)))
    h = _linear(w, f"{at}.mlp.dense_4h_to_h", h)
    return y + _norm(w, f"{at}.before_second_addition_layernorm", h)


def _attention(w: Weights, at: str, x: Tensor, mask: Tensor, heads: int) -> Tensor:
    b, n, d = x.shape
    thirds = _linear(w, f"{at}.query_key_value", x).split(d, dim=-1)
    q, k, v = (y.reshape(b, n, heads, d // heads).permute(0, 2, 1, 3) for y in thirds)
    scores = (q / math.sqrt(d // heads)) @ k.transpose(-1, -2)
    shown = mask[:n, :n].float()
    scores = scores * shown - 10000.0 * (1.0 - shown)
    scaled = scores / 32
    scores = (scaled - scaled.detach().amax(dim=(-1, -2), keepdim=True)) * 32
    y = (scores.softmax(dim=-1) @ v).permute(0, 2, 1, 3).reshape(b, n, d)
    return _linear(w, f"{at}.dense", y).clamp(-65504, 65504)


def _linear(w: Weights, at: str, x: Tensor) -> Tensor:
    return x @ w[f"{at}.weight"].t() + w[f"{at}.bias"]


def _norm(w: Weights, at: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{at}.weight"], w[f"{at}.bias"], 1e-5)


def losses(w: Weights, s: Shape, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As published: all, text, image, the off-by-one of v3 included (section 2.6)."""
    text, image = ids[:, : s.text_length], ids[:, s.text_length :]
    text = torch.where(text == 0, torch.arange(s.text_length) + s.tokens, text)
    if s.version == "v2":
        text = torch.cat([torch.full_like(text[:, :1], BOS), text], dim=1)
    labels = torch.cat([text[:, 1:], image], dim=1)
    found = logits(w, s, ids)
    t = s.text_length
    of_text = F.cross_entropy(found[:, :t, : s.text_classes].flatten(0, 1), labels[:, :t].flatten())
    last = None if s.version == "v2" else -1
    of_image = F.cross_entropy(
        found[:, t:last, s.text_classes :].flatten(0, 1), labels[:, t:].flatten()
    )
    return (of_text + 7 * of_image) / 8, of_text, of_image


def draw(w: Weights, s: Shape, text: Tensor) -> Tensor:
    """Image ids of captions, int64 [b, m], each the likeliest behind those before it."""
    ids = text
    for _ in range(s.side**2):
        last = logits(w, s, ids)[:, -1, s.text_classes :]
        ids = torch.cat([ids, last.argmax(dim=-1, keepdim=True)], dim=1)
    return ids[:, s.text_length :]

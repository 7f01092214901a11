"""DALL-E mini once more, written from its description: plain functions on weights as flax names
them, kernels [in, out], those of all layers in one array. Nothing is shared with `dalle1.seq2seq`.

Dimensions: L layers, b batch, q queries, k keys, h heads, e head size, d width, f feed-forward
width, v rows of the head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PAD = 1


@dataclass(frozen=True)
class Shape:
    d: int = 32
    heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 3
    ffn: int = 27
    text_vocab: int = 50
    text_length: int = 9
    image_vocab: int = 40  # of the codec
    rows: int = 41
    start: int = 40
    image_length: int = 16


def random_weights(s: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by dotted flax names, as a scanned model has them; scales and biases are random."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, around: float = 0.0, std: float = 0.3) -> np.ndarray:
        return (around + std * rng.standard_normal(shape)).astype(np.float32)

    def matrix(*shape: int) -> np.ndarray:
        return draw(*shape, std=1.5 / math.sqrt(shape[-2]))

    w: dict[str, np.ndarray] = {"lm_head.kernel": matrix(s.d, s.rows)}
    for side, layers, vocab, length, attentions, norms in (
        ("encoder", s.encoder_layers, s.text_vocab, s.text_length, 1, 2),
        ("decoder", s.decoder_layers, s.rows, s.image_length, 2, 4),
    ):
        base = f"model.{side}"
        w[f"{base}.embed_tokens.embedding"] = draw(vocab, s.d)
        w[f"{base}.embed_positions.embedding"] = draw(length, s.d)
        w[f"{base}.layernorm_embedding.scale"] = draw(s.d, around=1)
        w[f"{base}.layernorm_embedding.bias"] = draw(s.d)
        w[f"{base}.final_ln.bias"] = draw(s.d)
        stack = f"{base}.layers.FlaxBart{side.capitalize()}Layers"
        for i in range(attentions):
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                w[f"{stack}.FlaxBartAttention_{i}.{name}.kernel"] = matrix(layers, s.d, s.d)
        for i in range(norms):
            w[f"{stack}.LayerNorm_{i}.bias"] = draw(layers, s.d)
            if i % 2:
                w[f"{stack}.LayerNorm_{i}.scale"] = draw(layers, s.d, around=1)
        w[f"{stack}.GLU_0.LayerNorm_0.bias"] = draw(layers, s.d)
        w[f"{stack}.GLU_0.LayerNorm_1.bias"] = draw(layers, s.ffn)
        w[f"{stack}.GLU_0.Dense_0.kernel"] = matrix(layers, s.d, s.ffn)
        w[f"{stack}.GLU_0.Dense_1.kernel"] = matrix(layers, s.d, s.ffn)
        w[f"{stack}.GLU_0.Dense_2.kernel"] = matrix(layers, s.ffn, s.d)
    return w


def unscanned(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with a name for each layer, as a model that is not scanned has them."""
    result: dict[str, np.ndarray] = {}
    for name, value in weights.items():
        if ".layers." not in name:
            result[name] = value
            continue
        before, rest = name.split("Layers.", 1)
        for i, one in enumerate(value):
            result[f"{before}Layer_{i}.{rest}"] = one
    return result


def min_dalle_weights(
    weights: dict[str, np.ndarray],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The two dictionaries of min-dalle's files, in float16: encoder, decoder."""
    norms = {
        "encoder": {
            "LayerNorm_0": "pre_self_attn_layer_norm",
            "LayerNorm_1": "self_attn_layer_norm",
        },
    }
    norms["decoder"] = norms["encoder"] | {
        "LayerNorm_2": "pre_encoder_attn_layer_norm",
        "LayerNorm_3": "encoder_attn_layer_norm",
    }
    fixed = {
        "FlaxBartAttention_0": "self_attn", "FlaxBartAttention_1": "encoder_attn",
        "GLU_0.LayerNorm_": "glu.ln", "GLU_0.Dense_": "glu.fc", ".kernel": ".weight",
        ".embedding": ".weight", ".scale": ".weight",
    }  # fmt: skip
    sides: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for name, value in unscanned(weights).items():
        side = "encoder" if ".encoder." in name else "decoder"
        key = name.removeprefix(f"model.{side}.")
        key = key.replace(f"FlaxBart{side.capitalize()}Layer_", "")
        for theirs, torchs in fixed.items():
            key = key.replace(theirs, torchs)
        for theirs, torchs in norms[side].items():
            key = key.replace(f".{theirs}.", f".{torchs}.")
        tensor = torch.from_numpy(value.T.copy() if name.endswith("kernel") else value)
        sides[side][key] = tensor.half()
    return sides["encoder"], sides["decoder"]


class Restated:
    """Logits and greedy images of such weights."""

    def __init__(self, shape: Shape, weights: dict[str, np.ndarray], dtype: torch.dtype) -> None:
        self.s = shape
        self.w = {name: torch.from_numpy(value).to(dtype) for name, value in weights.items()}

    def _norm(self, x: Tensor, name: str, layer: int | None = None) -> Tensor:
        y = (x - x.mean(-1, keepdim=True)) / torch.sqrt(
            x.var(-1, unbiased=False, keepdim=True) + 1e-5
        )
        for kind in ("scale", "bias"):
            value = self.w.get(f"{name}.{kind}")
            if value is not None:
                value = value if layer is None else value[layer]
                y = y * value if kind == "scale" else y + value
        return y

    def _attention(
        self, x: Tensor, source: Tensor, hidden: Tensor, name: str, layer: int
    ) -> Tensor:
        """hidden: bool [b or 1, q or 1, k], what may not be read."""

        def heads(states: Tensor, projection: str) -> Tensor:
            y = states @ self.w[f"{name}.{projection}.kernel"][layer]
            return y.reshape(*y.shape[:2], self.s.heads, -1)

        q, k, v = heads(x, "q_proj"), heads(source, "k_proj"), heads(source, "v_proj")
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(hidden[:, None], -math.inf)
        y = torch.einsum("bhqk,bkhe->bqhe", torch.softmax(scores, -1), v)
        return y.reshape(x.shape) @ self.w[f"{name}.out_proj.kernel"][layer]

    def _glu(self, x: Tensor, name: str, layer: int) -> Tensor:
        x = self._norm(x, f"{name}.LayerNorm_0", layer)
        gate = x @ self.w[f"{name}.Dense_0.kernel"][layer]
        gate = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
        y = self._norm(
            gate * (x @ self.w[f"{name}.Dense_1.kernel"][layer]), f"{name}.LayerNorm_1", layer
        )
        return y @ self.w[f"{name}.Dense_2.kernel"][layer]

    def _embed(self, ids: Tensor, side: str) -> Tensor:
        table = self.w[f"model.{side}.embed_tokens.embedding"]
        places = self.w[f"model.{side}.embed_positions.embedding"][: ids.shape[1]]
        return self._norm(table[ids] + places, f"model.{side}.layernorm_embedding")

    def encode(self, text: Tensor) -> Tensor:
        x, name = self._embed(text, "encoder"), "model.encoder.layers.FlaxBartEncoderLayers"
        for i in range(self.s.encoder_layers):
            y = self._norm(x, f"{name}.LayerNorm_0", i)
            y = self._attention(y, y, (text == PAD)[:, None], f"{name}.FlaxBartAttention_0", i)
            x = x + self._norm(y, f"{name}.LayerNorm_1", i)
            x = x + self._glu(x, f"{name}.GLU_0", i)
        return self._norm(x, "model.encoder.final_ln")

    def logits(self, text: Tensor, image: Tensor) -> Tensor:
        """[b, m, v] of all positions, of text [b, t] and image [b, m]."""
        first = torch.full_like(image[:, :1], self.s.start)
        return self.decode(text, self.encode(text), torch.cat([first, image[:, :-1]], 1))

    def decode(self, text: Tensor, states: Tensor, ids: Tensor) -> Tensor:
        x, name = self._embed(ids, "decoder"), "model.decoder.layers.FlaxBartDecoderLayers"
        p = torch.arange(ids.shape[1])
        for i in range(self.s.decoder_layers):
            y = self._norm(x, f"{name}.LayerNorm_0", i)
            y = self._attention(y, y, (p > p[:, None])[None], f"{name}.FlaxBartAttention_0", i)
            x = x + self._norm(y, f"{name}.LayerNorm_1", i)
            y = self._norm(x, f"{name}.LayerNorm_2", i)
            y = self._attention(y, states, (text == PAD)[:, None], f"{name}.FlaxBartAttention_1", i)
            x = x + self._norm(y, f"{name}.LayerNorm_3", i)
            x = x + self._glu(x, f"{name}.GLU_0", i)
        return self._norm(x, "model.decoder.final_ln") @ self.w["lm_head.kernel"]

    def draw_greedily(self, text: Tensor, empty: Tensor, guidance: float) -> Tensor:
        """The likeliest token at every position, of two passes without caches: [b, m]."""
        ids = torch.full((len(text), 1), self.s.start)
        for _ in range(self.s.image_length):
            said, unsaid = (self.decode(t, self.encode(t), ids)[:, -1] for t in (text, empty))
            logits = unsaid + guidance * (said - unsaid)
            ids = torch.cat([ids, logits[:, : self.s.image_vocab].argmax(-1, keepdim=True)], 1)
        return ids[:, 1:]

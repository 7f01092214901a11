"""The weights of DALL-E mini and mega: ours, and what they are called in the two layouts published.

Dimensions of the shapes: d width, f feed-forward width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dalle1.published.parts import LazyWeight, PublishedPart
from dalle1.published.settings import mistake
from dalle1.seq2seq.config import Seq2SeqConfig
from dalle1.seq2seq.model import KIND, Seq2Seq
from dalle1.text.bart import BARTTokenizer

SELF, CROSS = "FlaxBartAttention_0", "FlaxBartAttention_1"
# Ours, and what it is made of, put together by rows: flax's names, and those of min-dalle's files.
# Of encoder and decoder:
STACK = {
    "embedding.weight": {"embed_tokens.embedding": "embed_tokens.weight"},
    "position.weight": {"embed_positions.embedding": "embed_positions.weight"},
    "embedding_norm.weight": {"layernorm_embedding.scale": "layernorm_embedding.weight"},
    "embedding_norm.bias": {"layernorm_embedding.bias": "layernorm_embedding.bias"},
    "norm.bias": {"final_ln.bias": "final_ln.bias"},
}
HEAD = {"decoder.head.weight": {"lm_head.kernel": "lm_head.weight"}}
# Of a layer of either:
LAYER = {
    "attention.norm.bias": {"LayerNorm_0.bias": "pre_self_attn_layer_norm.bias"},
    "attention.qkv.weight": {
        f"{SELF}.{map}.kernel": f"self_attn.{map}.weight" for map in ("q_proj", "k_proj", "v_proj")
    },
    "attention.out.weight": {f"{SELF}.out_proj.kernel": "self_attn.out_proj.weight"},
    "attention.out_norm.weight": {"LayerNorm_1.scale": "self_attn_layer_norm.weight"},
    "attention.out_norm.bias": {"LayerNorm_1.bias": "self_attn_layer_norm.bias"},
    "mlp.norm.bias": {"GLU_0.LayerNorm_0.bias": "glu.ln0.bias"},
    "mlp.up.weight": {
        "GLU_0.Dense_0.kernel": "glu.fc0.weight",
        "GLU_0.Dense_1.kernel": "glu.fc1.weight",
    },
    "mlp.inner_norm.bias": {"GLU_0.LayerNorm_1.bias": "glu.ln1.bias"},
    "mlp.down.weight": {"GLU_0.Dense_2.kernel": "glu.fc2.weight"},
}
# And of a layer of the decoder:
CROSS_LAYER = {
    "cross_attention.norm.bias": {"LayerNorm_2.bias": "pre_encoder_attn_layer_norm.bias"},
    "cross_attention.q.weight": {f"{CROSS}.q_proj.kernel": "encoder_attn.q_proj.weight"},
    "cross_attention.kv.weight": {
        f"{CROSS}.{map}.kernel": f"encoder_attn.{map}.weight" for map in ("k_proj", "v_proj")
    },
    "cross_attention.out.weight": {f"{CROSS}.out_proj.kernel": "encoder_attn.out_proj.weight"},
    "cross_attention.out_norm.weight": {"LayerNorm_3.scale": "encoder_attn_layer_norm.weight"},
    "cross_attention.out_norm.bias": {"LayerNorm_3.bias": "encoder_attn_layer_norm.bias"},
}
# What the model is here. Another value is another architecture, which the weights need.
FIXED: dict[str, Any] = {
    "use_bias": False,
    "ln_type": "layernorm",
    "ln_positions": "normformer",
    "use_glu": True,
    "activation_function": "gelu",
    "use_head_scale": False,
    "use_cosine_attention": False,
    "use_absolute_position_embeddings": True,
    "use_swin_position_embeddings": False,
    "use_deepnet_scaling": False,
    "use_alibi": False,
    "sinkhorn_iters": 1,
    "use_final_ln_encoder": True,
    "use_final_ln_decoder": True,
    "force_ln_scale": False,
    "scale_embedding": False,
    "tie_word_embeddings": False,
}


# A weight of the file: its name, its shape as ours has it (rows first), and its numbers.
Found = tuple[str, tuple[int, ...], LazyWeight]


@dataclass(frozen=True)
class Source:
    """One of ours: where it is found, by the two layouts' names."""

    side: str  # "encoder" or "decoder"
    layer: int | None
    names: Mapping[str, str]  # flax's to min-dalle's, without side and layer


def sources(c: Seq2SeqConfig) -> Iterator[tuple[str, Source]]:
    """All our weights, and what they are made of."""
    for side, layers in (("encoder", c.encoder_layers), ("decoder", c.decoder_layers)):
        for name, names in STACK.items():
            yield f"{side}.{name}", Source(side, None, names)
        parts = LAYER | CROSS_LAYER if side == "decoder" else LAYER
        for i in range(layers):
            for name, names in parts.items():
                yield f"{side}.layers.{i}.{name}", Source(side, i, names)
    for name, names in HEAD.items():
        yield name, Source("decoder", None, names)


def published_prior(
    c: Seq2SeqConfig,
    path: Path,
    known: Mapping[str, tuple[int, ...]],
    locate: Callable[[Source], list[Found]],
) -> PublishedPart:
    """The prior of a file.

    Args:
        c: its settings.
        path: of the file, for messages.
        known: shapes of the file's arrays by their names.
        locate: what one of ours is made of; it raises KeyError with a name that the file lacks.

    Raises ValueError that names what is missing, not known, or of another shape than the settings'.
    """
    expected = _shapes(path, c)
    weights: dict[str, LazyWeight] = {}
    used: set[str] = set()
    for name, source in sources(c):
        try:
            found = locate(source)
        except KeyError as error:
            raise ValueError(f"{path}: has no weight {error.args[0]!r} of DALL-E mini") from None
        rows, *others = expected[name.replace(f".layers.{source.layer}.", ".layers.0.")]
        for theirs, shape, _ in found:
            own = (rows // len(found), *others)
            if shape != own:
                raise ValueError(
                    f"{path}: weight {theirs!r} has shape {list(known[theirs])}, expected one that "
                    f"gives {list(own)}; its config is of another model"
                )
        used.update(theirs for theirs, _, _ in found)
        weights[name] = _together([weight for _, _, weight in found])
    for name in sorted(known.keys() - used):
        raise ValueError(f"{path}: has an unexpected weight {name!r}")
    return PublishedPart(KIND, c, weights, path)


def _shapes(path: Path, c: Seq2SeqConfig) -> dict[str, tuple[int, ...]]:
    """Of our weights, with the first layer of each stack for all: a config may claim any number,
    and the file is yet to show that it has them."""
    one = c.model_copy(update={"encoder_layers": 1, "decoder_layers": 1})
    try:
        with torch.device("meta"):
            return {name: tuple(w.shape) for name, w in Seq2Seq(one).state_dict().items()}
    except (OverflowError, RuntimeError, TypeError) as error:  # sizes whose product no number holds
        raise ValueError(f"{path}: its config is of no model that could be built") from error


def _together(parts: list[LazyWeight]) -> LazyWeight:
    def read() -> Tensor:
        return parts[0]() if len(parts) == 1 else torch.cat([part() for part in parts])

    return read


def read_tokenizer(
    c: Seq2SeqConfig, vocab: Path, merges: Path | None, normalize: bool, words: Path | None = None
) -> BARTTokenizer:
    """The tokenizer of a prior; see `BARTTokenizer.from_published`."""
    return BARTTokenizer.from_published(
        vocab, merges, c.text_length, c.text_vocab, normalize, words
    )


def with_marks(c: Seq2SeqConfig, tokenizer: BARTTokenizer | None) -> Seq2SeqConfig:
    """The settings with the ids that the tokenizer has for its marks; as they are without one."""
    if tokenizer is None:
        return c
    marks = {
        "padding": tokenizer.padding,
        "empty_caption": (tokenizer.start_id, tokenizer.end_id),
    }
    return Seq2SeqConfig(**{**c.model_dump(), **marks})


def config_of(path: Path, values: Mapping[str, Any]) -> Seq2SeqConfig:
    """The settings of a `config.json`; ValueError where one is missing or not of this model."""
    for name, expected in FIXED.items():
        if values.get(name, expected) != expected:
            raise ValueError(
                f"{path}: {name}: expected {expected!r}, as DALL-E mini and mega have it, got "
                f"{values[name]!r}"
            )

    def number(name: str, *others: str) -> int:
        for same in (name, *others):
            value = values.get(same)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{path}: {same}: expected a whole number, got {value!r}")
            if value != values[name]:
                raise ValueError(f"{path}: {same}: expected {name}'s {values[name]}, got {value}")
        return int(values[name])

    image_vocab, length = number("image_vocab_size"), number("image_length")
    start = values.get("decoder_start_token_id", image_vocab)
    if not isinstance(start, int) or not 0 < start <= image_vocab:
        raise ValueError(
            f"{path}: decoder_start_token_id: expected 1 to {image_vocab}, got {start!r}"
        )
    grid = math.isqrt(length)
    if grid**2 != length:
        raise ValueError(f"{path}: image_length: expected a square number, got {length}")
    std = values.get("init_std", 0.02)
    try:
        return Seq2SeqConfig(
            width=number("d_model"),
            heads=number("encoder_attention_heads", "decoder_attention_heads"),
            encoder_layers=number("encoder_layers"),
            decoder_layers=number("decoder_layers"),
            ffn_width=number("encoder_ffn_dim", "decoder_ffn_dim"),
            text_vocab=number("encoder_vocab_size"),
            text_length=number("max_text_length"),
            # The codec's codes come first, the start behind them, and then rows without a use:
            # mega has 16,415 + 1 of them for 16,384 codes.
            image_vocab=start,
            image_rows=image_vocab + 1,
            grid=grid,
            init_std=std,
        )
    except ValidationError as error:
        raise ValueError(f"{path}: {mistake(error)}") from error

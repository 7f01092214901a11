"""Published CLIP weights, under whatever names they come, as `dalle1.clip` names them.

Three families hold the same numbers: OpenAI's files (a TorchScript archive or a state dictionary),
open_clip's state dictionaries, which keep OpenAI's names, and Hugging Face's, which split the
projections of attention and transpose the last ones. Files are read by `dvae.pickles`: nothing in
them is executed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dalle1.clip.config import BLOCK_EXPANSION, RESNET_STRIDE, CLIPConfig
from dalle1.clip.model import CLIP
from dalle1.clip.tokenizer import CLIPTokenizer
from dvae.calls import isolated
from dvae.loading import fill
from dvae.pickles import read_tensors
from dvae.weights import check_fits, unwrapped

# Of the attention of every model that OpenAI published; weights alone do not tell it.
HEAD_SIZE = 64
# Others' image encoders that differ, by their width: open_clip's ViT-H/14 has 16 heads of 80.
OTHER_HEADS = {1280: 16}
# What a state dictionary may hold beside weights.
_IGNORED = re.compile(
    r"(input_resolution|context_length|vocab_size|attn_mask|(\w+\.)*embeddings\.position_ids)$"
)
_FACE = (
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # their spelling
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


@isolated()
def read_published(path: str | Path) -> dict[str, Tensor]:
    """The weights of a published file under the names of `dalle1.clip.CLIP`, as float32.

    OpenAI's files hold 16 bits; scores are computed in 32.

    Raises ValueError when the file is missing, cut short or no CLIP.
    """
    weights, _ = published_weights(path)
    # So that each is let go of once it is converted.
    return {key: _in_32_bits(weights.pop(key)()) for key in list(weights)}


def published_weights(path: str | Path) -> tuple[dict[str, Callable[[], Tensor]], str]:
    """The weights under our names, each made of the file's, in its type, when it is called; and the
    full name of the file's root class, "" of a state dictionary.

    Raises ValueError as `read_published`.
    """
    tensors, root = read_tensors(path, lambda module, name: module.startswith("__torch__"))
    tensors = unwrapped(tensors, path)
    tensors = {key: value for key, value in tensors.items() if not _IGNORED.match(key)}
    if any(key.startswith("vision_model.") for key in tensors):
        weights = _from_face(tensors, path)
    else:
        weights = {key: partial(_itself, value) for key, value in tensors.items()}
    if "visual.conv1.weight" not in weights or "text_projection" not in weights:
        raise ValueError(f"{path}: no CLIP: it has no visual.conv1 or text_projection")
    # The published scale has no dimensions; see CLIP.logit_scale.
    if "logit_scale" in tensors:
        weights["logit_scale"] = partial(tensors["logit_scale"].reshape, 1)
    for key in [key for key in weights if key.endswith(".running_mean")]:
        # How many batches a ResNet's statistics are of; not in all files, and nothing reads it.
        counter = key.replace("running_mean", "num_batches_tracked")
        weights.setdefault(counter, partial(torch.zeros, (), dtype=torch.int64))
    return weights, root


def _itself(weight: Tensor) -> Tensor:
    return weight


def _in_32_bits(weight: Tensor) -> Tensor:
    return weight.float() if weight.is_floating_point() else weight


def published_shape(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings of a `CLIPConfig` that the weights' shapes tell, and the usual heads."""
    text, embedding = weights["text_projection"].shape
    shape = _resnet_shape if "visual.attnpool.positional_embedding" in weights else _vit_shape
    return {
        "embedding": embedding,
        **shape(weights),
        "text_vocab": weights["token_embedding.weight"].shape[0],
        "text_length": weights["positional_embedding"].shape[0],
        "text_width": text,
        "text_layers": _count(weights, "transformer.resblocks"),
        "text_heads": max(1, text // HEAD_SIZE),
    }


def _vit_shape(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, patch, _ = weights["visual.conv1.weight"].shape
    side = math.isqrt(weights["visual.positional_embedding"].shape[0] - 1)
    return {
        "image_size": side * patch,
        "patch_size": patch,
        "vision_width": width,
        "vision_layers": _count(weights, "visual.transformer.resblocks"),
        "vision_heads": OTHER_HEADS.get(width, max(1, width // HEAD_SIZE)),
    }


def _resnet_shape(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    width = weights["visual.layer1.0.conv1.weight"].shape[0]
    side = math.isqrt(weights["visual.attnpool.positional_embedding"].shape[0] - 1)
    return {
        "image_size": side * RESNET_STRIDE,
        "patch_size": RESNET_STRIDE,
        "vision_width": width,
        "vision_layers": tuple(_count(weights, f"visual.layer{i}") for i in (1, 2, 3, 4)),
        "vision_heads": max(1, BLOCK_EXPANSION * width // HEAD_SIZE),
    }


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    """Numbered modules behind a prefix."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({m.group(1) for key in weights if (m := pattern.match(key))})


def _from_face(weights: Mapping[str, Tensor], path: str | Path) -> dict[str, Callable[[], Tensor]]:
    """Hugging Face's names to OpenAI's: q, k and v become one, the projections are turned."""
    result: dict[str, Callable[[], Tensor]] = {}
    for key, value in weights.items():
        name = key
        for pattern, replacement in _FACE:
            name = re.sub(pattern, replacement, name)
        if name in ("text_projection", "visual.proj"):
            value = value.t()
        part = re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
        if part is None:
            result[name] = partial(_itself, value)
            continue
        stem, letter, kind = part.groups()
        if letter == "q":
            rest = [weights.get(key.replace("q_proj", f"{other}_proj")) for other in "kv"]
            if rest[0] is None or rest[1] is None:
                raise ValueError(f"{path}: {key} without its k_proj and v_proj")
            result[f"{stem}.attn.in_proj_{kind}"] = partial(torch.cat, [value, rest[0], rest[1]])
    return result


@isolated()
def load_released(
    path: str | Path,
    vocabulary: str | Path | None = None,
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu",
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> CLIP:
    """A published CLIP in eval mode, with a ViT (B/32, B/16, L/14, L/14@336, ...) or a ResNet
    (RN50, RN101, RN50x4, RN50x16, RN50x64).

    path: OpenAI's file (TorchScript archive or state dictionary), or a state dictionary of
    open_clip or Hugging Face, as safetensors or by torch.save. Nothing in it is executed.
    vocabulary: the published byte-pair file `bpe_simple_vocab_16e6.txt.gz`; without it the model
    takes ids alone. Weights do not tell the rest: activation, "gelu" for open_clip's own models but
    those called quickgelu; heads, None for OpenAI's 64 numbers a head (ViT-H/14: 80).

    Raises ValueError when a file is missing, cut short, foreign or names what is no weight.
    """
    try:
        weights = read_published(path)
        shape = published_shape(weights)
        shape["vision_heads"] = vision_heads or shape["vision_heads"]
        shape["text_heads"] = text_heads or shape["text_heads"]
        config = CLIPConfig(**shape, activation=activation)
        with torch.device("meta"):
            expected = CLIP(config).state_dict()
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if str(error).startswith(f"{path}:"):
            raise
        raise ValueError(f"{path}: no CLIP: {error}") from error
    check_fits(expected, weights, path, "such a CLIP")
    clip: CLIP = fill(lambda: CLIP(config), weights, Path(path), "such a CLIP")
    if vocabulary is not None:
        clip.tokenizer = CLIPTokenizer.from_published(vocabulary, config.text_vocab)
    return clip.eval()

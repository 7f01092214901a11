"""Files of DALL-E mini as they are published, of random weights (see tests.parity.dalle_mini)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch

from dalle1.published.parts import PublishedPart
from dalle1.seq2seq.model import Seq2Seq
from tests.parity.dalle_mini import Shape, min_dalle_weights

CHUNK = 2**30  # bytes, from which on flax writes an array in parts


def config_json(s: Shape, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": "dallebart",
        "d_model": s.d,
        "encoder_attention_heads": s.heads,
        "decoder_attention_heads": s.heads,
        "encoder_layers": s.encoder_layers,
        "decoder_layers": s.decoder_layers,
        "encoder_ffn_dim": s.ffn,
        "decoder_ffn_dim": s.ffn,
        "encoder_vocab_size": s.text_vocab,
        "image_vocab_size": s.rows - 1,
        "decoder_start_token_id": s.start,
        "max_text_length": s.text_length,
        "image_length": s.image_length,
        "bos_token_id": 16385,
        "use_bias": False,
        "ln_positions": "normformer",
        "normalize_text": True,
        "init_std": 0.02,
        **changes,
    }


def packed_array(value: np.ndarray | torch.Tensor) -> msgpack.ExtType:
    """An array as flax packs it: extension 1 of (shape, name of the type, bytes)."""
    if isinstance(value, torch.Tensor):  # numpy has no bfloat16
        name, content = "bfloat16", value.view(torch.int16).numpy().tobytes()
    else:
        name, content = value.dtype.name, value.tobytes("C")
    return msgpack.ExtType(1, msgpack.packb((tuple(value.shape), name, content), use_bin_type=True))


def flax_bytes(weights: Mapping[str, np.ndarray | torch.Tensor], chunk: int = CHUNK) -> bytes:
    """A tree of weights by dotted names, as `flax.serialization.to_bytes` writes it."""
    tree: dict[str, Any] = {}
    for name, value in weights.items():
        *folders, last = name.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        if isinstance(value, np.ndarray) and value.nbytes > chunk:
            size = chunk // value.itemsize
            parts = [value.reshape(-1)[i : i + size] for i in range(0, value.size, size)]
            node[last] = {
                "__msgpack_chunked_array__": True,
                "shape": {str(i): n for i, n in enumerate(value.shape)},
                "chunks": {str(i): packed_array(part) for i, part in enumerate(parts)},
            }
        else:
            node[last] = packed_array(value)
    content: bytes = msgpack.packb(tree, strict_types=True)
    return content


def write_hub_folder(
    folder: Path, s: Shape, weights: Mapping[str, np.ndarray], **changes: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(s, **changes)), encoding="utf-8")
    (folder / "flax_model.msgpack").write_bytes(flax_bytes(weights))
    return folder


def write_min_dalle(
    folder: Path, s: Shape, weights: dict[str, np.ndarray], suffix: str = "", config: bool = True
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for side, state in zip(("encoder", "decoder"), min_dalle_weights(weights), strict=True):
        torch.save(state, folder / f"{side}{suffix}.pt")
    if config:
        (folder / f"config{suffix}.json").write_text(json.dumps(config_json(s)), encoding="utf-8")
    return folder


def built(part: PublishedPart | None) -> Seq2Seq:
    """The prior of a part that was read."""
    assert part is not None
    prior: Seq2Seq = part.kind.module(part.config)
    prior.load_state_dict({name: weight() for name, weight in part.weights.items()}, assign=True)
    return prior.eval()

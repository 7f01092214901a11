"""minDALL-E as it is published (docs/published.md): a folder of four things.

    config.yaml  stage1_last.ckpt  stage2_last.ckpt
    tokenizer/bpe-16k-vocab.json  tokenizer/bpe-16k-merges.txt

Stage 1 is the codec, stage 2 the prior. What the config leaves out has the defaults of its authors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dalle1.published.parts import Family, Files, PublishedModel, PublishedPart
from dalle1.published.settings import mistake, read_yaml
from dalle1.published.transformers import Source, check_layers, published_weights
from dalle1.published.vqgan import read_codec_part
from dalle1.text.char_bpe import CharBPETokenizer
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.model import KIND
from dalle1.transformer.variant import Variant
from dvae.pickles import is_beside_weights, read_tensors

CONFIG, CODEC, PRIOR = "config.yaml", "stage1_last.ckpt", "stage2_last.ckpt"
VOCAB, MERGES = "tokenizer/bpe-16k-vocab.json", "tokenizer/bpe-16k-merges.txt"
DEFAULTS = {"vocab_size_txt": 16384, "vocab_size_img": 16384}
HPARAMS = {
    "embed_dim": 1536,
    "n_layers": 42,
    "n_heads": 24,
    "ctx_len_img": 256,
    "ctx_len_txt": 64,
}
# Switches of its code that only the published values are known of.
FIXED = {"attn_bias": True, "mlp_bias": True, "gelu_use_approx": False, "use_head_txt": True}

TABLES = {
    "text_embedding": "tok_emb_txt",
    "text_position": "pos_emb_txt",
    "image_embedding": "tok_emb_img",
    "image_position": "pos_emb_img",
    "text_head": "head_txt",
    "image_head": "head_img",
}
LAYER = {
    "attention.norm": ("ln1",),
    "attention.qkv": ("attn.query", "attn.key", "attn.value"),
    "attention.out": ("attn.proj",),
    "mlp.norm": ("ln2",),
    "mlp.up": ("mlp.0",),
    "mlp.down": ("mlp.2",),
}


def published_config(padding: int) -> TransformerConfig:
    """The settings of the published prior; padding: the id of its token [PAD]."""
    return _config(Path(CONFIG), {**DEFAULTS, **HPARAMS}, padding)


def variant(padding: int) -> Variant:
    """What minDALL-E does otherwise than the paper; padding: the id of its token [PAD]."""
    return Variant(
        patterns="full",
        start="none",
        padding_token=padding,
        position_paddings=False,
        predicts_padding=True,
        end_of_caption=padding,
        image_positions="raster",
        head_bias=False,
    )


def recognizes(path: Path) -> bool:
    """Whether a folder holds both stages and their config."""
    return all((path / name).is_file() for name in (CONFIG, CODEC, PRIOR))


def read(path: Path) -> PublishedModel:
    """The model of a folder, or of a folder's file.

    Raises ValueError where a file or a weight is missing or not as published.
    """
    folder = path if path.is_dir() else path.parent
    for name in (CONFIG, CODEC, PRIOR, VOCAB, MERGES):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing; a minDALL-E is all of its archive")
    tokenizer, prior = read_prior(folder)
    return PublishedModel(tokenizer, prior, read_codec_part(folder / CODEC))


def read_prior(folder: Path) -> tuple[CharBPETokenizer, PublishedPart]:
    """The tokenizer and the second stage, which pads as the tokenizer does."""
    sizes = _sizes(folder / CONFIG)
    tokenizer = CharBPETokenizer.from_published(
        folder / VOCAB, folder / MERGES, sizes["ctx_len_txt"], sizes["vocab_size_txt"]
    )
    assert tokenizer.padding is not None
    config = _config(folder / CONFIG, sizes, tokenizer.padding)
    path = folder / PRIOR
    tensors, _ = read_tensors(path, ignores=is_beside_weights)
    check_layers(path, tensors, config.layers, "minDALL-E")
    weights = published_weights(path, tensors, config, _sources(config), "minDALL-E")
    return tokenizer, PublishedPart(KIND, config, weights, path)


def _sizes(path: Path) -> dict[str, int]:
    """The prior's sizes by their names, of the config and the defaults that it is laid over."""
    stage = _section(path, read_yaml(path), "stage2")
    found = {**HPARAMS, **FIXED, **_section(path, stage, "hparams")}
    for name, value in FIXED.items():
        if found[name] != value:
            raise ValueError(
                f"{path}: stage2.hparams.{name}: expected {value!r} as in the published model, got "
                f"{found[name]!r}"
            )
    sizes = {**DEFAULTS, **{name: stage[name] for name in DEFAULTS if name in stage}}
    sizes |= {name: found[name] for name in HPARAMS}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{path}: stage2: {name}: expected a positive number, got {size!r}")
    return sizes


def _config(path: Path, sizes: Mapping[str, int], padding: int) -> TransformerConfig:
    """The prior's settings; padding: the id that the tokenizer pads with."""
    width, heads, side = sizes["embed_dim"], sizes["n_heads"], math.isqrt(sizes["ctx_len_img"])
    if width % heads or side**2 != sizes["ctx_len_img"]:
        raise ValueError(
            f"{path}: stage2: expected heads that divide the width and a square image, got "
            f"n_heads {heads}, embed_dim {width}, ctx_len_img {sizes['ctx_len_img']}"
        )
    try:
        return TransformerConfig(
            width=width,
            layers=sizes["n_layers"],
            heads=heads,
            head_size=width // heads,
            text_vocab=sizes["vocab_size_txt"],
            text_length=sizes["ctx_len_txt"],
            image_vocab=sizes["vocab_size_img"],
            grid=side,
            variant=variant(padding),
        )
    except ValidationError as error:
        raise ValueError(f"{path}: not the config of a minDALL-E: {mistake(error)}") from error


def _section(path: Path, content: Any, name: str) -> Mapping[str, Any]:
    """A section, which may be missing: then it is empty."""
    found = content.get(name) if isinstance(content, dict) else content
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {name}: expected settings, got {found!r}")
    return found


def _sources(c: TransformerConfig) -> dict[str, Source]:
    """Where each weight is found, by our names."""
    sources = {f"{o}.weight": Source((f"{t}.weight",)) for o, t in TABLES.items()}
    for end in ("weight", "bias"):
        sources[f"norm.{end}"] = Source((f"ln_f.{end}",))
        for i in range(c.layers):
            for ours, theirs in LAYER.items():
                names = tuple(f"blocks.{i}.{name}.{end}" for name in theirs)
                sources[f"layers.{i}.{ours}.{end}"] = Source(names)
    return sources


FAMILY = Family(
    name="mindalle",
    title="minDALL-E 1.3B",
    origin="kakaobrain/minDALL-E: https://arena.kakaocdn.net/brainrepo/models/minDALL-E/"
    "57b008f02ceaa02b779c8b7463143315/1.3B.tar.gz",
    license="CC-BY-NC-SA 4.0, not for commercial use",
    recognizes=recognizes,
    read=read,
    files=Files(((PRIOR,), (CODEC,), (CONFIG,), (VOCAB,), (MERGES,))),
)

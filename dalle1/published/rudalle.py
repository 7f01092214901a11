"""ruDALL-E as it is published: Malevich, Emojich, Surrealist, Kandinsky (docs/published.md).

The prior is one file of `torch.save`, `pytorch_model*.bin`. In its folder may lie `bpe.model`, the
tokenizer, and `vqgan.gumbelf8-sber*.ckpt`, the codec, which are published in a repository of their
own. There are two versions of the model, whose weights have the same names and shapes and mean
different things: in v2 a token stands before the text, and its convolution goes on at the opposite
edge of the grid. The mask of the convolution, which the file holds too, tells which one it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from dalle1.published.beginnings import beginning
from dalle1.published.parts import Family, Files, PublishedModel, PublishedPart
from dalle1.published.settings import mistake
from dalle1.published.transformers import Source, check_layers, published_weights
from dalle1.published.vqgan import read_codec_part
from dalle1.text.yttm import YTTMTokenizer
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.masks import allowed
from dalle1.transformer.model import KIND
from dalle1.transformer.sequence import Pattern
from dalle1.transformer.variant import Variant
from dvae.pickles import read_tensors

PRIOR, TOKENIZER, CODEC = "pytorch_model*.bin", "bpe.model", "vqgan.gumbelf8-sber*.ckpt"
PUBLISHED_CODEC = "vqgan.gumbelf8-sber.model.ckpt"  # before the other
HAAR = "-dwt"  # in the name of the codec that writes twice as many pixels a side
# What no weight tells. The published sizes; others are taken to have heads of 64.
HEADS = {(24, 2048): 16, (64, 3840): 60, (12, 768): 12}
HEAD_SIZE = 64
TEXT_LENGTH = 128
START, END, PADDING = 2, 3, 0  # ids of its tokenizer
VERSIONS: dict[str, Pattern] = {"v3": "conv_2d", "v2": "conv_torus"}
MASKS = ("row_mask", "col_mask", "conv_mask")
# Names that no other family's files have, in the first part of the file.
MARKS = (b"image_row_embeddings.weight", b"text_pos_embeddings.weight")

TABLES = {
    "text_embedding": "text_embeddings",
    "text_position": "text_pos_embeddings",
    "image_embedding": "image_embeddings",
    "row_position": "image_row_embeddings",
    "column_position": "image_col_embeddings",
    "norm": "transformer.final_layernorm",
    "head_norm": "to_logits.0",
}
LAYER = {
    "attention.norm": "input_layernorm",
    "attention.qkv": "attention.query_key_value",
    "attention.out": "attention.dense",
    "attention.out_norm": "before_first_addition_layernorm",
    "mlp.norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
    "mlp.out_norm": "before_second_addition_layernorm",
}


def published_config(version: str = "v3", layers: int = 24, width: int = 2048) -> TransformerConfig:
    """The settings of a prior of a published size, one of `HEADS`; by default Malevich's."""
    heads = HEADS[layers, width]
    return TransformerConfig(
        width=width,
        layers=layers,
        heads=heads,
        head_size=width // heads,
        text_length=TEXT_LENGTH,
        variant=variant(version),
    )


def variant(version: str, text_length: int = TEXT_LENGTH) -> Variant:
    """What ruDALL-E, "v2" or "v3", does otherwise than the paper."""
    v2 = version == "v2"
    return Variant(
        patterns="rudalle_v2" if v2 else "rudalle",
        start="token" if v2 else "none",
        start_token=START if v2 else 0,
        padding_token=PADDING,
        predicts_padding=True,
        end_of_caption=END,
        empty_caption=(START, END),
        text_position_rows=text_length + 1,  # v3 does not read the last
        norms="sandwich",
        gelu="tanh",
        embedding_gradient=0.1,
    )


def recognizes(path: Path) -> bool:
    """Whether a folder holds one of the files, or a file is one."""
    files = sorted(path.glob(PRIOR)) if path.is_dir() else [path]
    return any(map(_looks_published, files))


def _looks_published(path: Path) -> bool:
    start = beginning(path)
    return all(mark in start for mark in MARKS)


def read(path: Path) -> PublishedModel:
    """The prior of a file, or of the only such file in a folder, with the tokenizer and the codec
    that lie beside it.

    Raises ValueError where there are several or none, or a weight or mask is missing or not as
    published.
    """
    file = _prior_file(path)
    prior, notes = read_prior(file)
    c = prior.config
    assert isinstance(c, TransformerConfig)
    tokenizer = None
    if (file.parent / TOKENIZER).is_file():
        tokenizer = YTTMTokenizer.from_published(
            file.parent / TOKENIZER, c.text_length, c.text_vocab
        )
    codecs = sorted(file.parent.glob(CODEC), key=lambda found: HAAR in found.name)
    codec = read_codec_part(codecs[0]) if codecs else None
    if len(codecs) > 1:
        notes = (*notes, f"codec: {codecs[0].name}; {codecs[1].name}, which draws 512 pixels, lies "
                 "there too")  # fmt: skip
    return PublishedModel(tokenizer, prior, codec, notes=notes)


def _prior_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = [file for file in sorted(path.glob(PRIOR)) if _looks_published(file)]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(
            f"{path}: expected one {PRIOR} of ruDALL-E, got {names}; name the file itself"
        )
    return files[0]


def read_prior(path: Path, heads: int | None = None) -> tuple[PublishedPart, tuple[str, ...]]:
    """The prior of a file, and what its weights have told.

    heads: attention heads of a layer; None: those of the published model of this size.
    """
    tensors, _ = read_tensors(path)
    # At the top in the file of the first release.
    found = {key: name for name in MASKS for key in (name, f"transformer.{name}") if key in tensors}
    masks = {name: tensors.pop(key) for key, name in found.items()}
    shape = _shape(path, tensors, heads)
    version, why = _version(path, masks, shape)
    # Put together anew, so that what the version asks for is checked.
    config = TransformerConfig(
        **{**shape.model_dump(), "variant": variant(version, shape.text_length)}
    )
    weights = published_weights(path, tensors, config, _sources(config), "ruDALL-E")
    return PublishedPart(KIND, config, weights, path), (f"ruDALL-E {version}, told by {why}",)


def _shape(path: Path, tensors: Mapping[str, Tensor], heads: int | None) -> TransformerConfig:
    """The sizes, as the weights have them; the variant is still the paper's."""

    def rows(name: str) -> int:
        if name not in tensors or tensors[name].ndim != 2:
            raise ValueError(f"{path}: has no weight {name!r} of a ruDALL-E")
        return len(tensors[name])

    text_length = rows("text_pos_embeddings.weight") - 1
    text_ids = rows("text_embeddings.weight")
    width = tensors["text_embeddings.weight"].shape[1]
    numbers = (re.match(r"transformer\.layers\.(\d{1,6})\.", name) for name in tensors)
    layers = max((int(number[1]) for number in numbers if number), default=-1) + 1
    check_layers(path, tensors, layers, "ruDALL-E")
    heads = heads or HEADS.get((layers, width), width // HEAD_SIZE)
    if not heads or width % heads:
        raise ValueError(
            f"{path}: width: expected a multiple of {heads or HEAD_SIZE} for the heads, got {width}"
        )
    try:
        return TransformerConfig(
            width=width,
            layers=layers,
            heads=heads,
            head_size=width // heads,
            text_vocab=text_ids - text_length,
            text_length=text_length,
            image_vocab=rows("image_embeddings.weight"),
            grid=rows("image_row_embeddings.weight"),
        )
    except ValidationError as error:
        raise ValueError(f"{path}: not the weights of a ruDALL-E: {mistake(error)}") from error


def _version(path: Path, masks: Mapping[str, Tensor], c: TransformerConfig) -> tuple[str, str]:
    """ "v2" or "v3", and what has told.

    Raises ValueError for masks of neither, and where nothing tells.
    """
    named = [version for version in VERSIONS if version in path.stem.lower()]
    if "conv_mask" not in masks:
        if len(named) == 1:
            return named[0], "the name of the file, which holds no masks"
        raise ValueError(
            f"{path}: has no conv_mask, which tells v2 from v3; put the version into the file's "
            "name, as in pytorch_model_v3.bin"
        )
    fixed: dict[str, Pattern] = {"row_mask": "row", "col_mask": "column"}
    for name, pattern in fixed.items():
        if name in masks and not _is_mask(masks[name], pattern, c):
            raise ValueError(f"{path}: {name} is not the one of ruDALL-E; nothing else is known")
    fitting = [v for v, pattern in VERSIONS.items() if _is_mask(masks["conv_mask"], pattern, c)]
    if not fitting:
        raise ValueError(f"{path}: conv_mask is neither that of v2 nor that of v3")
    if len(fitting) == 1:
        return fitting[0], "its conv_mask"
    # On a grid that the window spans the two are the same.
    if len(named) == 1:
        return named[0], "the name of the file"
    return (
        ("v3", "its masks, which are bool")
        if masks["conv_mask"].dtype == torch.bool
        else ("v2", "its masks, which are numbers")
    )


def _is_mask(mask: Tensor, pattern: Pattern, c: TransformerConfig) -> bool:
    # The shape first: tables without columns may claim any number of positions.
    return mask.shape == (c.sequence_length,) * 2 and torch.equal(
        mask.bool(), allowed(pattern, c.text_length, c.grid, c.conv_kernel)
    )


def _sources(c: TransformerConfig) -> dict[str, Source]:
    """Where each weight is found, by our names."""
    names = dict(TABLES)
    for i in range(c.layers):
        names |= {f"layers.{i}.{o}": f"transformer.layers.{i}.{t}" for o, t in LAYER.items()}
    sources = {
        f"{ours}.{end}": Source((f"{theirs}.{end}",))
        for ours, theirs in names.items()
        for end in ("weight", "bias")
        if end == "weight" or not ours.endswith(("_embedding", "_position"))
    }
    # One map with the classes of both heads, the text's first.
    heads = {"text_head": slice(c.text_classes), "image_head": slice(c.text_classes, None)}
    for ours, rows in heads.items():
        for end in ("weight", "bias"):
            sources[f"{ours}.{end}"] = Source((f"to_logits.1.{end}",), rows)
    return sources


FAMILY = Family(
    name="rudalle",
    title="ruDALL-E",
    origin="ai-forever/ru-dalle (Sber): hub sberbank-ai/rudalle-Malevich, rudalle-Emojich, "
    "rudalle-Kandinsky, rudalle-utils; shonenkov-AI/rudalle-xl-surrealist",
    license="not stated for the weights; Apache-2.0 for the code",
    recognizes=recognizes,
    read=read,
    files=Files(needed=((PRIOR,),), beside=((TOKENIZER,), (PUBLISHED_CODEC, CODEC))),
)

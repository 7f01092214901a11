"""DALL-E mini and mega as min-dalle publishes them: the same weights as torch's files.

`encoder.pt` and `decoder.pt` are mega's, `encoder_mini.pt` and `decoder_mini.pt` mini's, in one
folder of the Hub; or each pair is alone in a folder, which names them without `_mini`. Beside them
lie `vocab*.json`, `merges*.txt`, `config*.json`, and `detoker.pt`, the decoder of the codec.

min-dalle itself begins an image with code 16,383, a real code, and not with the start token 16,384
that the weights were trained with. The published configs say 16,384, and so it is here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from dalle1.published.beginnings import beginning
from dalle1.published.dalle_bart import (
    Found,
    Source,
    config_of,
    published_prior,
    read_tokenizer,
    with_marks,
)
from dalle1.published.parts import Family, Files, PublishedModel, PublishedPart
from dalle1.published.settings import read_json
from dalle1.published.vqgan import read_codec_part
from dalle1.seq2seq.config import Seq2SeqConfig
from dvae.pickles import read_tensors

SIDES = ("encoder", "decoder")
DETOKENIZER = "detoker.pt"
MARK = b"layers.0.pre_encoder_attn_layer_norm.bias"  # of a layer of this model alone
NOTES = (
    "images begin with the start token of DALL-E mini (16,384), not with min-dalle's code 16,383",
    "captions are normalized as by DALL-E mini, which min-dalle does not do",
)
SUFFIXES = ("", "_mini")
HEAD_SIZE = 64  # of both models; a folder without config.json says nothing of heads


def recognizes(path: Path) -> bool:
    """Whether a folder holds a pair of files, or a file is one of a pair, with its layers."""
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.stem not in {side + suffix for side in SIDES for suffix in SUFFIXES}:
        return False
    pairs = _pairs(folder)
    return bool(pairs) and MARK in beginning(folder / f"decoder{pairs[0]}.pt")


def read(path: Path) -> PublishedModel:
    """The prior and the tokenizer of a folder with one pair, or of either file of a pair."""
    folder = path if path.is_dir() else path.parent
    suffixes = _pairs(folder)
    if not path.is_dir():
        suffixes = [s for s in suffixes if path.stem in {side + s for side in SIDES}]
    if not suffixes:
        raise ValueError(
            f"{path}: expected encoder.pt and decoder.pt in one folder, or the two with _mini"
        )
    if len(suffixes) > 1:
        raise ValueError(
            f"{path}: expected one model, got two; give {folder / 'decoder.pt'} for mega or "
            f"{folder / 'decoder_mini.pt'} for mini"
        )
    suffix = suffixes[0]
    prior = read_prior(folder, suffix)
    c, tokenizer = prior.config, None
    assert isinstance(c, Seq2SeqConfig)
    vocab, merges = folder / f"vocab{suffix}.json", folder / f"merges{suffix}.txt"
    if vocab.is_file():  # captions as the model was trained with, not as min-dalle reads them
        tokenizer = read_tokenizer(c, vocab, merges, normalize=True)
        prior = replace(prior, config=with_marks(c, tokenizer))
    # In the Hub's folder, or where min-dalle itself puts it.
    places = (folder / DETOKENIZER, folder.parent / "vqgan" / DETOKENIZER)
    found = next((place for place in places if place.is_file()), None)
    codec = None if found is None else read_codec_part(found)
    return PublishedModel(tokenizer, prior, codec, notes=NOTES)


def _pairs(folder: Path) -> list[str]:
    return [s for s in SUFFIXES if all((folder / f"{side}{s}.pt").is_file() for side in SIDES)]


def read_prior(folder: Path, suffix: str = "") -> PublishedPart:
    """The prior of a pair of files; ValueError that names what does not fit."""
    paths = {side: folder / f"{side}{suffix}.pt" for side in SIDES}
    tensors: dict[str, Tensor] = {}
    for side, path in paths.items():
        held, _ = read_tensors(path)
        tensors |= {f"{side}.{name}": tensor for name, tensor in held.items()}
    config = folder / f"config{suffix}.json"
    if config.is_file():
        c = config_of(config, read_json(config))
    else:
        c = _config_of_weights(paths, tensors)

    def locate(source: Source) -> list[Found]:
        layer = "" if source.layer is None else f"layers.{source.layer}."
        found: list[Found] = []
        for name in source.names.values():
            full = f"{source.side}.{layer}{name}"
            found.append((full, tuple(tensors[full].shape), partial(tensors.__getitem__, full)))
        return found

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return published_prior(c, paths["decoder"], shapes, locate)


def _config_of_weights(paths: dict[str, Path], tensors: dict[str, Tensor]) -> Seq2SeqConfig:
    """The settings, read off the weights."""

    def shape(name: str) -> tuple[int, int]:
        tensor = tensors.get(name)
        if tensor is None or tensor.ndim != 2:
            raise ValueError(
                f"{paths[name.partition('.')[0]]}: has no matrix {name.partition('.')[2]!r} of "
                "DALL-E mini"
            )
        return tensor.shape[0], tensor.shape[1]

    def layers(side: str) -> int:
        start = f"{side}.layers."
        found = {name.split(".")[2] for name in tensors if name.startswith(start)}
        return max(1, len(found))

    text_vocab, width = shape("encoder.embed_tokens.weight")
    rows, _ = shape("decoder.embed_tokens.weight")
    length, _ = shape("decoder.embed_positions.weight")
    values = {
        "d_model": width,
        "encoder_attention_heads": max(1, width // HEAD_SIZE),
        "decoder_attention_heads": max(1, width // HEAD_SIZE),
        "encoder_layers": layers("encoder"),
        "decoder_layers": layers("decoder"),
        "encoder_ffn_dim": shape("encoder.layers.0.glu.fc0.weight")[0],
        "decoder_ffn_dim": shape("decoder.layers.0.glu.fc0.weight")[0],
        "encoder_vocab_size": text_vocab,
        "max_text_length": shape("encoder.embed_positions.weight")[0],
        "image_vocab_size": rows - 1,
        "image_length": length,
        "decoder_start_token_id": min(rows - 1, 2**14),
    }
    return config_of(paths["decoder"], values)


FAMILY = Family(
    name="min_dalle",
    title="min-dalle's files of DALL-E mini and mega",
    origin="kuprel/min-dalle on the Hugging Face Hub",
    license="MIT (of the repository's card; the weights are DALL-E mini's, Apache 2.0)",
    recognizes=recognizes,
    read=read,
    files=Files(
        needed=tuple((f"{side}*.pt",) for side in SIDES),
        beside=(("vocab*.json",), ("merges*.txt",), ("config*.json",), (DETOKENIZER,)),
    ),
)

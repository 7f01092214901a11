"""DALL-E mini and mega as their authors publish them: `config.json` and `flax_model.msgpack`.

The folder holds the prior and the files of its tokenizer. Its codec is published by itself, as
`dalle-mini/vqgan_imagenet_f16_16384`.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dalle1.published.dalle_bart import (
    Found,
    Source,
    config_of,
    published_prior,
    read_tokenizer,
    with_marks,
)
from dalle1.published.msgpack import FlaxArray, read_msgpack
from dalle1.published.parts import Family, Files, LazyWeight, PublishedModel, PublishedPart
from dalle1.published.settings import read_json
from dalle1.seq2seq.config import Seq2SeqConfig
from dvae.storage import CONFIG

WEIGHTS = "flax_model.msgpack"
VOCAB, MERGES, TOKENIZER = "vocab.json", "merges.txt", "tokenizer.json"
WORDS = "enwiki-words-frequency.txt"
MODEL_TYPE = "dallebart"


def recognizes(path: Path) -> bool:
    """Whether a folder's `config.json` says that it is DALL-E mini's."""
    folder = path.parent if path.name == WEIGHTS else path
    try:
        return (folder / WEIGHTS).is_file() and read_json(folder / CONFIG)[
            "model_type"
        ] == MODEL_TYPE
    except (KeyError, ValueError):
        return False


def read(path: Path) -> PublishedModel:
    """The prior and the tokenizer of the folder, or of the weights' file in it."""
    folder = path.parent if path.name == WEIGHTS else path
    values = read_json(folder / CONFIG)
    config = config_of(folder / CONFIG, values)
    normalize = values.get("normalize_text", False)
    tokenizer = None
    words = folder / WORDS if (folder / WORDS).is_file() else None
    # The two files first: they are what the others were made of.
    for vocab, merges in ((VOCAB, MERGES), (TOKENIZER, None)):
        if tokenizer is None and (folder / vocab).is_file():
            tokenizer = read_tokenizer(
                config, folder / vocab, folder / merges if merges else None, bool(normalize), words
            )
    prior = read_prior(folder / WEIGHTS, with_marks(config, tokenizer))
    return PublishedModel(tokenizer, prior)


def read_prior(path: Path, c: Seq2SeqConfig) -> PublishedPart:
    """The prior of a flax file; layers stand in one array of each weight (scanned), or each has its
    own. Raises ValueError that names what does not fit."""
    arrays = read_msgpack(path)
    if all(name.startswith("params.") for name in arrays):  # as a training state keeps them
        arrays = {name.removeprefix("params."): array for name, array in arrays.items()}
    scanned = any(".FlaxBartEncoderLayers." in name for name in arrays)

    def locate(source: Source) -> list[Found]:
        stack = f"model.{source.side}"
        layer, row = "", None
        if source.layer is not None:
            layer = f"layers.FlaxBart{source.side.capitalize()}Layer"
            layer += "s." if scanned else f"_{source.layer}."
            row = source.layer if scanned else None
        found: list[Found] = []
        for name in source.names:
            full = name if name.startswith("lm_head.") else f"{stack}.{layer}{name}"
            array = arrays[full]
            shape = array.shape
            if row is not None:
                count = c.encoder_layers if source.side == "encoder" else c.decoder_layers
                if not shape or shape[0] != count:
                    raise ValueError(
                        f"{path}: weight {full!r}: expected {count} layers, got a shape of "
                        f"{list(shape)}"
                    )
                shape = shape[1:]
            is_map = name.endswith(".kernel")  # [in, out]; ours are [out, in]
            found.append((full, shape[::-1] if is_map else shape, _lazy(array, row, is_map)))
        return found

    shapes = {name: array.shape for name, array in arrays.items()}
    return published_prior(c, path, shapes, locate)


def _lazy(array: FlaxArray, row: int | None, turned: bool) -> LazyWeight:
    def read() -> Tensor:
        numbers = array() if row is None else array.row(row)
        return numbers.t().contiguous() if turned else numbers

    return read


FAMILY = Family(
    name="dalle_mini",
    title="DALL-E mini and mega",
    origin="dalle-mini/dalle-mini and dalle-mini/dalle-mega on the Hugging Face Hub",
    license="Apache 2.0",
    recognizes=recognizes,
    read=read,
    files=Files(needed=((WEIGHTS,), (CONFIG,)), beside=((VOCAB, TOKENIZER), (MERGES,), (WORDS,))),
)

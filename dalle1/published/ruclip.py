"""ruCLIP as it is published: a folder with `bpe.model`, `config.json`, `pytorch_model.bin`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle1.clip.released import published_weights
from dalle1.clip.ruclip import KIND, RuCLIP, RuCLIPConfig
from dalle1.published.clip import check_names, config_of
from dalle1.published.parts import Family, Files, PublishedModel, PublishedPart
from dalle1.published.settings import read_json
from dalle1.text.yttm import YTTMTokenizer

TOKENIZER, SETTINGS, WEIGHTS = "bpe.model", "config.json", "pytorch_model.bin"
# Their names of what the weights tell too, and of what they do not.
TOLD = {
    "embed_dim": "embedding",
    "image_resolution": "image_size",
    "vision_layers": "vision_layers",
    "vision_width": "vision_width",
    "vision_patch_size": "patch_size",
    "context_length": "text_length",
    "vocab_size": "text_vocab",
    "transformer_width": "text_width",
    "transformer_layers": "text_layers",
}
HEADS = "transformer_heads"


def recognizes(path: Path) -> bool:
    """Whether a folder holds the three files, and settings by these names."""
    if not all((path / name).is_file() for name in (TOKENIZER, SETTINGS, WEIGHTS)):
        return False
    try:
        return {*TOLD, HEADS} <= read_json(path / SETTINGS).keys()
    except ValueError:
        return False


def read(path: Path) -> PublishedModel:
    """The ranker of a folder, with its tokenizer.

    Raises ValueError where a file is missing, the weights are no ruCLIP's, or the settings are of
    other weights.
    """
    folder = path if path.is_dir() else path.parent
    for name in (TOKENIZER, SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: expected {name} of a ruCLIP, got none")
    settings, file = read_json(folder / SETTINGS), folder / WEIGHTS
    weights, _ = published_weights(file)
    told: dict[str, Any] = {"text_heads": settings.get(HEADS)}
    told |= {name: settings[name] for name in ("mean", "std") if settings.get(name)}
    config = config_of(RuCLIPConfig, weights, told, file)
    _check_settings(settings, config.model_dump(), folder / SETTINGS)
    check_names(RuCLIP, config, weights, file)
    tokenizer = YTTMTokenizer.from_published(folder / TOKENIZER, config.text_length)
    if tokenizer.vocab_size > config.text_vocab:
        raise ValueError(
            f"{folder / TOKENIZER}: expected at most {config.text_vocab} tokens, as the weights "
            f"have, got {tokenizer.vocab_size}"
        )
    if tokenizer.end_id != config.end_id:
        raise ValueError(
            f"{folder / TOKENIZER}: expected {config.end_id} as the end of text, got "
            f"{tokenizer.end_id}"
        )
    return PublishedModel(ranker=PublishedPart(KIND, config, weights, file, tokenizer))


def _check_settings(settings: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError where the settings are those of other weights."""
    for theirs, ours in TOLD.items():
        if settings.get(theirs) != config[ours]:
            raise ValueError(
                f"{path}: {theirs}: expected {config[ours]}, as the weights have, got "
                f"{settings.get(theirs)!r}"
            )


FAMILY = Family(
    name="ruclip",
    title="ruCLIP",
    origin="ai-forever/ru-clip (Sber): hub ai-forever/ruclip-vit-*",
    license="not stated for the weights; Apache-2.0 for the code",
    recognizes=recognizes,
    read=read,
    files=Files(((WEIGHTS,), (SETTINGS,), (TOKENIZER,))),
)

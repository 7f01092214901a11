"""The dVAE that was published with the paper: `encoder.pkl` and `decoder.pkl`."""

from __future__ import annotations

from pathlib import Path

from dalle1.published.beginnings import beginning
from dalle1.published.parts import Family, Files, PublishedModel, PublishedPart
from dvae.model import KIND
from dvae.released import read_released

PAIR = ("encoder", "decoder")
SUFFIXES = (".pkl", ".pt", ".pth", ".safetensors")
# What stands in the beginning of such a file: the package of its classes, or its first weight.
MARKS = (b"dall_e.", b"blocks.input.w")


def recognizes(path: Path) -> bool:
    """Whether a folder holds the two files, or a file is one of them beside the other."""
    files = _files(path)
    return files is not None and all(
        any(mark in start for mark in MARKS) for start in map(beginning, files)
    )


def read(path: Path) -> PublishedModel:
    """The codec of a folder with the two files, or of either of them beside the other."""
    files = _files(path)
    if files is None:
        raise ValueError(f"{path}: expected encoder.pkl and decoder.pkl in one folder; fetch both")
    config, weights = read_released(*files)
    held = {name: (lambda weight=weight: weight) for name, weight in weights.items()}
    return PublishedModel(codec=PublishedPart(KIND, config, held, files[0]))


def _files(path: Path) -> tuple[Path, Path] | None:
    """Encoder and decoder, of one ending."""
    folder = path if path.is_dir() else path.parent
    if path != folder and (path.stem not in PAIR or path.suffix not in SUFFIXES):
        return None
    for suffix in SUFFIXES if path == folder else (path.suffix,):
        encoder, decoder = (folder / f"{name}{suffix}" for name in PAIR)
        if encoder.is_file() and decoder.is_file():
            return encoder, decoder
    return None


FAMILY = Family(
    name="dvae",
    title="OpenAI's discrete VAE",
    origin="openai/DALL-E: https://cdn.openai.com/dall-e/encoder.pkl and decoder.pkl",
    license="modified MIT (of the repository; not stated for the weights)",
    recognizes=recognizes,
    read=read,
    files=Files(
        tuple(tuple(f"{name}{suffix}" for suffix in SUFFIXES) for name in PAIR),
    ),
)

"""A family that nobody has published: the fakes' palette and unigram prior in one torch.save file.

It stands for the real ones where the importer itself is tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dalle1.published.parts import Family, Files, PublishedModel, PublishedPart
from dalle1.tokenizer import Tokenizer
from dvae.pickles import read_tensors
from tests.fakes import KINDS, PaletteConfig, UnigramConfig

CODEC, PRIOR, _ = KINDS


@dataclass(frozen=True)
class FakeFiles:
    """Names of the files in a folder of the family."""

    prior: str = "prior.bin"
    codec: str = "codec.ckpt"
    tokenizer: str = "words.json"


FILES = FakeFiles()


def read(path: Path) -> PublishedModel:
    """What the folder, or a file alone, holds; the prior's table is stored turned."""
    folder = path if path.is_dir() else path.parent
    wanted = [path.name] if path.is_file() else [p.name for p in folder.iterdir()]
    tokenizer = prior = codec = None
    if FILES.tokenizer in wanted:
        tokenizer = Tokenizer.load(folder / FILES.tokenizer)
    if FILES.prior in wanted:
        held, _ = read_tensors(folder / FILES.prior)
        if "table" not in held:
            raise ValueError(f"{folder / FILES.prior}: has no weight 'table'")
        table = held["table"]  # [colors, rows]
        config = UnigramConfig(text_vocab=table.shape[1] - 10, text_length=10)
        weights = {"tilt.weight": lambda: table.t()}
        prior = PublishedPart(PRIOR, config, weights, folder / FILES.prior)
    if FILES.codec in wanted:
        held, _ = read_tensors(folder / FILES.codec)
        weights = {name: (lambda w=w: w) for name, w in held.items()}
        codec = PublishedPart(CODEC, PaletteConfig(), weights, folder / FILES.codec)
    return PublishedModel(tokenizer, prior, codec, notes=("version 7",))


def recognizes(path: Path) -> bool:
    if path.is_dir():
        return any((path / name).is_file() for name in (FILES.prior, FILES.codec))
    return path.name in (FILES.prior, FILES.codec)


FAMILY = Family(
    name="fake",
    title="Fake-E",
    origin="nobody, nowhere",
    license="CC-BY-NC 4.0",
    recognizes=recognizes,
    read=read,
    files=Files(((FILES.prior,),), ((FILES.codec,), (FILES.tokenizer,))),
)


def write(folder: Path, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The family's three files; the prior's table as ours has it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(tokenizer.vocab_size + 10, 5, generator=generator).to(dtype)
    torch.save({"state_dict": {"table": table.t().contiguous()}}, folder / FILES.prior)
    from tests.fakes import PaletteCodec

    torch.save(PaletteCodec(PaletteConfig()).state_dict(), folder / FILES.codec)
    tokenizer.save(folder / FILES.tokenizer)
    return table

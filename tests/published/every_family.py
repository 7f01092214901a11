"""Small random models of each family, in the layouts in which they are published.

All draw 8x8 tokens of 2 pixels a side, so that the built-in images fit them.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle1.text.bart import BARTTokenizer
from tests.parity import dalle_mini, mindalle, published_vqgan, rudalle
from tests.published import dalle_mini_files, lightning
from tests.published.test_importing import write_released
from tests.published.test_mindalle import CONFIG as MINDALLE_CONFIG
from tests.published.test_vqgan import SHAPE as VQGAN_SHAPE
from tests.published.test_vqgan import flax, sber_haar
from tests.text.files import small_model, write_bart, write_char_bpe

GRID, CODES, TEXT_LENGTH = 8, 40, 24
DVAE_TRAINING = {"kl_weight": 0.0, "kl_steps": 0, "temperature_start": 0.1, "temperature_end": 0.1}

Written = tuple[Path, list[str]]


@dataclass(frozen=True)
class Case:
    """A family, small.

    Attributes:
        name: of the case.
        family: that the files are of.
        write: writes them into a folder; returns the source and further options of the verb.
        stage: that trains it further.
        settings: of that stage, besides the common ones.
        says_captions: whether the prior models captions too.
    """

    name: str
    family: str
    write: Callable[[Path], Written]
    stage: str = "dalle"
    settings: dict[str, Any] = field(default_factory=dict)
    says_captions: bool = False

    @property
    def has_prior(self) -> bool:
        return self.stage == "dalle"


def codec_weights(gumbel: bool = False, out: int = 3) -> dict[str, Tensor]:
    """A VQGAN of 40 codes that halves the side once, under taming's names."""
    return published_vqgan.random_weights(published_vqgan.shapes(*VQGAN_SHAPE, gumbel, out))


def write_openai(folder: Path) -> Written:
    write_released(folder)
    return folder, []


def write_vqgan(folder: Path) -> Written:
    (folder / "ckpts").mkdir(parents=True)
    lightning.save(codec_weights(), folder / "ckpts" / "last.ckpt")
    return folder, []


def write_rudalle(folder: Path, version: str, apart: bool) -> Written:
    """apart: codec and tokenizer lie in a folder of their own, as on the Hub."""
    folder.mkdir(parents=True)
    beside = folder / "utils" if apart else folder
    beside.mkdir(exist_ok=True)
    tokens = small_model()
    tokens.write(beside / "bpe.model")
    codec = beside / "vqgan.gumbelf8-sber.model.ckpt"
    weights = codec_weights(gumbel=True, out=12 if apart else 3)
    if apart:
        codec = codec.with_name("vqgan.gumbelf8-sber-dwt.model.ckpt")
        torch.save(sber_haar(weights), codec)
    else:
        lightning.save(weights, codec)
    shape = rudalle.Shape(
        version=version,
        width=64,
        heads=1,
        side=GRID,
        text_length=TEXT_LENGTH,
        text_classes=34 + TEXT_LENGTH,
        image_classes=CODES,
    )
    source = folder / f"pytorch_model_{version}.bin"
    torch.save(rudalle.make_weights(shape), source)
    options = ["--codec", str(codec), "--tokenizer", str(beside / "bpe.model")]
    return source if apart else folder, options if apart else []


def write_mindalle(folder: Path) -> Written:
    """The archive, with both stages, settings and tokenizer."""
    root = folder / "1.3B"
    (root / "tokenizer").mkdir(parents=True)
    write_char_bpe(root / "tokenizer")
    shape = mindalle.Shape(
        text_length=TEXT_LENGTH, side=GRID, text_classes=120, image_classes=CODES
    )
    settings = MINDALLE_CONFIG.format(**vars(shape), cells=GRID**2)
    (root / "config.yaml").write_text(settings, encoding="utf-8")
    torch.save({"state_dict": codec_weights()}, root / "stage1_last.ckpt")
    torch.save({"state_dict": mindalle.make_weights(shape)}, root / "stage2_last.ckpt")
    archive = folder / "1.3B.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root, "1.3B")
    return archive, []


MINI = dalle_mini.Shape(
    text_vocab=300,
    text_length=TEXT_LENGTH,
    image_vocab=CODES,
    rows=CODES + 1,
    start=CODES,
    image_length=GRID**2,
)


def write_mini_codec(folder: Path) -> Path:
    folder.mkdir(parents=True)
    arrays: dict[str, Any] = {n: np.asarray(w) for n, w in flax(codec_weights()).items()}
    (folder / "flax_model.msgpack").write_bytes(dalle_mini_files.flax_bytes(arrays))
    return folder


def write_dalle_mini(folder: Path) -> Written:
    # Without the normalizer, for which training wants further packages.
    source = dalle_mini_files.write_hub_folder(
        folder / "mini", MINI, dalle_mini.random_weights(MINI), normalize_text=False
    )
    write_bart(source)
    return source, ["--codec", str(write_mini_codec(folder / "codec"))]


def write_min_dalle(folder: Path) -> Written:
    source = dalle_mini_files.write_min_dalle(
        folder / "mini", MINI, dalle_mini.random_weights(MINI)
    )
    # Its decoder cannot encode images to train on, and its tokenizer is read with the normalizer.
    own = BARTTokenizer.from_published(*write_bart(source), TEXT_LENGTH, 300, normalize=False)
    own.save(folder / "own.json")
    codec = write_mini_codec(folder / "codec")
    return source, ["--codec", str(codec), "--tokenizer", str(folder / "own.json")]


TRAINED = {"caption_dropout": 0.1}
CASES = [
    Case("openai", "dvae", write_openai, "dvae", {"dvae_training": DVAE_TRAINING}),
    Case("taming", "vqgan", write_vqgan, "vqgan", {"vqgan_training": {"codebook": {}}}),
    Case("v3", "rudalle", partial(write_rudalle, version="v3", apart=False), says_captions=True),
    Case("v2", "rudalle", partial(write_rudalle, version="v2", apart=True), says_captions=True),
    Case("mindalle", "mindalle", write_mindalle, settings=TRAINED, says_captions=True),
    Case("mini", "dalle_mini", write_dalle_mini, settings=TRAINED),
    Case("min-dalle", "min_dalle", write_min_dalle),
]

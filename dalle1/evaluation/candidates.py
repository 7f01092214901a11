"""Candidates of every caption, drawn, scored and judged once, and kept on disk.

    run/draws/settings.json           what the draws depend on
    run/draws/<caption>.safetensors   of a caption: tokens, scores, verdicts

A run that stopped goes on with what is missing, and more candidates are added to those there are:
candidate i depends on (seed, caption, i) alone.

Dimensions: b candidates, m image positions, a attributes that the checker judges.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from dalle1.common.config import SHAPES
from dalle1.common.files import replacing, write_text
from dalle1.common.images import to_pil
from dalle1.common.weights import fingerprint
from dalle1.data.shapes import check
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.prompts import Prompt
from dalle1.generation.batches import CaptionImages, draw_captions
from dalle1.model import Model

# What the checker of the built-in data may judge, in the order of `Draws.verdicts`.
ATTRIBUTES = ("count", "color", "shape", "size", "relation", "background")
NOT_CLAIMED = -1
# Tokenizers that read it alike are taken for the same.
WORDS = ("quick", "brown", "fox", "lazy", "dog", "two", "red", "circles")


@dataclass
class Draws:
    """One caption's candidates."""

    tokens: Tensor  # int64 [b, m]
    scores: Tensor  # float32 [b], CLIP's
    verdicts: Tensor  # int8 [b, a] of 0, 1 and NOT_CLAIMED; [b, 0] where there is no checker

    @property
    def correct(self) -> Tensor:
        """Whether a picture shows all that the caption says: bool [b]."""
        return (self.verdicts != 0).all(dim=1)

    def without_tokens(self) -> Draws:
        """What the curves are made of."""
        return Draws(self.tokens[:, :0].clone(), self.scores, self.verdicts)

    def first(self, count: int) -> Draws:
        """Candidates 0 ... count - 1."""
        return Draws(self.tokens[:count], self.scores[:count], self.verdicts[:count])


def claim(model: Model, settings: RankSettings, rank: int = 0) -> None:
    """Says in the folder of the draws what they depend on; every rank calls it, and waits for the
    others before it draws.

    Raises ValueError when the folder holds draws of another model or made with other options.
    """
    folder = Path(settings.run) / "draws"
    folder.mkdir(parents=True, exist_ok=True)
    names = ("seed", "temperature", "top_k", "top_p", "guidance", "dtype")
    content: dict[str, Any] = {name: getattr(settings, name) for name in names}
    content["judged"] = settings.data == SHAPES
    content["model"] = digest(model)
    path = folder / "settings.json"
    if path.exists():
        held = json.loads(path.read_text())
        for name, value in content.items():
            if held.get(name) != value:
                raise ValueError(
                    f"{folder} holds draws with another {name} ({held.get(name)!r}, now "
                    f"{value!r}): give another run, or remove the folder to draw anew"
                )
    elif rank == 0:
        write_text(path, json.dumps(content, indent=2) + "\n")


def draw_all(
    model: Model,
    prompts: Sequence[Prompt],
    settings: RankSettings,
    rank: int = 0,
    ranks: int = 1,
    progress: bool = True,
) -> None:
    """Draws what is missing of every `ranks`-th caption from `rank` on, and keeps it; after
    `claim`."""
    folder = Path(settings.run) / "draws"
    folder.mkdir(parents=True, exist_ok=True)
    missing: dict[int, list[str]] = defaultdict(list)  # captions by the candidates they have
    for caption in list(dict.fromkeys(p.caption for p in prompts))[rank::ranks]:
        have = _count(path_of(folder, caption))
        if have < settings.candidates:
            missing[have].append(caption)
    total = sum((settings.candidates - have) * len(names) for have, names in missing.items())
    with tqdm(total=total, unit="picture", desc="drawing", disable=not progress) as bar:
        for have, captions in sorted(missing.items()):
            drawn = draw_captions(
                model,
                captions,
                settings.candidates,
                settings.seed,
                settings.batch_size,
                settings.options(),
                start=have,
            )
            for caption, found in zip(captions, drawn, strict=True):
                _keep(path_of(folder, caption), _judged(model, caption, found, settings))
                bar.update(len(found.tokens))


def read_draws(prompts: Sequence[Prompt], settings: RankSettings) -> Iterator[Draws]:
    """The draws of every prompt, one after the other; ValueError when one is missing."""
    folder = Path(settings.run) / "draws"
    for prompt in prompts:
        path = path_of(folder, prompt.caption)
        have = _count(path)
        if have < settings.candidates:
            raise ValueError(
                f"{path} holds {have} of {settings.candidates} candidates of {prompt.caption!r}; "
                "several machines need a shared run folder, and all ranks to come to their end"
            )
        yield _load(path).first(settings.candidates)


def path_of(folder: Path, caption: str) -> Path:
    """Where a caption's draws are kept."""
    return folder / (hashlib.sha256(caption.encode()).hexdigest()[:16] + ".safetensors")


def _judged(model: Model, caption: str, found: CaptionImages, settings: RankSettings) -> Draws:
    """Scores and verdicts of a caption's candidates."""
    assert model.ranker is not None
    scores = model.ranker.score([caption], found.images)[0]
    verdicts = torch.zeros(len(found.tokens), 0, dtype=torch.int8)
    if settings.data == SHAPES:
        verdicts = torch.tensor([verdict(p, caption) for p in found.images], dtype=torch.int8)
    return Draws(found.tokens, scores, verdicts)


def verdict(picture: Tensor, caption: str) -> list[int]:
    """What the checker says of pixels [3, H, W], in the order of ATTRIBUTES."""
    found = check(np.asarray(to_pil(picture)), caption).attributes
    return [int(found[name]) if name in found else NOT_CLAIMED for name in ATTRIBUTES]


def digest(model: Model) -> str:
    """A fingerprint of a model's weights and of what reads its captions."""
    words = model.tokenizer.encode(WORDS).tolist()
    parts = [fingerprint(p) for p in (model.prior, model.codec, model.ranker) if p is not None]
    return hashlib.sha256(json.dumps([words, parts]).encode()).hexdigest()[:16]


def _keep(path: Path, new: Draws) -> None:
    """Adds candidates to those that a file holds."""
    parts = [_load(path), new] if path.exists() else [new]
    tokens = torch.cat([d.tokens for d in parts])
    smallest = torch.int16 if int(tokens.max()) < 2**15 else torch.int32
    tensors = {
        "tokens": tokens.to(smallest),
        "scores": torch.cat([d.scores for d in parts]),
        "verdicts": torch.cat([d.verdicts for d in parts]),
    }
    with replacing(path) as beside:
        save_file(tensors, beside)


def _load(path: Path) -> Draws:
    try:
        held = load_file(path)
        return Draws(held["tokens"].long(), held["scores"], held["verdicts"])
    except (SafetensorError, KeyError) as error:
        raise _damaged(path, error) from error


def _count(path: Path) -> int:
    """Candidates that a file holds, without reading them."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as held:
            return int(held.get_slice("scores").get_shape()[0])
    except (SafetensorError, KeyError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged, remove it to draw anew: {error}")

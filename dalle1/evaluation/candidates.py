"""Candidates of every caption: drawn, scored and checked once, and kept on disk.

    run/draws/settings.json           what the candidates depend on
    run/draws/<caption>.safetensors   of one caption: tokens, scores, verdicts

A run that was stopped resumes with the missing candidates. A larger number of candidates adds to
those on disk: candidate i depends on (seed, caption, i) alone.

Dimensions: b candidates, m image positions, a attributes that the checker tells apart,
H W image height and width.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dalle1.common.config import SHAPES
from dalle1.common.files import read_text, replacing, write_text
from dalle1.common.images import to_pil
from dalle1.common.weights import fingerprint
from dalle1.data.shapes import check
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.prompts import Prompt
from dalle1.generation.batches import CaptionImages, draw_captions
from dalle1.generation.ranking import score_candidates
from dalle1.model import Model

# What a caption of the built-in data may claim, in the order of `CaptionCandidates.checks`.
ATTRIBUTES = ("count", "color", "shape", "size", "relation", "background")
NOT_CLAIMED = -1
# What a tokenizer without a fingerprint is known by.
PROBE_WORDS = ("quick", "brown", "fox", "lazy", "dog", "two", "red", "circles")


@dataclass
class CaptionCandidates:
    """One caption's candidates."""

    tokens: Tensor  # int64 [b, m]
    scores: Tensor  # float32 [b], the ranker's
    checks: Tensor  # int8 [b, a]: 1 right, 0 wrong or NOT_CLAIMED; [b, 0] without a checker

    @property
    def correct(self) -> Tensor:
        """Whether an image shows all that the caption claims: bool [b]."""
        return (self.checks != 0).all(dim=1)

    def first(self, count: int) -> CaptionCandidates:
        """Candidates 0 ... count - 1."""
        return CaptionCandidates(self.tokens[:count], self.scores[:count], self.checks[:count])


def write_or_check_settings(model: Model, settings: RankSettings, rank: int = 0) -> None:
    """Keeps what the candidates in the run's folder depend on, or compares it with what is kept.

    Every rank calls it and waits for the others before it draws. Rank 0 writes.

    Raises:
        ValueError: the folder holds candidates of another model or of other settings.
    """
    folder = _folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("seed", "temperature", "top_k", "top_p", "guidance", "dtype")
    current: dict[str, Any] = {name: getattr(settings, name) for name in names}
    current["judged"] = settings.data == SHAPES
    current["model"] = model_fingerprint(model)
    current["tokenizers"] = _tokenizers(model)
    path = settings_path(settings)
    if not path.exists():
        if rank == 0:
            write_text(path, json.dumps(current, indent=2) + "\n")
        return
    # Earlier releases did not keep the tokenizers.
    kept = {"tokenizers": current["tokenizers"], **json.loads(read_text(path))}
    for name, value in current.items():
        if kept.get(name) != value:
            raise ValueError(
                f"run: {folder} holds candidates of other settings, {name} was "
                f"{kept.get(name)!r} and is {value!r}; give another run, or remove the folder to "
                "draw them again"
            )


def draw_candidates(
    model: Model,
    prompts: Sequence[Prompt],
    settings: RankSettings,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> None:
    """Draws and keeps what is missing of every `world_size`-th caption, from number `rank` on.

    Call `write_or_check_settings` first.
    """
    folder = _folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    captions_by_count: dict[int, list[str]] = defaultdict(list)  # by candidates on disk
    for caption in list(dict.fromkeys(p.caption for p in prompts))[rank::world_size]:
        count = _count(path_of(folder, caption))
        if count < settings.candidates:
            captions_by_count[count].append(caption)
    total = sum((settings.candidates - n) * len(c) for n, c in captions_by_count.items())
    with tqdm(total=total, unit="image", desc="drawing", disable=not progress) as bar:
        for count, captions in sorted(captions_by_count.items()):
            drawn = draw_captions(
                model,
                captions,
                settings.candidates,
                settings.seed,
                settings.batch_size,
                settings.options(),
                start=count,
            )
            for caption, images in zip(captions, drawn, strict=True):
                new = _score_and_check(model, caption, images, settings)
                _append(path_of(folder, caption), new)
                bar.update(len(new.tokens))


def read_candidates(
    prompts: Sequence[Prompt], settings: RankSettings, tokens: bool = True
) -> Iterator[CaptionCandidates]:
    """The first `settings.candidates` candidates of every prompt, one prompt after the other.

    tokens: whether they are read; without, they are [b, 0]. The curves need none, and those of
        30,000 captions are 30 GB.

    Raises:
        ValueError: candidates are missing, or a file is damaged.
    """
    folder = _folder(settings)
    for prompt in prompts:
        path = path_of(folder, prompt.caption)
        count = _count(path)
        if count < settings.candidates:
            raise ValueError(
                f"{path} holds {count} of {settings.candidates} candidates of {prompt.caption!r}; "
                "several machines need a shared run folder, and all ranks must finish drawing"
            )
        yield _load(path, tokens).first(settings.candidates)


def settings_path(settings: RankSettings) -> Path:
    """The file that says what the candidates of a run depend on."""
    return _folder(settings) / "settings.json"


def path_of(folder: Path, caption: str) -> Path:
    """The file of a caption's candidates."""
    return folder / (hashlib.sha256(caption.encode()).hexdigest()[:16] + ".safetensors")


def check_image(image: Tensor, caption: str) -> list[int]:
    """What the checker says of an image [3, H, W] in [0, 1], in the order of ATTRIBUTES.

    Returns:
        1 for what the image shows, 0 for what it does not, NOT_CLAIMED for what the caption does
        not say.
    """
    checked = check(np.asarray(to_pil(image)), caption).attributes
    return [int(checked[name]) if name in checked else NOT_CLAIMED for name in ATTRIBUTES]


def model_fingerprint(model: Model) -> str:
    """16 digits of a model's weights and of how its tokenizer reads captions."""
    with warnings.catch_warnings():
        # A tokenizer of few text positions cuts our words: no news for the user.
        warnings.simplefilter("ignore")
        ids = model.tokenizer.encode(PROBE_WORDS).tolist()
    parts = [fingerprint(p) for p in (model.prior, model.codec, model.ranker) if p is not None]
    return hashlib.sha256(json.dumps([ids, parts]).encode()).hexdigest()[:16]


def _tokenizers(model: Model) -> list[str | None]:
    """Fingerprints of what the prior and the ranker read captions by; None where there is none."""
    readers = (model.tokenizer, getattr(model.ranker, "tokenizer", None))
    made = [getattr(reader, "fingerprint", None) for reader in readers]
    return [make() if make is not None else None for make in made]


def _folder(settings: RankSettings) -> Path:
    return Path(settings.run) / "draws"


def _score_and_check(
    model: Model, caption: str, drawn: CaptionImages, settings: RankSettings
) -> CaptionCandidates:
    assert model.ranker is not None
    scores = score_candidates(model.ranker, caption, drawn)
    checks = torch.zeros(len(drawn.tokens), 0, dtype=torch.int8)
    if settings.data == SHAPES:
        checks = torch.tensor([check_image(i, caption) for i in drawn.images], dtype=torch.int8)
    return CaptionCandidates(drawn.tokens, scores, checks)


def _append(path: Path, new: CaptionCandidates) -> None:
    """Adds candidates to those that a file holds."""
    parts = [_load(path), new] if path.exists() else [new]
    tokens = torch.cat([c.tokens for c in parts])
    smallest = torch.int16 if int(tokens.max()) < 2**15 else torch.int32
    tensors = {
        "tokens": tokens.to(smallest),
        "scores": torch.cat([c.scores for c in parts]),
        "verdicts": torch.cat([c.checks for c in parts]),
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def _load(path: Path, tokens: bool = True) -> CaptionCandidates:
    try:
        with safe_open(path, "pt") as file:
            scores, checks = file.get_tensor("scores"), file.get_tensor("verdicts")
            drawn = file.get_tensor("tokens").long() if tokens else torch.zeros(len(scores), 0)
        return CaptionCandidates(drawn, scores, checks)
    except (SafetensorError, KeyError) as error:
        raise _damaged(path, error) from error


def _count(path: Path) -> int:
    """Candidates that a file holds, without reading them."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            return int(file.get_slice("scores").get_shape()[0])
    except (SafetensorError, KeyError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged, remove it to draw its candidates again: {error}")

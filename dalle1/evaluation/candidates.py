"""Candidates of every caption: drawn, scored and checked once, and kept on disk.

    run/draws/settings.json           what the candidates depend on
    run/draws/<caption>.safetensors   of one caption: tokens, scores, verdicts

A run that was stopped resumes with the missing candidates. A larger number of candidates adds to
those on disk: candidate i depends on (seed, caption, i) alone.

Dimensions: b candidates, m image positions, a attributes that the judge tells apart,
H W image height and width.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dalle1.common.files import read_text, replacing, write_text
from dalle1.common.progress import progress_bar
from dalle1.common.weights import device_of, fingerprint
from dalle1.evaluation.best_of_n import choose_judged
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.judged import CompletableData, JudgedData, Prompt
from dalle1.generation.batches import CaptionImages, draw_captions
from dalle1.generation.images import decode
from dalle1.generation.ranking import score_candidates
from dalle1.model import Model

NOT_JUDGED = -2  # of all attributes of a candidate that was not judged
# What a tokenizer without a fingerprint is known by.
PROBE_WORDS = ("quick", "brown", "fox", "lazy", "dog", "two", "red", "circles")


@dataclass
class CaptionCandidates:
    """One caption's candidates."""

    tokens: Tensor  # int64 [b, m]
    scores: Tensor  # float32 [b], the ranker's
    checks: Tensor  # int8 [b, a]: 1 right, 0 wrong, NOT_CLAIMED or NOT_JUDGED; [b, 0]: no judge

    @property
    def judged(self) -> Tensor:
        """Whether an image was judged, if there is a judge: bool [b]."""
        return (self.checks != NOT_JUDGED).all(dim=1)

    @property
    def correct(self) -> Tensor:
        """Whether an image was judged and shows all that the caption claims: bool [b]."""
        return (self.checks != 0).all(dim=1) & self.judged

    def first(self, count: int) -> CaptionCandidates:
        """Candidates 0 ... count - 1."""
        return CaptionCandidates(self.tokens[:count], self.scores[:count], self.checks[:count])


def write_or_check_settings(
    model: Model, settings: RankSettings, rank: int = 0, judged: JudgedData | None = None
) -> None:
    """Keeps what the candidates in the run's folder depend on, or compares it with what is kept.

    Every rank calls it and waits for the others before it draws. Rank 0 writes. judged: the data,
    where they have a judge.

    Raises:
        ValueError: the folder holds candidates of another model or of other settings.
    """
    folder = _folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("seed", "temperature", "top_k", "top_p", "guidance", "dtype")
    current: dict[str, Any] = {name: getattr(settings, name) for name in names}
    current["judged"] = judged is not None
    current["model"] = model_fingerprint(model)
    current["tokenizers"] = _tokenizers(model)
    if judged is not None:
        current["judge"] = judged.fingerprint()
        current["completion"] = settings.completion
    path = settings_path(settings)
    if not path.exists():
        if rank == 0:
            write_text(path, json.dumps(current, indent=2) + "\n")
        return
    # Earlier releases kept neither tokenizers nor judge, and completed nothing.
    former = {n: current[n] for n in ("tokenizers", "judge") if n in current}
    kept = {**former, "completion": False, **json.loads(read_text(path))}
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
    judged: JudgedData | None = None,
) -> None:
    """Draws and keeps what is missing of every `world_size`-th caption, from number `rank` on.

    Call `write_or_check_settings` first. judged: the data, where they have a judge.
    """
    folder = _folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    prompts_by_count: dict[int, list[Prompt]] = defaultdict(list)  # by candidates on disk
    different = list({p.caption: p for p in reversed(prompts)}.values())[::-1]
    for prompt in different[rank::world_size]:
        count = _count(path_of(folder, prompt.caption))
        prompts_by_count[min(count, settings.candidates)].append(prompt)
    complete = prompts_by_count.pop(settings.candidates, [])
    total = sum((settings.candidates - n) * len(p) for n, p in prompts_by_count.items())
    with progress_bar(total=total, unit="image", desc="drawing", disable=not progress) as bar:
        for count, of_count in sorted(prompts_by_count.items()):
            drawn = _drawn(model, of_count, settings, count, judged)
            for prompt, images in zip(of_count, drawn, strict=True):
                _append(model, prompt.caption, images, settings, judged)
                bar.update(len(images.tokens))
    if judged is not None:
        for prompt in progress_bar(complete, unit="caption", desc="judging", disable=not progress):
            _judge_missing(model, prompt.caption, settings, judged)


def _drawn(
    model: Model,
    prompts: Sequence[Prompt],
    settings: RankSettings,
    start: int,
    judged: JudgedData | None,
) -> Iterator[CaptionImages]:
    """Candidates of each prompt, from number `start` on."""
    draw = partial(
        draw_captions,
        model,
        candidates=settings.candidates,
        seed=settings.seed,
        batch_size=settings.batch_size,
        options=settings.options(),
        start=start,
    )
    if not settings.completion:
        yield from draw(captions=[p.caption for p in prompts])
        return
    assert judged is not None
    for prompt in prompts:  # each has another beginning
        yield from draw(captions=[prompt.caption], prefix=upper_tokens(model, judged, prompt))


def upper_tokens(model: Model, judged: JudgedData, prompt: Prompt) -> Tensor:
    """The tokens of the upper half of a prompt's true image: int64 [rows x columns], on the CPU.

    The lower half is hidden before the codec reads the image: a token depends on pixels around its
    own, and the answer must not be among them.

    Raises:
        ValueError: the data have no images to complete, or the grid no two halves.
    """
    (rows, columns), stride = model.prior.grid, model.codec.stride
    if not isinstance(judged, CompletableData):
        raise ValueError("completion: expected data with images to complete, such as judge=emoji")
    if rows % 2 or rows != columns:
        raise ValueError(
            f"completion: expected a square grid of two halves, got {rows}x{columns} tokens"
        )
    image = judged.upper_half(prompt, rows * stride)
    tokens = model.codec.encode(image[None].to(device_of(model.codec)))
    return tokens[0, : rows // 2].flatten().cpu()


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


def _append(
    model: Model,
    caption: str,
    drawn: CaptionImages,
    settings: RankSettings,
    judged: JudgedData | None,
) -> None:
    """Scores new candidates, adds them to those on disk and judges what is to be judged."""
    assert model.ranker is not None
    path, count = path_of(_folder(settings), caption), len(drawn.tokens)
    attributes = len(judged.attributes) if judged else 0
    checks = torch.full((count, attributes), NOT_JUDGED, dtype=torch.int8)
    scores = score_candidates(model, model.ranker, caption, drawn)
    new = CaptionCandidates(drawn.tokens, scores, checks)
    parts = [_load(path), new] if path.exists() else [new]
    joined = CaptionCandidates(
        torch.cat([c.tokens for c in parts]),
        torch.cat([c.scores for c in parts]),
        torch.cat([c.checks for c in parts]),
    )
    if judged is not None:
        first = len(joined.scores) - count
        images = {first + i: image for i, image in enumerate(drawn.images)}
        _judge(model, caption, joined, _to_judge(joined, settings), images, judged)
    _save(path, joined)


def _judge_missing(model: Model, caption: str, settings: RankSettings, judged: JudgedData) -> None:
    """Judges what is to be judged of the candidates on disk and is not yet."""
    path = path_of(_folder(settings), caption)
    if _to_judge(_load(path, tokens=False), settings):
        candidates = _load(path)
        _judge(model, caption, candidates, _to_judge(candidates, settings), {}, judged)
        _save(path, candidates)


def _to_judge(candidates: CaptionCandidates, settings: RankSettings) -> list[int]:
    """The numbers of candidates that are to be judged and are not yet."""
    scores = candidates.scores[: settings.candidates]
    known = candidates.judged.tolist()
    return [i for i in choose_judged(scores, settings.judged_candidates).all if not known[i]]


def _judge(
    model: Model,
    caption: str,
    candidates: CaptionCandidates,
    numbers: Sequence[int],
    images: dict[int, Tensor],
    judged: JudgedData,
) -> None:
    """Judges candidates of these numbers; images: of some of them, by number."""
    missing = [i for i in numbers if i not in images]
    if missing:
        decoded = decode(model.codec, candidates.tokens[missing], model.prior.grid)
        images = images | dict(zip(missing, decoded, strict=True))
    for i in numbers:
        checked = judged.check(images[i], caption)
        candidates.checks[i] = torch.tensor(checked, dtype=torch.int8)


def _save(path: Path, candidates: CaptionCandidates) -> None:
    tokens = candidates.tokens
    smallest = torch.int16 if int(tokens.max()) < 2**15 else torch.int32
    tensors = {
        "tokens": tokens.to(smallest),
        "scores": candidates.scores,
        "verdicts": candidates.checks,
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

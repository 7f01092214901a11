"""Features of the images that are compared, computed once and kept on disk.

    run/features/<settings>/settings.json          what the features depend on, of which the
                                                   folder's name is a hash
    run/features/<settings>/probe.safetensors      what the network gives for two fixed images
    run/features/<settings>/<caption>.safetensors  of a caption's chosen images at all blur radii
    run/features/<settings>/true-000000.safetensors ...    of 64 samples' true images each

The ranks share the work, and what a run that was stopped has finished stays. The files do not
depend on the number of ranks. Other settings give a folder of their own; another network under the
same name is refused.

Dimensions: r blur radii, n images, f features, k classes, q numbers of candidates N, H W image
height and width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dalle1.common.files import read_text, replacing, write_text
from dalle1.common.images import to_tensor
from dalle1.common.progress import progress_bar
from dalle1.data.transforms import middle_square
from dalle1.evaluation.best_of_n import candidate_counts
from dalle1.evaluation.candidates import (
    CaptionCandidates,
    path_of,
    read_candidates,
    settings_path,
)
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.judged import JudgedData, Prompt
from dalle1.evaluation.metrics import BATCH, FeatureNetwork, blurred
from dalle1.evaluation.prompts import data_digest, true_images
from dalle1.generation.images import decode
from dalle1.generation.ranking import score_images
from dalle1.model import Model
from dvae.calls import trusted

SAMPLES = 64  # of a file of true images
BY_RADIUS = ("features", "logits", "scores", "correct")  # tensors whose first dimension is r
TOLERANCE = 1e-2  # of the probe: other devices and batches round otherwise, other weights by more


@dataclass(frozen=True)
class FeatureFolder:
    """Where the features of a benchmark lie, and what they are computed with."""

    path: Path
    model: Model
    network: FeatureNetwork
    settings: RankSettings
    judged: JudgedData | None = None  # the data, where they have a judge

    @property
    def side(self) -> int:
        """Of the compared images, in pixels."""
        return self.settings.image_size or self.model.image_size

    @property
    def counts(self) -> list[int]:
        """The N of the curves, q of them."""
        return candidate_counts(self.settings.candidates)


@dataclass
class ChosenFeatures:
    """Of one caption's images at one blur radius: the ranker's first for each N."""

    features: Tensor  # float32 [n, f], of different images
    logits: Tensor  # float32 [n, k]; [n, 0] without classes
    scores: Tensor  # float32 [n], the ranker's, of the blurred image
    correct: Tensor  # int8 [n]: whether the image shows its caption; [0] without a judge
    rows: Tensor  # int64 [q], which of the images is the first of N


@dataclass
class TrueFeatures:
    """Of the true images of a few samples at one blur radius."""

    features: Tensor  # float32 [n, f]
    samples: int  # n and those without an image that can be read


def open_folder(
    model: Model,
    prompts: Sequence[Prompt],
    network: FeatureNetwork,
    settings: RankSettings,
    rank: int = 0,
    judged: JudgedData | None = None,
) -> FeatureFolder:
    """The folder of the features of these settings; rank 0 makes it, the others wait for that.

    Call `write_or_check_settings` of the candidates first.

    Raises:
        ValueError: the network gives other features than those in the folder.
    """
    names = ("data", "blur", "image_size", "inception", "features", "reference_images")
    depends: dict[str, Any] = {name: getattr(settings, name) for name in names}
    depends["data_digest"] = data_digest(settings, judged)
    depends["candidates"] = json.loads(read_text(settings_path(settings)))
    if settings.inception is None and settings.features is None:  # the classes are the captions
        depends["captions"] = hashlib.sha256(
            json.dumps([p.caption for p in prompts]).encode()
        ).hexdigest()
    text = json.dumps(depends, indent=1, sort_keys=True)
    path = Path(settings.run) / "features" / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = FeatureFolder(path, model, network, settings, judged)
    generator = torch.Generator().manual_seed(0)
    features, logits = network(torch.rand(2, 3, folder.side, folder.side, generator=generator))
    probe = {"features": features, "logits": _filled(logits, len(features))}
    if (path / "probe.safetensors").exists():
        _check_probe(_load(path / "probe.safetensors"), probe, path)
    elif rank == 0:
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "settings.json", text + "\n")
        _save(path / "probe.safetensors", probe)
    return folder


def _check_probe(kept: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    for name, tensor in found.items():
        before = kept.get(name)
        same = before is not None and before.shape == tensor.shape
        if same and before is not None and before.numel():
            same = bool((before - tensor).norm() <= TOLERANCE * before.norm())
        if not same:
            raise ValueError(
                f"run: {path} holds {name} of another network; remove the folder to compute them "
                "again, or give another run"
            )


def measure_chosen(
    folder: FeatureFolder, prompts: Sequence[Prompt], rank: int = 0, world_size: int = 1
) -> None:
    """Computes and keeps what is missing of every `world_size`-th caption, from number `rank` on.

    All candidates must be drawn.
    """
    captions = list({p.caption: p for p in prompts}.values())[rank::world_size]
    bar = progress_bar(captions, desc="measuring", unit="caption", disable=rank > 0)
    for prompt in bar:
        (scored,) = read_candidates([prompt], folder.settings, tokens=False)
        best = _first_of_each(scored, folder.counts)
        path = path_of(folder.path, prompt.caption)
        if not path.exists() or _load(path, names=["candidates"])["candidates"].tolist() != best:
            (candidates,) = read_candidates([prompt], folder.settings)
            _save(path, _of_caption(folder, prompt.caption, candidates))


def chosen_images(
    model: Model, candidates: CaptionCandidates, counts: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """The ranker's first of candidates 0 ... N - 1 for each N, each decoded once.

    Returns:
        Images [n, 3, H, W], all different, and the row of each N's image among them.
    """
    best = _first_of_each(candidates, counts)
    different = sorted(set(best))
    images = decode(model.codec, candidates.tokens[different], model.prior.grid)
    return images, [different.index(i) for i in best]


def _first_of_each(candidates: CaptionCandidates, counts: Sequence[int]) -> list[int]:
    """The number of the ranker's first of candidates 0 ... N - 1, for each N."""
    return [int(candidates.scores[:n].argmax()) for n in counts]


def _of_caption(
    folder: FeatureFolder, caption: str, candidates: CaptionCandidates
) -> dict[str, Tensor]:
    """What is kept of a caption."""
    model, radii = folder.model, folder.settings.blur
    assert model.ranker is not None
    images, rows = chosen_images(model, candidates, folder.counts)
    squares = resized(images, folder.side)
    soft = torch.cat([blurred(squares, radius) for radius in radii])  # [r * n, 3, side, side]
    features, logits = folder.network(soft)
    with trusted():
        scores = score_images(model, model.ranker, [caption], soft)[0]
    correct = torch.zeros(len(soft) if folder.judged else 0, dtype=torch.int8)
    if folder.judged:
        for i in range(len(soft)):
            # NOT_CLAIMED is true: what a caption does not claim cannot be wrong.
            correct[i] = all(folder.judged.check(soft[i], caption))
    tensors = {
        "features": features.float(),
        "logits": _filled(logits, len(soft)).float(),
        "scores": scores.float(),
    }
    folded = {
        name: rearrange(tensor, "(r n) ... -> r n ...", r=len(radii)).contiguous()
        for name, tensor in tensors.items()
    }
    folded["correct"] = correct.reshape(len(radii), -1)
    best = torch.tensor(_first_of_each(candidates, folder.counts))
    return {**folded, "candidates": best, "rows": torch.tensor(rows)}


def resized(images: Tensor, side: int) -> Tensor:
    """Images [n, 3, H, W] in [0, 1] as true images are read: in 8 bits, the middle square, scaled.

    Returns:
        [n, 3, side, side].
    """
    pixels = rearrange((images * 255).round().to(torch.uint8), "n c h w -> n h w c").numpy()
    return torch.stack([to_tensor(middle_square(image, side)) for image in pixels])


def read_chosen(folder: FeatureFolder, caption: str, radius: int) -> ChosenFeatures:
    """What was computed of a caption; radius: the number of the blur radius.

    Raises ValueError where it is missing or damaged.
    """
    path = path_of(folder.path, caption)
    tensors = _load(path, radius)
    names = ("features", "logits", "scores", "correct", "rows")
    return ChosenFeatures(*(tensors[name] for name in names))


def measure_true(folder: FeatureFolder, rank: int = 0, world_size: int = 1) -> None:
    """Computes and keeps what is missing of every `world_size`-th file of true images.

    Rank 0 also keeps how many samples there are, when it has seen the last.
    """
    total = folder.path / "true.json"
    count = int(json.loads(read_text(total))["samples"]) if total.exists() else None
    if count is not None and all(_true_path(folder, i).exists() for i in _numbers(count)):
        return
    last = -1

    def wanted(index: int) -> bool:
        nonlocal last
        last = index
        number = index // SAMPLES
        return number % world_size == rank and not _true_path(folder, number).exists()

    images = true_images(folder.settings, folder.side, wanted, folder.judged)
    if images is None:
        return
    bar = progress_bar(images, desc="true images", unit="image", disable=rank > 0)
    held: list[Tensor | None] = []
    number = 0
    for index, image in bar:
        if held and index // SAMPLES != number:
            _keep_true(folder, number, held)
            held = []
        number = index // SAMPLES
        held.append(image)
    if held:
        _keep_true(folder, number, held)
    if rank == 0:
        write_text(total, json.dumps({"samples": last + 1}) + "\n")


def _keep_true(folder: FeatureFolder, number: int, images: Sequence[Tensor | None]) -> None:
    """Computes and writes a file of true images; None for those that cannot be read."""
    good = [image for image in images if image is not None]
    radii = folder.settings.blur
    features = torch.zeros(len(radii), 0, 0)
    if good:
        squares = torch.stack(good)
        by_radius = []
        for radius in radii:
            parts = [folder.network(part)[0] for part in blurred(squares, radius).split(BATCH)]
            by_radius.append(torch.cat(parts).float())
        features = torch.stack(by_radius)
    _save(_true_path(folder, number), {"features": features, "samples": torch.tensor(len(images))})


def read_true(folder: FeatureFolder, radius: int) -> Iterator[TrueFeatures]:
    """What was computed of the true images, in the order of the data; nothing where it has none.

    Raises ValueError where a file is missing or damaged; radius: the number of the blur radius.
    """
    total = folder.path / "true.json"
    if not total.exists():
        return
    count = int(json.loads(read_text(total))["samples"])
    for number in _numbers(count):
        tensors = _load(_true_path(folder, number), radius)
        yield TrueFeatures(tensors["features"], int(tensors["samples"]))


def _true_path(folder: FeatureFolder, number: int) -> Path:
    return folder.path / f"true-{number:06d}.safetensors"


def _numbers(samples: int) -> range:
    """Of the files that hold so many samples."""
    return range(-(-samples // SAMPLES))


def _filled(logits: Tensor | None, rows: int) -> Tensor:
    return torch.zeros(rows, 0) if logits is None else logits


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def _load(
    path: Path, radius: int | None = None, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The tensors of a file, or those that are named; of those with a dimension r, one radius if
    it is given."""
    try:
        with safe_open(path, "pt") as file:
            return {
                name: file.get_slice(name)[radius]
                if radius is not None and name in BY_RADIUS
                else file.get_tensor(name)
                for name in names or file.keys()
            }
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is missing; several machines need a shared run folder, and all ranks must "
            "finish measuring"
        ) from error
    except (SafetensorError, KeyError, IndexError) as error:
        raise ValueError(
            f"{path} is damaged, remove it to compute its features again: {error}"
        ) from error

"""A folder of emoji data as data that are judged, see `dalle1.data.emoji`.

Captions, scenes and true images come from the shards that `dalle1 data emoji` wrote, so that they
are those of the data even where a later release draws other scenes. The packages give the judge
its pictures.

Dimensions: H W image height and width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dalle1.common.images import to_tensor
from dalle1.data.emoji import SPLITS, STYLES, EmojiDataset, EmojiJudge, Piece, Scene, read_emoji
from dalle1.data.emoji.claims import CaptionReader, Claim
from dalle1.data.emoji.dataset import RELATIONS, without_skin_tones
from dalle1.data.emoji.export import digest, read_record
from dalle1.data.emoji.judge import TOP
from dalle1.data.emoji.packages import NAMES, find_packages
from dalle1.data.emoji.pictures import BACKGROUNDS
from dalle1.data.emoji.trials import WRONG, wrong_scene
from dalle1.data.samples import BadSample, RawSample, caption_of, image_of
from dalle1.data.shards.index import find_shards, raw_samples
from dalle1.data.transforms import middle_square, read_image
from dalle1.evaluation.config import CopySettings, DataSettings, RankSettings
from dalle1.evaluation.judged import NOT_CLAIMED, Prompt
from dalle1.evaluation.prompts import images_of

PACKAGES = "data/packages"
MOST_PIECES = 64  # of a scene
SINGLE, PAIR, TWICE = "single", "pair", "twice"
BACKGROUND = "another background"  # of `WRONG`


@dataclass(frozen=True)
class _Sample:
    """What a shard holds of a caption that was chosen."""

    scene: Scene
    image: bytes
    number: int


class EmojiData:
    """A `JudgedData`, `CompletableData` and `DistractingData`.

    Its groups are splits. Captions that the training split has too are left out, but where a codec
    is tried alone. With `completion` the captions are those of one emoji in two styles, and emoji
    and style are those of the lower one.

    Raises:
        ValueError: the folder has no such split, or the packages are not those it was made of.
    """

    attributes: ClassVar = ("top-1", "top-5", "style", "background", "relation")

    def __init__(self, settings: DataSettings) -> None:
        self.folder = Path(settings.data)
        self.count = settings.captions
        self.completion = isinstance(settings, RankSettings) and settings.completion
        # Reading 200,000 captions takes a minute. To a codec they are nothing.
        self.unseen = not isinstance(settings, CopySettings)
        record = read_record(self.folder)
        self.splits = settings.splits or ["test"]
        for split in self.splits:
            if split not in record["splits"] or split not in SPLITS:
                raise ValueError(
                    f"splits: expected some of {', '.join(record['splits'])}, which "
                    f"{str(self.folder)!r} has, got {split!r}; `dalle1 data emoji` writes others"
                )
        self.side = int(record["splits"][self.splits[0]]["side"])
        uses = [use for use in (*STYLES, NAMES) if use in record.get("packages", {})]
        found = find_packages(uses, Path(settings.packages or PACKAGES))
        self.emoji = read_emoji(
            {use: f.folder for use, f in found.items() if use != NAMES}, found[NAMES].folder
        )
        if not record.get("skin_tones", True):
            self.emoji = without_skin_tones(self.emoji)
        self._digest = digest(self.emoji)
        if self._digest != record.get("digest"):
            raise ValueError(
                f"packages: expected those that {str(self.folder)!r} was made of, got others; name "
                "the folder that `dalle1 data emoji` was given"
            )
        self._by_code = {e.code: e for e in self.emoji}
        self._samples: dict[tuple[str, str], _Sample] = {}  # by group and caption
        self._notes: list[str] = []

    @cached_property
    def judge(self) -> EmojiJudge:
        """Made when it is first asked for, in half a minute."""
        return EmojiJudge(self.emoji)

    @cached_property
    def dataset(self) -> EmojiDataset:
        """What draws scenes."""
        return EmojiDataset(self.emoji)

    def prompts(self) -> list[Prompt]:
        """See `JudgedData`."""
        self._samples, self._notes = {}, []
        trained = self._trained() if self.unseen else set()
        prompts = [prompt for split in self.splits for prompt in self._of_split(split, trained)]
        reader = CaptionReader(self.emoji)
        for prompt in prompts:
            reader.read(prompt.caption)  # raises ValueError for one that cannot be judged
        return prompts

    def check(self, image: Tensor, caption: str) -> list[int]:
        """See `JudgedData`."""
        found = self.judge.judge(image, caption)
        emoji = (found.top1, found.top5, found.style)
        if self.completion:
            # Read the other way round, what is called the lower one is the upper one.
            upper, lower = found.found
            ordered, rank = upper.y < lower.y, found.ranks[1]
            emoji = (ordered and rank == 0, ordered and rank < TOP, ordered and found.styled[1])
        right = (*emoji, found.background, found.relation)
        return [NOT_CLAIMED if held is None else int(held) for held in right]

    def image(self, prompt: Prompt, side: int) -> Tensor:
        """See `JudgedData`."""
        data = self._samples[prompt.group, prompt.caption].image
        return to_tensor(np.array(middle_square(read_image(data), side)))

    def upper_half(self, prompt: Prompt, side: int) -> Tensor:
        """See `CompletableData`: the lower half is the plain background."""
        image = self.image(prompt, side)
        background = BACKGROUNDS[self._samples[prompt.group, prompt.caption].scene.background]
        image[:, side // 2 :] = torch.tensor(background)[:, None, None] / 255
        return image

    def distractors(self, prompt: Prompt, side: int) -> dict[str, Tensor]:
        """See `DistractingData`. A background counts where the caption says it."""
        sample = self._samples[prompt.group, prompt.caption]
        found = {}
        for i, wrong in enumerate(WRONG):
            if wrong == BACKGROUND and self._claim(prompt).background is None:
                continue
            rng = np.random.default_rng([i, sample.number])
            scene = wrong_scene(self.judge, self.dataset, sample.scene, wrong, rng)
            if scene is not None:
                found[wrong] = to_tensor(self.dataset.render(scene, side))
        return found

    def true_images(
        self, limit: int, side: int, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, Tensor | None]]:
        """See `JudgedData`: of the first split."""
        return images_of(self._shards(self.splits[0]), limit, side, wanted)

    def files(self) -> list[str]:
        """See `JudgedData`."""
        return find_shards(self._shards(self.splits[0]))

    def fingerprint(self) -> str:
        """See `JudgedData`."""
        return f"emoji 1 {self._digest[:16]}"

    def notes(self) -> list[str]:
        """See `JudgedData`."""
        return self._notes

    def _claim(self, prompt: Prompt) -> Claim:
        return self.judge.reader.read(prompt.caption)

    def _shards(self, split: str) -> str:
        return str(self.folder / split)

    def _trained(self) -> set[str]:
        """The captions of the training split, where it lies beside the others."""
        if not (self.folder / "train").is_dir():
            self._notes.append(
                f"{self.folder} has no training split: its captions may be among these."
            )
            return set()
        samples = raw_samples(self._shards("train"), frozenset({"txt"}))
        return {caption for sample in samples if (caption := _caption(sample)) is not None}

    def _of_split(self, split: str, trained: set[str]) -> list[Prompt]:
        """The first captions of a split that differ and that training does not show."""
        prompts: list[Prompt] = []
        left_out = 0
        for number, raw in enumerate(raw_samples(self._shards(split))):
            caption, sample = _caption(raw), self._sample(raw, number)
            if caption is None or sample is None or (split, caption) in self._samples:
                continue
            kind = {None: SINGLE, TWICE: TWICE}.get(sample.scene.relation, PAIR)
            if self.completion and kind != TWICE:
                continue
            if split != "train" and caption in trained:
                left_out += 1
                continue
            self._samples[split, caption] = sample
            prompts.append(Prompt(caption, split, None if self.completion else kind))
            if len(prompts) == self.count:
                break
        if not prompts:
            what = f"scenes {TWICE}" if self.completion else "captions"
            raise ValueError(f"splits: {split} of {str(self.folder)!r} has no {what} to draw")
        if left_out:
            self._notes.append(
                f"{split}: {left_out} captions that the training split has too were left out."
            )
        return prompts

    def _sample(self, raw: RawSample, number: int) -> _Sample | None:
        """None for a sample that cannot be used."""
        try:
            image = image_of(raw)
            read_image(image)
            return _Sample(self._scene(json.loads(raw["json"])["scene"]), image, number)
        except (BadSample, KeyError, TypeError, ValueError, RecursionError):
            return None

    def _scene(self, details: Mapping[str, Any]) -> Scene:
        """A scene as `dataclasses.asdict` wrote it; ValueError for one that cannot be drawn."""
        pieces = tuple(Piece(**piece) for piece in details["pieces"])
        relation, background = details["relation"], details["background"]
        known = relation in (None, TWICE, *RELATIONS) and background in BACKGROUNDS
        if not known or not (1 if relation is None else 2) <= len(pieces) <= MOST_PIECES:
            raise ValueError("scene")
        for piece in pieces:
            inside = all(0 <= v <= 1 for v in (piece.x, piece.y, piece.side))
            if not inside or piece.style not in self._by_code[piece.code].pictures:
                raise ValueError("piece")
        return Scene(pieces, relation, background)


def _caption(sample: RawSample) -> str | None:
    try:
        return caption_of(sample, "txt")
    except BadSample:
        return None

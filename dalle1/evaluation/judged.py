"""Data whose captions a program can check images against: what a benchmark knows of them.

The built-in shapes and the emoji are two such data sets. A third is a class with the methods of
`JudgedData` and a line in `JUDGES`, or is named as `judge=module:function` (docs/ranking.md).

Dimensions: H W image height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from dalle1.common.config import SHAPES
from dalle1.evaluation.config import DataSettings

NOT_CLAIMED = -1  # of an attribute that a caption says nothing of
# By the setting `judge`: what is called with the settings of a benchmark and returns a JudgedData.
JUDGES = {
    SHAPES: "dalle1.evaluation.shapes_data:ShapesData",
    "emoji": "dalle1.evaluation.emoji_data:EmojiData",
}


@dataclass(frozen=True)
class Prompt:
    """A caption, and what it is reported in.

    Attributes:
        caption: differs from all others of its group, where the data are judged.
        group: a part of the report of its own.
        kind: of its scene; groups are reported by kind too. None: there is one kind.
    """

    caption: str
    group: str
    kind: str | None = None


class JudgedData(Protocol):
    """A data set with its judge.

    Attributes:
        attributes: what a caption may claim, in the order of `check`.
        side: of its images, in pixels, where no model says another one.
    """

    @property
    def attributes(self) -> Sequence[str]: ...
    @property
    def side(self) -> int: ...

    def prompts(self) -> list[Prompt]:
        """The captions that the settings ask for, group by group.

        Raises ValueError where the data cannot be read, or a caption cannot be judged.
        """
        ...

    def check(self, image: Tensor, caption: str) -> list[int]:
        """What an image, floats [3, H, W] in [0, 1] on the CPU, shows of what a caption claims.

        Returns 1 for each attribute that it shows, 0 for one that it does not, NOT_CLAIMED for one
        that the caption says nothing of. Raises ValueError for an image of a wrong size.
        """
        ...

    def image(self, prompt: Prompt, side: int) -> Tensor:
        """The true image of one of `prompts`: float32 [3, side, side] in [0, 1]."""
        ...

    def true_images(
        self, limit: int, side: int, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, Tensor | None]]:
        """The images of the first `limit` samples, which FID compares with; see
        `prompts.true_images`."""
        ...

    def files(self) -> list[str]:
        """What the true images are read from; none where they are made."""
        ...

    def fingerprint(self) -> str:
        """Changes when the judge does: results of two judges are never mixed."""
        ...

    def notes(self) -> list[str]:
        """Sentences for the report on how the captions were chosen."""
        ...


@runtime_checkable
class CompletableData(Protocol):
    """Data of which some captions say of the lower half what the upper half lets one guess."""

    def upper_half(self, prompt: Prompt, side: int) -> Tensor:
        """The true image without what its lower half shows: float32 [3, side, side]."""
        ...


@runtime_checkable
class DistractingData(Protocol):
    """Data that can be drawn with one thing wrong, to try a ranker alone."""

    def distractors(self, prompt: Prompt, side: int) -> dict[str, Tensor]:
        """Images, float32 [3, side, side], by what of the caption they do not show."""
        ...


def open_judged(settings: DataSettings) -> JudgedData | None:
    """The data of a benchmark with their judge; None where no program can check them.

    Raises:
        ValueError: the judge is not known, or the data are none of its.
    """
    name = SHAPES if settings.data == SHAPES else settings.judge
    if name is None:
        return None
    opened: JudgedData = imported(JUDGES.get(name, name), "judge", ", ".join(JUDGES))(settings)
    return opened


def imported(name: str, setting: str, known: str = "") -> Any:
    """What a 'module:function' names; ValueError, which names the setting, where there is none."""
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        others = f"{known} or " if known else ""
        raise ValueError(f"{setting}: expected {others}'module:function', got {name!r}")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{setting}: {name!r} cannot be imported: {error}") from error

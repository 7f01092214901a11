"""What a client asks for, what a server allows, and how it says no."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field

from dalle1.common.arguments import as_captions, as_int
from dalle1.common.image_inputs import ImageLike
from dalle1.generation.options import SamplingOptions


class Limits(BaseModel):
    """What one request, and all requests together, may take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    waiting: int = Field(64, ge=1, description="requests of a device that wait or are drawn")
    captions: int = Field(16, ge=1, description="of a request")
    letters: int = Field(1000, ge=1, description="of a caption")
    candidates: int = Field(512, ge=1, description="of all captions of a request")
    batch_size: int | None = Field(
        128,
        ge=1,
        description="candidates of all requests that are drawn at once; more draw faster, and let "
        "others wait longer; None: as many as memory holds",
    )
    gather_seconds: float = Field(
        0.02,
        ge=0,
        le=10,
        description="for which a batch that is not full waits for others, or a fiftieth of the "
        "last batch's time if that is longer",
    )
    idle_seconds: float = Field(
        30, ge=0, description="without a request after which the memory of batches is given back"
    )


class LimitExceeded(ValueError):
    """A request asks for more than the server allows."""


class UnknownModel(ValueError):
    """A request names a model that is not served."""


class QueueFull(Exception):
    """Too many requests wait; a later try may be taken."""


class Cancelled(Exception):
    """The job was cancelled."""


class NothingComplete(Exception):
    """The job was stopped before `keep` candidates of its first caption were complete."""


class Closed(Exception):
    """The worker was closed before the job was done."""


@dataclass(frozen=True)
class Request:
    """Images of captions; the arguments of `dalle1.sample`.

    Numbers may be those of any library. ValueError where something is no number, no caption or out
    of its range; what depends on the model is checked by `SamplingWorker.submit`.

    Attributes:
        model: its name.
        captions: one or a few.
        candidates: drawn for each caption.
        keep: returned for each caption; all candidates where the model has no ranker.
        options: how tokens are drawn; `Model.sampling.options()` for what a model's folder says.
        seed: candidate i of a caption depends on (seed, caption, i) alone.
        image: an image to complete.
        rows: token rows of `image` that every candidate begins with.
        preview_rows: token rows between two previews; None: no previews.
        preview_images: candidates of a caption that a preview shows, the first ones; None: all.
        first_candidate: the number of the first one; candidates of another call are drawn again, or
            go on, by their numbers.
        of_fewer: whether the result has `best_of_fewer`, too.
    """

    model: str
    captions: Sequence[str]
    candidates: int = 1
    keep: int = 1
    options: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0
    image: ImageLike | None = field(default=None, compare=False)
    rows: int = 0
    preview_rows: int | None = None
    preview_images: int | None = None
    first_candidate: int = 0
    of_fewer: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "captions", tuple(as_captions(self.captions)[0]))
        for name in ("candidates", "keep", "seed", "rows", "first_candidate"):
            object.__setattr__(self, name, as_int(getattr(self, name), name))
        for name in ("preview_rows", "preview_images"):
            if getattr(self, name) is not None:
                value = as_int(getattr(self, name), name)
                if value < 1:
                    raise ValueError(f"{name}: expected at least 1 or None, got {value}")
                object.__setattr__(self, name, value)

    def check_limits(self, limits: Limits) -> None:
        """Raises LimitExceeded where the request asks for too much."""
        letters = max(map(len, self.captions))
        for name, value, most in (
            ("captions", len(self.captions), limits.captions),
            ("caption", letters, limits.letters),
            ("candidates", self.candidates * len(self.captions), limits.candidates),
        ):
            if value > most:
                what = {"caption": " letters", "candidates": " of all captions"}.get(name, "")
                raise LimitExceeded(f"{name}: expected at most {most}{what}, got {value}")

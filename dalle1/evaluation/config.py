"""The settings of a ranking benchmark: one YAML file an experiment."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dalle1.common.config import SHAPES, Location, Section
from dalle1.common.hardware import DTypeName
from dalle1.generation.options import SamplingOptions


class RankSettings(Section):
    """Everything that a ranking benchmark depends on (paper section 3, figures 6 and 9)."""

    renamed: ClassVar = {
        "reference_pictures": "reference_images",
        "shown": "sheet_captions",
    }

    model: Location = Field(description="model folder, with a ranker")
    ranker: str | None = Field(
        None,
        description="in place of the model's own: a folder with a ranker, "
        "'open_clip:MODEL/PRETRAINED', 'hf:NAME', 'likelihood' or 'perplexity'; null: its own",
    )
    run: Location = Field(description="folder of the benchmark; on several machines, a shared one")
    data: Location = Field(
        description="captions with their true images: shards, a folder of pairs or 'shapes'; or "
        "captions alone, and then no FID: token shards, or a .txt with one a line"
    )
    caption_key: str = Field("txt", description="txt, or the name of a key of the json")
    captions: int = Field(128, ge=1, description="largest number of captions")
    caption_seed: int | None = Field(
        None,
        ge=0,
        description="chooses different captions at random among all of the data; null: the first",
    )
    captions_per_image: Literal["one", "all"] = Field(
        "one", description="of images with several captions"
    )
    candidates: int = Field(512, ge=1, description="candidates of each caption")
    seed: int = Field(0, ge=0, description="of the random numbers that candidates are drawn with")
    temperature: float = Field(
        1.0, description="divides the logits; at least 0, which takes the likeliest token"
    )
    top_k: int | None = Field(
        None, description="keeps the k likeliest tokens, k at least 1; null: all"
    )
    top_p: float | None = Field(
        None,
        description="keeps the likeliest tokens of this total probability, in (0, 1]; null: all",
    )
    guidance: float = Field(
        1.0, description="scale of classifier-free guidance, at least 0; 1: none"
    )
    batch_size: int | None = Field(
        None, ge=1, description="candidates drawn at once; null: what memory holds"
    )
    dtype: DTypeName = Field("float32", description="of the transformer that draws")
    blur: list[float] = Field(
        [0, 1, 2, 4, 8], min_length=1, description="blur radii, in pixels; 0: none"
    )
    image_size: int | None = Field(
        None,
        ge=1,
        description="side in pixels that generated and true images are brought to before they are "
        "blurred and compared; null: the model's",
    )
    inception: Location | None = Field(
        None,
        description="file of FID's Inception network, pt_inception-2015-12-05-6726825d.pth; null: "
        "FID and Inception Score use `features`",
    )
    features: str | None = Field(
        None, description="'module:function' that returns a network for FID; null: CLIP"
    )
    reference_images: int = Field(
        30_000,
        ge=2,
        description="number of samples, from the first on, whose true images candidates are "
        "compared with",
    )
    inception_splits: int = Field(
        10, ge=1, description="parts that the Inception Score is averaged over"
    )
    bootstrap: int = Field(
        1000, ge=1, description="bootstrap resamples of each confidence interval"
    )
    sheet_captions: int = Field(8, ge=1, description="captions on the contact sheet")
    # Of data=shapes alone.
    heldout_captions: int | None = Field(
        None, ge=1, description="captions with (color, shape) pairs that never occur in training"
    )
    training_captions: int | None = Field(
        None, ge=1, description="captions of so many first training samples are left out"
    )

    @model_validator(mode="after")
    def _check(self) -> RankSettings:
        self.options()  # raises ValueError for what does not fit
        for name in ("heldout_captions", "training_captions"):
            if self.data != SHAPES and getattr(self, name) is not None:
                raise ValueError(f"{name} is read with data=shapes alone: take it out")
        for name in ("caption_seed", "captions_per_image"):
            if self.data == SHAPES and getattr(self, name) not in (None, "one"):
                raise ValueError(f"{name} is not read with data=shapes: take it out")
        if self.inception is not None and self.features is not None:
            raise ValueError("inception and features are two networks for FID: take one out")
        if min(self.blur) < 0 or len(set(self.blur)) < len(self.blur):
            raise ValueError(f"blur: expected different radii >= 0, got {self.blur}")
        return self

    def options(self) -> SamplingOptions:
        """How tokens are drawn."""
        return SamplingOptions(self.temperature, self.top_k, self.top_p, self.guidance)

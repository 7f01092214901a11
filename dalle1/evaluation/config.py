"""The settings of benchmarks: one YAML file an experiment."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from dalle1.common.config import SHAPES, Location, Section
from dalle1.common.hardware import DTypeName
from dalle1.generation.options import SamplingOptions


class Measure(Section):
    """What a file of settings asks for, which says by what class it is read."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    measure: Literal["ranking", "copies", "retrieval"] = "ranking"


class DataSettings(Section):
    """The captions of a benchmark, their judge, and where its results go."""

    run: Location = Field(description="folder of the benchmark; on several machines, a shared one")
    data: Location = Field(
        description="captions with their true images: shards, a folder of pairs or 'shapes'; "
        "captions alone, and then no FID: token shards, or a .txt with one a line; or, with "
        "`judge`, the folder of its data set"
    )
    judge: str | None = Field(
        None,
        description="what checks images against captions: 'emoji', or 'module:function' of yours; "
        "null: nothing, but of data=shapes its own checker",
    )
    packages: Location | None = Field(
        None, description="with judge=emoji, the folder of its packages; null: data/packages"
    )
    splits: list[str] | None = Field(
        None,
        min_length=1,
        description="with `judge`, the splits that captions are taken of, each a group of the "
        "report; null: the test split",
    )
    captions: int = Field(
        128, ge=1, description="largest number of captions; of each split, where there are splits"
    )
    bootstrap: int = Field(
        1000, ge=1, description="bootstrap resamples of each confidence interval"
    )
    sheet_captions: int = Field(8, ge=1, description="captions on the contact sheet")

    @model_validator(mode="after")
    def _check_data(self) -> DataSettings:
        if self.judge is not None and self.data == SHAPES:
            raise ValueError("judge is not read with data=shapes, which has its own: take it out")
        for name in ("packages", "splits"):
            if self.judge is None and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is read with a judge of data in a folder alone, such as judge=emoji: "
                    "take it out"
                )
        if self.splits is not None and len(set(self.splits)) < len(self.splits):
            raise ValueError(f"splits: expected different ones, got {', '.join(self.splits)}")
        return self


class RankSettings(DataSettings):
    """Everything that a ranking benchmark depends on (paper section 3, figures 6 and 9)."""

    renamed: ClassVar = {
        "reference_pictures": "reference_images",
        "shown": "sheet_captions",
    }

    measure: Literal["ranking"] = Field("ranking", description="what is measured")
    model: Location = Field(description="model folder, with a ranker")
    ranker: str | None = Field(
        None,
        description="in place of the model's own: a folder with a ranker, "
        "'open_clip:MODEL/PRETRAINED', 'hf:NAME', one of these with '+WEIGHT*likelihood', "
        "'likelihood' or 'perplexity'; null: its own",
    )
    caption_key: str = Field("txt", description="txt, or the name of a key of the json")
    caption_seed: int | None = Field(
        None,
        ge=0,
        description="chooses different captions at random among all of the data; null: the first",
    )
    captions_per_image: Literal["one", "all"] = Field(
        "one", description="of images with several captions"
    )
    candidates: int = Field(512, ge=1, description="candidates of each caption")
    judged_candidates: int | None = Field(
        None,
        ge=2,
        description="candidates of each caption that are judged: half of them the ranker's best, "
        "half any of the others, from which the rest is estimated; null: all",
    )
    completion: bool = Field(
        False,
        description="whether the upper half of the true image is given, and the lower half drawn "
        "and judged; of judged data with captions for it, as the emoji have",
    )
    seed: int = Field(0, ge=0, description="of the random numbers that candidates are drawn with")
    temperature: float = Field(
        1.0,
        description="divides the logits; at least 0, which takes the likeliest token; what the "
        "model's folder names is not used, so that figures of models compare",
    )
    top_k: int | None = Field(
        None, description="keeps the k likeliest tokens, k at least 1; null: all"
    )
    top_p: float | None = Field(
        None,
        description="keeps the likeliest tokens of this total probability, in (0, 1]; null: all",
    )
    guidance: float = Field(
        1.0,
        description="scale of classifier-free guidance, at least 0; 1: none; the folder's is not "
        "used either",
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
        judged = "data=shapes" if self.data == SHAPES else "a judge" if self.judge else None
        for name in ("caption_seed", "captions_per_image"):
            if judged and getattr(self, name) not in (None, "one"):
                raise ValueError(f"{name} is not read with {judged}: take it out")
        if self.judge and self.caption_key != "txt":
            raise ValueError("caption_key is not read with a judge: take it out")
        for name in ("judged_candidates", "completion"):
            if not judged and getattr(self, name):
                raise ValueError(f"{name} is read with data that are judged alone: take it out")
        if self.inception is not None and self.features is not None:
            raise ValueError("inception and features are two networks for FID: take one out")
        if min(self.blur) < 0 or len(set(self.blur)) < len(self.blur):
            raise ValueError(f"blur: expected different radii >= 0, got {self.blur}")
        return self

    def options(self) -> SamplingOptions:
        """How tokens are drawn."""
        return SamplingOptions(self.temperature, self.top_k, self.top_p, self.guidance)


class CopySettings(DataSettings):
    """What a codec's copies of true images still show of their captions."""

    measure: Literal["copies"] = Field(description="what is measured")
    codec: Location = Field(description="folder of a codec, or of a model with one")
    image_size: int | None = Field(
        None, ge=1, description="side in pixels of the images that are copied; null: the data's"
    )


class RetrievalSettings(DataSettings):
    """How often a ranker prefers a true image to one with one thing wrong."""

    measure: Literal["retrieval"] = Field(description="what is measured")
    ranker: str = Field(
        description="a folder with a ranker, of a model or of CLIP alone; "
        "'open_clip:MODEL/PRETRAINED' or 'hf:NAME'"
    )
    image_size: int | None = Field(
        None, ge=1, description="side in pixels of the images that are scored; null: the data's"
    )

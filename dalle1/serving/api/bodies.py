"""What a request's body may say.

Parameters of the hosted API that mean nothing here are listed one by one: those that only describe
the caller or a style that these models do not have are taken and have no effect; those that would
promise something else than what comes (another size, a transparent background, a mask) are refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

LARGEST = 2**63 - 1
MAX_PREVIEWS = 3  # that the API allows

NO_EFFECT = "taken, without effect: these models have one"
Ignored = Annotated[str | None, Field(max_length=512)]


class ImagesBody(BaseModel):
    """What generations and edits have in common."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(description="the caption")
    model: str | None = Field(None, description="one of /v1/models; without it the first")
    n: int | None = Field(None, ge=1, le=LARGEST, description="images; 1 without it")
    size: str | None = Field(None, description='the model\'s own as "WIDTHxHEIGHT", or "auto"')
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="b64_json without it; url for a link that holds for a limited time"
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="png without it")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="quality of jpeg and webp; 100 without it"
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="images are opaque")
    stream: bool | None = Field(None, description="whether to answer with server-sent events")
    partial_images: int | None = Field(
        None,
        ge=0,
        le=MAX_PREVIEWS,
        description="of the first image while it is drawn; 0 without it",
    )
    user: Ignored = Field(None, description="taken, without effect")
    safety_identifier: Ignored = Field(None, description="taken, without effect")
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = Field(
        None, description=f"{NO_EFFECT} quality"
    )
    # Ours.
    seed: int | None = Field(
        None, ge=-LARGEST - 1, le=LARGEST, description="of the random numbers; random without it"
    )
    candidates: int | None = Field(
        None, ge=1, le=LARGEST, description="drawn in all, of which the ranker keeps the best n"
    )
    temperature: float | None = Field(
        None, ge=0, le=100, description="0 takes the likeliest token; the model's own without it"
    )
    top_k: int | None = Field(None, ge=1, le=LARGEST, description="draw from the k likeliest only")
    top_p: float | None = Field(
        None, gt=0, le=1, description="draw from the likeliest of this mass only"
    )
    guidance: float | None = Field(
        None,
        ge=0,
        le=100,
        description="classifier-free guidance; 1 is none; the model's own without it",
    )


class GenerationBody(ImagesBody):
    """The body of /v1/images/generations, JSON."""

    style: Literal["vivid", "natural"] | None = Field(None, description=f"{NO_EFFECT} style")
    moderation: Literal["auto", "low"] | None = Field(
        None, description="taken, without effect: prompts are not judged"
    )


class EditBody(ImagesBody):
    """The body of /v1/images/edits, multipart, beside its image."""

    rows: int = Field(
        ge=1, le=LARGEST, description="token rows of the image that are kept; the others are drawn"
    )
    input_fidelity: Literal["high", "low"] | None = Field(
        None, description="taken, without effect: the rows are kept as tokens"
    )

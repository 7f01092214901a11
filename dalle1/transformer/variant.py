"""What published relatives of the paper's model do otherwise: ruDALL-E and minDALL-E.

They are the same decoder over text and then image tokens. They differ in what stands before the
first tokens, in paddings, norms, patterns and tables, and each difference is a setting here. The
defaults are the paper's. See `dalle1.published` for the settings of each model.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dalle1.transformer.sequence import Pattern, PatternRule


class Variant(BaseModel):
    """What published relatives of the paper's transformer do otherwise; the defaults are the
    paper's (docs/published.md)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patterns: PatternRule | tuple[Pattern, ...] = Field(
        "paper", description="rule of the layers' attention patterns, or the pattern of each layer"
    )
    start: Literal["vectors", "token", "none"] = Field(
        "vectors",
        description="what stands before the text and before the image: a learned vector each; a "
        "text token before the text, whose last token then stands before the image; or nothing, "
        "and the text's last position predicts the first image token",
    )
    start_token: int = Field(0, ge=0, description="the text token of start 'token'")
    padding_token: int | None = Field(
        None,
        ge=0,
        description="the text token that pads captions; null: text_vocab + p at position p",
    )
    position_paddings: bool = Field(
        True,
        description="whether each text position has a padding embedding of its own, which stands "
        "for padding_token too",
    )
    predicts_padding: bool = Field(
        False,
        description="whether paddings are targets of the text like its tokens; else an end of the "
        "caption is, in the place of the first padding",
    )
    end_of_caption: int = Field(0, ge=0, description="the text token that ends a caption")
    empty_caption: tuple[int, ...] = Field(
        (), description="text tokens of no caption, before its paddings"
    )
    text_position_rows: int | None = Field(
        None,
        ge=1,
        description="rows of the table of text positions; null: as many as are read",
    )
    image_positions: Literal["grid", "raster"] = Field(
        "grid", description="a row and a column table, added, or one table of all positions"
    )
    norms: Literal["pre", "sandwich"] = Field(
        "pre",
        description="sandwich has a norm behind each residual block too, before it is added, and "
        "a second one before the heads",
    )
    gelu: Literal["erf", "tanh"] = Field(
        "erf", description="GELU of the MLPs: exact, or its approximation by tanh"
    )
    head_bias: bool = Field(True, description="whether the two heads have a bias")
    embedding_gradient: float = Field(
        1.0, gt=0, le=1, description="share of their gradient that embeddings are trained with"
    )
    first_token_as_text: bool = Field(
        False,
        description="the loss reads the first image token as a text token and not as an image "
        "token, as in the published code of ruDALL-E v3; start 'none' alone",
    )

    @model_validator(mode="after")
    def _check(self) -> Variant:
        if self.padding_token is None and not self.position_paddings:
            raise ValueError("padding_token is needed where positions have no paddings")
        if self.first_token_as_text and self.start != "none":
            raise ValueError(
                f"first_token_as_text is for start 'none', where the text's last position predicts "
                f"the first image token; got start {self.start!r}"
            )
        return self

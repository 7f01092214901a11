"""Shape of the transformer, and how it is run in training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from dalle1.transformer.masks import CONV_KERNEL
from dalle1.transformer.sequence import Pattern, SequenceShape, layer_pattern
from dalle1.transformer.variant import Variant


class TransformerConfig(BaseModel):
    """Shape of the transformer; the defaults are the paper's 12 billion (section 2.2, B.1)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int = Field(3968, ge=1, description="model width, heads x head_size")
    layers: int = Field(64, ge=1, description="residual layers, of attention and MLP each")
    heads: int = Field(62, ge=1, description="attention heads of a layer")
    head_size: int = Field(64, ge=1, description="width of an attention head")
    text_vocab: int = Field(16384, ge=2, description="byte-pair tokens, end-of-caption included")
    text_length: int = Field(256, ge=2, description="text positions")
    image_vocab: int = Field(8192, ge=2, description="the dVAE's codebook size")
    grid: int = Field(32, ge=1, description="rows and columns of the image's token grid")
    conv_kernel: int = Field(
        CONV_KERNEL,
        ge=1,
        description="side of the last layer's convolutional pattern, in tokens; odd",
    )
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights")
    text_loss_weight: float = Field(
        1 / 8, ge=0, le=1, description="weight of the text's loss; the image's is 1 minus this"
    )
    variant: Variant = Field(
        Variant(), description="what published relatives do otherwise than the paper"
    )

    @model_validator(mode="after")
    def _check(self) -> TransformerConfig:
        if self.width != self.heads * self.head_size:
            raise ValueError(
                f"width must be heads x head_size = {self.heads} x {self.head_size} = "
                f"{self.heads * self.head_size}, got {self.width}"
            )
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel must be odd, got {self.conv_kernel}")
        self._check_variant()
        return self

    def _check_variant(self) -> None:
        v = self.variant
        if isinstance(v.patterns, tuple) and len(v.patterns) != self.layers:
            raise ValueError(
                f"variant.patterns: expected one for each of {self.layers} layers, got "
                f"{len(v.patterns)}"
            )
        ids = {"start_token": v.start_token, "end_of_caption": v.end_of_caption}
        ids |= {"padding_token": v.padding_token or 0}
        ids |= {f"empty_caption[{i}]": token for i, token in enumerate(v.empty_caption)}
        for name, token in ids.items():
            if not 0 <= token < self.text_vocab:
                raise ValueError(
                    f"variant.{name}: expected a text token, 0 to {self.text_vocab - 1}, got "
                    f"{token}"
                )
        if len(v.empty_caption) > self.text_length:
            raise ValueError(
                f"variant.empty_caption: expected at most {self.text_length} tokens, got "
                f"{len(v.empty_caption)}"
            )
        read = self.text_length + (v.start == "token")
        if v.text_position_rows is not None and v.text_position_rows < read:
            raise ValueError(
                f"variant.text_position_rows: expected at least the {read} that are read, got "
                f"{v.text_position_rows}"
            )
        if v.first_token_as_text and self.image_vocab > self.text_classes:
            raise ValueError(
                f"variant.first_token_as_text: expected as many text classes as image tokens, "
                f"{self.image_vocab}, got {self.text_classes}"
            )

    @model_serializer(mode="wrap")
    def _without_the_papers_variant(
        self, serialize: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        """The paper's model is written as before there were others, which older releases read."""
        content: dict[str, Any] = serialize(self)
        if self.variant == Variant():
            content.pop("variant", None)
        return content

    @property
    def sequence(self) -> SequenceShape:
        return SequenceShape(self.text_length, self.grid)

    @property
    def sequence_length(self) -> int:
        """Text and image positions together."""
        return self.sequence.length

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """Attention pattern of each layer, first to last."""
        return tuple(self.each_pattern())

    def each_pattern(self) -> Iterator[Pattern]:
        """The same one by one: a file may claim any number of layers."""
        rule = self.variant.patterns
        if isinstance(rule, tuple):
            yield from rule
        else:
            for layer in range(1, self.layers + 1):
                yield layer_pattern(layer, self.layers, rule)

    @property
    def text_ids(self) -> int:
        """Rows of the text's embedding: tokens and, where positions have them, paddings."""
        return self.text_vocab + (self.text_length if self.variant.position_paddings else 0)

    @property
    def text_classes(self) -> int:
        """Classes that the text's head tells apart."""
        return self.text_ids if self.variant.predicts_padding else self.text_vocab

    @property
    def text_positions(self) -> int:
        """Rows of the table of text positions."""
        v = self.variant
        return v.text_position_rows or self.text_length + (v.start == "token")

    @property
    def shift(self) -> int:
        """How far the position that predicts a token lies before the token's own: 1 where no start
        tokens stand before them, 0 where the start tokens have made room."""
        return 1 if self.variant.start == "none" else 0


class Execution(BaseModel):
    """How a transformer is run in training; the results are the same up to rounding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: Literal["auto", "dense", "sparse"] = Field(
        "auto",
        description="dense uses boolean masks, sparse computes the allowed blocks alone, auto "
        "takes the faster one",
    )
    checkpointing: bool = Field(
        False, description="keep each residual block's input alone; compute the rest twice"
    )
    compile: bool = Field(False, description="torch.compile of the residual blocks")

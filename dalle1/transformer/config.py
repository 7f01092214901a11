"""Shape of the transformer, and how it is run in training."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dalle1.transformer.masks import CONV_KERNEL
from dalle1.transformer.sequence import Pattern, SequenceShape, layer_pattern


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

    @model_validator(mode="after")
    def _check(self) -> TransformerConfig:
        if self.width != self.heads * self.head_size:
            raise ValueError(
                f"width must be heads x head_size = {self.heads} x {self.head_size} = "
                f"{self.heads * self.head_size}, got {self.width}"
            )
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel must be odd, got {self.conv_kernel}")
        return self

    @property
    def sequence(self) -> SequenceShape:
        return SequenceShape(self.text_length, self.grid)

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """Attention pattern of each layer, first to last."""
        return tuple(layer_pattern(i, self.layers) for i in range(1, self.layers + 1))


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

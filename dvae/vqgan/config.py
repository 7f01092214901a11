"""The shape of a VQGAN; every published one follows from one of these."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_LEVELS = 8  # of which each halves the side; the published have 3 to 5


class VQGANConfig(BaseModel):
    """Shape of a VQGAN; the defaults are those of taming-transformers' ImageNet f16 with 16,384
    codes, which DALL·E mini and minDALL-E use too.

    A level is a resolution. Level 0 has that of the image, and each further level half the side.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    channels: int = Field(3, ge=1, description="color channels of an image")
    width: int = Field(128, ge=1, description="channels of the maps that the multipliers are of")
    multipliers: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 1, 2, 2, 4),
        min_length=1,
        max_length=MAX_LEVELS,
        description="channels of each level, in widths",
    )
    blocks_per_level: int = Field(
        2, ge=1, description="residual blocks of a level of the encoder; the decoder has one more"
    )
    attention_levels: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (4,),
        description="levels with attention after each block; the middle always has one. taming's "
        "attn_resolutions [16] of a resolution of 256 is level 4",
    )
    latent_channels: int = Field(
        256, ge=1, description="z_channels: between the coder's maps and the codes' vectors"
    )
    embedding_dim: int = Field(256, ge=1, description="numbers of a code's vector")
    codebook_size: int = Field(16384, ge=2, description="number of image tokens")
    quantizer: Literal["nearest", "gumbel"] = Field(
        "nearest",
        description="a token is the nearest code, or the largest logit of a 1x1 convolution",
    )
    normalized_codes: bool = Field(
        False, description="codes and what is compared with them have length 1 (LlamaGen)"
    )
    output: Literal["pixels", "haar"] = Field(
        "pixels",
        description="what the decoder writes: pixels, or the four Haar bands of an image of twice "
        "the side (Sber)",
    )
    signed_pixels: bool = Field(
        True, description="the nets see pixels in [-1, 1]; false: in [0, 1] (DALL·E mini)"
    )
    encoder: bool = Field(
        True, description="whether images can be encoded; min-dalle publishes a decoder alone"
    )
    norm_groups: int = Field(32, ge=1, description="groups of each group norm")
    norm_eps: float = Field(1e-6, gt=0, description="added to a group norm's variance")

    @property
    def stride(self) -> int:
        """Pixels of a token's side in the images that are read."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def out_stride(self) -> int:
        """Pixels of a token's side in the images that are written."""
        return 2 * self.stride if self.output == "haar" else self.stride

    @property
    def out_channels(self) -> int:
        """Channels of the maps that the decoder writes."""
        return 4 * self.channels if self.output == "haar" else self.channels

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @model_validator(mode="after")
    def _fits(self) -> VQGANConfig:
        levels = len(self.multipliers)
        if any(level >= levels for level in self.attention_levels):
            raise ValueError(
                f"attention_levels: expected levels in [0, {levels - 1}], got "
                f"{list(self.attention_levels)}"
            )
        for width in (self.width, *self.widths):
            if width % self.norm_groups:
                raise ValueError(
                    f"norm_groups: expected a divisor of each level's channels, "
                    f"{list(self.widths)}, got {self.norm_groups}"
                )
        if self.normalized_codes and self.quantizer != "nearest":
            raise ValueError(
                "normalized_codes: expected false for a gumbel quantizer, which compares no codes"
            )
        return self

"""The shape of a CLIP: a text transformer, and a ViT or a ResNet for the images; and what the
configs of all dual encoders have in common."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

RESNET_STRIDE = 32  # pixels of the side of what a ResNet's last map has one position for
BLOCK_EXPANSION = 32  # a ResNet's last map has so many channels for each of vision_width


class RankerConfig(BaseModel):
    """How a ranker's scores are used; the configs of dual encoders add to it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    likelihood_weight: float = Field(
        0.0,
        ge=0,
        description="what a model draws is ranked by the score plus so many times ln p(image "
        "tokens | caption) of the model, in nats; 0: by the score alone",
    )

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out a weight of 0: a ranker's file and fingerprint are then what they were before
        rankers had one."""
        described: dict[str, Any] = handler(self)
        if not self.likelihood_weight:
            described.pop("likelihood_weight", None)
        return described


class CLIPConfig(RankerConfig):
    """Shape of a CLIP; the defaults are ViT-B/32."""

    embedding: int = Field(512, ge=1, description="width of the shared embedding")
    image_size: int = Field(224, ge=1, description="side of the images, in pixels")
    patch_size: int = Field(
        32, ge=1, description="side of a patch, in pixels; it divides image_size; 32 of a ResNet"
    )
    vision_width: int = Field(
        768, ge=1, description="width of the image's transformer, or of a ResNet's first stage"
    )
    vision_layers: int | tuple[int, int, int, int] = Field(
        12, description="layers of the image's transformer; four numbers: blocks of a ResNet"
    )
    vision_heads: int = Field(
        12,
        ge=1,
        description="attention heads of a layer; they divide vision_width, or 32 vision_width of a "
        "ResNet, which ends in attention",
    )
    text_vocab: int = Field(
        49408, ge=3, description="text tokens; start and end of text are the last two"
    )
    text_length: int = Field(77, ge=3, description="text positions, start and end of text included")
    text_width: int = Field(512, ge=1, description="width of the text's transformer")
    text_layers: int = Field(12, ge=1, description="layers of the text's transformer")
    text_heads: int = Field(
        8, ge=1, description="attention heads of a layer; they divide text_width"
    )
    activation: Literal["quick_gelu", "gelu"] = Field(
        "quick_gelu", description="OpenAI's is quick_gelu; most models trained since have gelu"
    )
    mean: tuple[float, float, float] = Field(
        (0.48145466, 0.4578275, 0.40821073),
        description="subtracted from red, green and blue in [0, 1]",
    )
    std: tuple[float, float, float] = Field(
        (0.26862954, 0.26130258, 0.27577711),
        description="divides red, green and blue after that",
    )

    @model_validator(mode="after")
    def _check(self) -> CLIPConfig:
        if min(self.std) <= 0:
            raise ValueError(f"std: expected more than 0 for each color, got {self.std}")
        layers = self.vision_layers
        if min(layers if isinstance(layers, tuple) else (layers,)) < 1:
            raise ValueError(f"vision_layers: expected at least 1, got {layers}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}"
            )
        if self.is_resnet and self.patch_size != RESNET_STRIDE:
            raise ValueError(f"patch_size: expected 32 of a ResNet, got {self.patch_size}")
        if self.is_resnet and self.vision_width % 2:
            raise ValueError(
                f"vision_width: expected an even number of a ResNet, got {self.vision_width}"
            )
        widths = {"vision": self.vision_width, "text": self.text_width}
        for name, width in widths.items():
            heads = getattr(self, f"{name}_heads")
            factor = BLOCK_EXPANSION if self.is_resnet and name == "vision" else 1
            if factor * width % heads:
                times = f"{factor} times " if factor > 1 else ""
                raise ValueError(
                    f"{times}{name}_width {width} must be a multiple of {name}_heads {heads}"
                )
        return self

    @property
    def is_resnet(self) -> bool:
        """Whether images are read by a ResNet."""
        return isinstance(self.vision_layers, tuple)

"""The settings of CLIP's training beside its shape."""

from __future__ import annotations

from pydantic import Field

from dalle1.common.config import Location, Section


class DrawingsSettings(Section):
    """Images that a model draws, as wrong examples for the CLIP that is to rank them."""

    model: Location = Field(
        description="folder of the model that draws, or the name of one that comes with the "
        "library; CLIP sees the training images as its codec copies them"
    )
    candidates: int = Field(2, ge=1, description="drawings of each caption of a batch")
    temperature: float = Field(1.0, gt=0, description="divides the logits of the drawings' tokens")

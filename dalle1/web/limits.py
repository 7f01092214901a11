"""What a visitor of the page may ask for at most, beside the worker's limits."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class PageLimits(BaseModel):
    """What one visitor may send and see; `dalle1.serving.requests.Limits` are those of drawings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep: int = Field(32, ge=1, description="images of a caption that are shown")
    upload_bytes: int = Field(8 * 2**20, ge=1, description="of an uploaded file")
    upload_pixels: int = Field(
        2**25, ge=1, description="of an uploaded image, before it is cut to the model's size"
    )
    body_seconds: float = Field(60, gt=0, description="for which a browser may send a message")
    visitors: int = Field(64, ge=1, description="drawings of the page that run or wait at once")

    def body_bytes(self, letters: int) -> int:
        """Of a message to the page: an upload in base 64 and a form with so many letters."""
        return self.upload_bytes * 4 // 3 + 8 * letters + 2**16

"""What the server allows a client, beside the limits of the queue."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ServerSettings(BaseModel):
    """Settings of the HTTP server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidates: int = Field(
        1,
        ge=1,
        description="drawn for each image of a request that does not say, by models with a ranker",
    )
    images: int = Field(10, ge=1, description="n of a request at most")
    body_bytes: int = Field(20_000_000, ge=1000, description="of a request's body at most")
    image_pixels: int = Field(16_000_000, ge=1, description="of a picture that is sent at most")
    head_seconds: float = Field(20, gt=0, description="for which a client may send a head")
    body_seconds: float = Field(60, gt=0, description="for which a client may send a body")
    send_seconds: float = Field(60, gt=0, description="for which a client may not read at all")
    url_seconds: float = Field(3600, gt=0, description="for which images of urls are kept")
    url_bytes: int = Field(
        1_000_000_000, ge=0, description="of images of urls together; of more, the oldest go"
    )
    public_url: str | None = Field(
        None, description="what the urls of images begin with; None: as the client calls the server"
    )
    keys: tuple[str, ...] = Field((), repr=False, description="one of which a client must show")

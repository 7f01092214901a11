"""Pictures as the browser sends and gets them: data URLs, opened with limits.

Nothing is taken but bytes in base 64 that are an image of a few known formats. A path, an address
or a text in their place is refused, and no picture becomes a file.
"""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

from PIL import Image, ImageOps

from dalle1.common.image_files import TooManyPixels, UnreadableImage, read_encoded
from dalle1.web.limits import PageLimits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
JPEG_WIDTH = 128  # previews of wider images are JPEG, which takes a tenth of the bytes


def read_data_url(url: Any, page: PageLimits, name: str = "picture") -> bytes:
    """The bytes of a data URL: `data:image/png;base64,...`.

    Raises ValueError where it is none, or larger than the limit.
    """
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ValueError(f"{name}: expected an uploaded image, got something else")
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(f"{name}: expected an image in base 64, got {head[:60]!r}")
    if len(body) * 3 // 4 > page.upload_bytes + 2:
        raise ValueError(
            f"{name}: expected at most {_megabytes(page.upload_bytes)}, got "
            f"{_megabytes(len(body) * 3 // 4)}; make it smaller"
        )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name}: expected an image in base 64, got a damaged one") from error


def open_picture(
    url: Any, size: tuple[int, int], page: PageLimits, name: str = "picture"
) -> Image.Image:
    """The picture of a data URL as RGB, cut to the middle and scaled where its size is another.

    Args:
        size: width and height in pixels.

    Raises:
        ValueError: it is no image, is damaged or too large.
    """
    data = read_data_url(url, page, name)
    try:
        image = read_encoded(data, page.upload_pixels, FORMATS)
    except TooManyPixels as error:
        raise ValueError(f"{name}: {error}; make it smaller") from error
    except UnreadableImage as error:
        raise ValueError(
            f"{name}: expected an image ({', '.join(FORMATS)}), got a file that cannot be read"
        ) from error
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def data_url(data: bytes, kind: str = "png") -> str:
    """An encoded image as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def lossless_url(image: Image.Image) -> str:
    """An image as the data URL of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return data_url(buffer.getvalue())


def preview_url(image: Image.Image) -> str:
    """An image that is looked at and not kept, in few bytes."""
    kind = "jpeg" if image.width > JPEG_WIDTH else "png"
    buffer = io.BytesIO()
    image.save(buffer, format=kind.upper(), **({"quality": 85} if kind == "jpeg" else {}))
    return data_url(buffer.getvalue(), kind)


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.1f} MB"

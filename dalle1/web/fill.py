"""What fills the form beside typing: an uploaded picture, the settings in a PNG, an image drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dalle1.common.png_settings import SIGNATURE, read_png_settings
from dalle1.web.limits import PageLimits
from dalle1.web.shapes import ModelShape
from dalle1.web.uploads import lossless_url, open_picture, read_data_url

DRAWN_BY_ANOTHER = "; another model has drawn it, so this one draws other pictures from them"
WHOLE = 1.0  # of a field of top_p that is not used


@dataclass(frozen=True)
class Filling:
    """New values of the form.

    Attributes:
        picture: to complete, a data URL of the model's size; empty: none.
        values: of other fields, by their names in `Form`.
        told: a line for the visitor.
    """

    picture: str
    values: Mapping[str, Any] = field(default_factory=dict)
    told: str = ""


def fill_from_upload(url: Any, shape: ModelShape, page: PageLimits) -> Filling:
    """A file that a visitor has uploaded: the picture to complete, and the settings in it.

    A PNG without settings, or an image of another kind, changes nothing but the picture.

    Raises:
        ValueError: it is no image, is too large, or its settings are damaged.
    """
    data = read_data_url(url, page)
    picture = lossless_url(open_picture(url, shape.read_size, page))
    if not data.startswith(SIGNATURE):
        return Filling(picture)
    settings = read_png_settings(io.BytesIO(data))
    if settings is None:
        return Filling(picture)
    other = settings["model"] is not None and settings["model"] != shape.fingerprint
    told = "the settings of this picture are filled in"
    if other:
        told += DRAWN_BY_ANOTHER
    if settings["first_candidate"]:
        told += f"; its candidates began with number {settings['first_candidate']}, and here with 0"
    return Filling(picture, _values(settings, shape, page), told)


def continue_from(url: Any, shape: ModelShape, page: PageLimits) -> Filling:
    """An image of the page's own as the picture to complete, of which the upper half is kept.

    Raises ValueError where it is none.
    """
    picture = lossless_url(open_picture(url, shape.read_size, page))
    return Filling(picture, {"rows": shape.grid[0] // 2}, "the next drawing keeps its upper half")


def _values(settings: Mapping[str, Any], shape: ModelShape, page: PageLimits) -> dict[str, Any]:
    """The form's values for settings of `read_png_settings`."""
    names = ("candidates", "temperature", "guidance", "seed")
    values = {name: settings[name] for name in names}
    return {
        **values,
        "captions": settings["caption"],
        "keep": min(settings["keep"], page.keep),
        "top_k": settings["top_k"],
        "top_p": WHOLE if settings["top_p"] is None else settings["top_p"],
        "rows": settings["rows"] if settings["rows"] < shape.grid[0] else 0,
        "new_seed": False,
    }

"""The metadata in front of a model card, by which the Hub finds and shows a model; its pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from dalle1.common.files import make_folder
from dalle1.common.image_inputs import ImageLike, read_images
from dalle1.common.images import to_pil
from dalle1.hub.access import LIBRARY

# The Hub's words: what a model does, and by which it is found.
TASK = "text-to-image"
TAGS = ("dall-e", "text-to-image")
IMAGES = "images"  # folder of the pictures
MAX_WIDGETS, MAX_SIDE = 8, 512  # pictures, pixels of a side
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_FRONT = re.compile(r"\A---\n(.*?)\n---\n+", re.DOTALL)


@dataclass(frozen=True)
class Widget:
    """A picture with its caption, as the Hub shows it beside a card."""

    caption: str
    image: Image.Image


def read_widgets(images: Mapping[str, ImageLike] | None) -> list[Widget]:
    """Pictures by their captions, made small; ValueError for too many, or for what is no image."""
    given = images or {}
    if not isinstance(given, Mapping) or not all(isinstance(caption, str) for caption in given):
        raise ValueError("widget: expected images by their captions, as {'a red circle': image}")
    if len(given) > MAX_WIDGETS:
        raise ValueError(f"widget: expected at most {MAX_WIDGETS} images, got {len(given)}")
    widgets: list[Widget] = []
    for caption, image in given.items():
        found = read_images(image, "widget")
        if len(found) != 1:
            raise ValueError(f"widget: expected one image for {caption!r}, got {len(found)}")
        small = found[0] if isinstance(found[0], Image.Image) else to_pil(found[0])
        small = small.copy()
        small.thumbnail((MAX_SIDE, MAX_SIDE))
        widgets.append(Widget(caption, small))
    return widgets


def check_license(license: str | None) -> None:
    """Raises ValueError for what cannot be one of the Hub's names of licenses."""
    if license is not None and not (isinstance(license, str) and _LICENSE.fullmatch(license)):
        raise ValueError(
            f"license: expected one of the Hub's names, such as mit, apache-2.0, cc-by-4.0 or "
            f"other, got {license!r}"
        )


def save_widgets(folder: Path, widgets: list[Widget]) -> list[str]:
    """Writes the pictures into a model folder; their names in it."""
    names = [f"{IMAGES}/widget-{i}.png" for i in range(len(widgets))]
    if widgets:
        make_folder(folder / IMAGES)
    for name, widget in zip(names, widgets, strict=True):
        widget.image.save(folder / name, optimize=True)
    return names


def card_for_hub(text: str, license: str | None, widgets: list[Widget], names: list[str]) -> str:
    """A model card with the Hub's metadata in front and its pictures behind the first paragraphs.

    What the card's own metadata says stays, but for a license or pictures that are given.

    Args:
        text: of the card, with or without metadata.
        license: by the Hub's name of it; None: as the card says, or not stated.
        widgets, names: the pictures, and their files in the folder.

    Raises:
        ValueError: the card's metadata cannot be read.
    """
    held, body = split_card(text)
    tags = held.get("tags") or []
    given = [tags] if isinstance(tags, str) else list(tags)
    metadata: dict[str, Any] = {"license": license} if license is not None else {}
    metadata |= {name: value for name, value in held.items() if name not in metadata}
    metadata |= {
        "library_name": LIBRARY,
        "pipeline_tag": held.get("pipeline_tag", TASK),
        "tags": given + [tag for tag in TAGS if tag not in given],
    }
    if widgets:
        metadata["widget"] = [
            {"text": widget.caption, "output": {"url": name}}
            for widget, name in zip(widgets, names, strict=True)
        ]
        body = _with_pictures(body, widgets, names)
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{body}"


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """The metadata in front of a card, {} where there is none, and the rest."""
    match = _FRONT.match(text)
    if match is None:
        return {}, text
    try:
        held = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ValueError(f"README.md: expected YAML between the lines ---, got {line}") from error
    if not isinstance(held, dict):
        raise ValueError("README.md: expected names and values between the lines ---")
    return held, text[match.end() :]


def _with_pictures(body: str, widgets: list[Widget], names: list[str]) -> str:
    """A card's text with pictures below its title."""
    title, line, rest = body.partition("\n") if body.startswith("#") else ("", "", body)
    pictures = " ".join(
        f"![{_alternative(widget.caption)}]({name})"
        for widget, name in zip(widgets, names, strict=True)
    )
    return f"{title}{line}{line}{pictures}\n{'' if rest.startswith(chr(10)) else chr(10)}{rest}"


def _alternative(caption: str) -> str:
    """A caption as Markdown's words for those who do not see a picture."""
    return re.sub(r"[\[\]\\`<>\n]", " ", caption)

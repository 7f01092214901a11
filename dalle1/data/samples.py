"""A raw sample: its image, its captions, and the reasons why it cannot be trained on.

A bad sample raises `BadSample` with one of `CAUSES`. Converted rather than dropped
(`common.images.to_rgb`): gray, palette, 16-bit, CMYK and transparent images, animations (their
first frame), images that their EXIF turns, and those whose file ending is another format's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

RawSample = dict[str, Any]  # its name as __key__, bytes by extension (png, txt, json ...)

IMAGE_KEYS = ("png", "jpg", "jpeg", "webp")

# Limits of what is trained on, unless the settings say otherwise.
MAX_PIXELS = 50_000_000  # of an image; more is a decompression bomb, or a map
MAX_ASPECT = 20.0  # longer side / shorter side of an image
MAX_TEXT = 2**20  # bytes of a txt or json; more would stop the tokenizer for seconds

NO_IMAGE, UNREADABLE = "no image", "unreadable image"
IMAGE_TOO_LARGE, EXTREME_ASPECT = "image too large", "extreme aspect ratio"
NO_CAPTION, EMPTY_CAPTION = "no caption", "empty caption"
NOT_UTF8, INVALID_JSON = "caption is not UTF-8", "invalid json"
CAPTION_TOO_LARGE = "caption too large"
DUPLICATE_KEY = "duplicate key"
DAMAGED, MISSING = "cut off by a damaged shard", "missing from its shard"
OF_IMAGES = (NO_IMAGE, UNREADABLE, IMAGE_TOO_LARGE, EXTREME_ASPECT)
OF_CAPTIONS = (NO_CAPTION, EMPTY_CAPTION, NOT_UTF8, INVALID_JSON, CAPTION_TOO_LARGE)
CAUSES = (*OF_IMAGES, *OF_CAPTIONS, DUPLICATE_KEY, DAMAGED, MISSING)
# Former wordings: token shards, records of filtered shards and checkpoints keep counts by cause.
FORMER_CAUSES = {
    "no picture": NO_IMAGE,
    "unreadable picture": UNREADABLE,
    "no readable picture": UNREADABLE,
    "picture too large": IMAGE_TOO_LARGE,
    "file too large": IMAGE_TOO_LARGE,
    "absurd aspect ratio": EXTREME_ASPECT,
    "aspect ratio": EXTREME_ASPECT,
    "json cannot be read": INVALID_JSON,
    "cut off by damage": DAMAGED,
    "picture too small": "image too small",
}


class BadSample(ValueError):
    """A sample that cannot be trained on; `cause` is one of CAUSES."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def current_causes(counts: Mapping[str, int]) -> Counter[str]:
    """Counts by cause of a file of any release, under the causes of this one."""
    current: Counter[str] = Counter()
    for cause, count in counts.items():
        current[FORMER_CAUSES.get(cause, cause)] += count
    return current


def image_of(sample: RawSample) -> bytes:
    """The encoded image of a sample.

    Raises:
        BadSample: it has none.
    """
    for key in IMAGE_KEYS:
        if key in sample:
            data: bytes = sample[key]
            return data
    raise BadSample(NO_IMAGE)


def captions_of(sample: RawSample, caption_key: str, lines: bool = False) -> list[str]:
    """A sample's captions without space or zeros around them.

    Args:
        sample: files by extension.
        caption_key: txt, or the name of a key of the json that holds a text or a list of texts.
        lines: each line of the txt is a caption of its own.

    Raises:
        BadSample: it has no caption.
    """
    source: bytes | None = sample.get("txt" if caption_key == "txt" else "json")
    if source is None:
        raise BadSample(NO_CAPTION)
    if len(source) > MAX_TEXT:
        raise BadSample(CAPTION_TOO_LARGE)
    found: Any
    try:
        if caption_key == "txt":
            text = source.decode("utf-8-sig")  # without the mark that some editors put in front
            found = split_lines(text) if lines else [text]
        else:
            found = json.loads(source)[caption_key]
            found = found if isinstance(found, list) else [found]
    except UnicodeDecodeError as error:
        raise BadSample(NOT_UTF8) from error
    except (KeyError, TypeError) as error:  # TypeError: a json that holds no keys
        raise BadSample(NO_CAPTION) from error
    except (ValueError, RecursionError) as error:
        raise BadSample(INVALID_JSON) from error
    captions = [caption for text in found if isinstance(text, str) and (caption := cleaned(text))]
    if not captions:
        raise BadSample(EMPTY_CAPTION)
    return captions


def split_lines(text: str) -> list[str]:
    """The lines of a text, as editors show them.

    `str.splitlines` also splits at U+2028, U+0085 and form feeds, which captions from web pages
    hold.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def cleaned(caption: str) -> str:
    """A caption without what is none of its letters, in front of it and behind it."""
    # Marks are also in front of a line where files were joined, and in values of tables and JSON.
    # Of a file that a crash left behind, only zeros may be there. And JSON's escapes can spell half
    # a surrogate pair, which no encoder takes.
    kept = caption.strip().lstrip("\ufeff").strip().strip("\0").strip()
    return kept.encode(errors="replace").decode()


def caption_of(sample: RawSample, caption_key: str) -> str:
    """The first of a sample's captions, see `captions_of`."""
    return captions_of(sample, caption_key)[0]


def caption_keys(sample: RawSample) -> list[str]:
    """What `caption_key` may be for this sample: txt, and keys of the json that hold text."""
    keys = ["txt"] if "txt" in sample else []
    try:
        content = json.loads(sample["json"])
        held = {k: v if isinstance(v, list) else [v] for k, v in content.items()}
        keys += [k for k, values in held.items() if values and isinstance(values[0], str)]
    except (KeyError, ValueError, AttributeError, RecursionError):
        pass
    return keys

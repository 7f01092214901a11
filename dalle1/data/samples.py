"""What is wrong with samples of the web, by cause; what is in those that are good.

A sample that cannot be trained on raises `Bad` with one of `CAUSES`. Converted rather than dropped
(`pictures.to_rgb`): grey, palette, 16-bit, CMYK and transparent pictures, animations (their first
frame), pictures that their EXIF turns, and those whose file ending is another format's.
"""

from __future__ import annotations

import json
from typing import Any

from dalle1.data.shards.tar import Raw

IMAGE_KEYS = ("png", "jpg", "jpeg", "webp")
MAX_PIXELS = 50_000_000  # a decompression bomb, or a map
MAX_TEXT = 2**20  # bytes of a txt or json; more would stop the tokenizer for seconds

NO_PICTURE, UNREADABLE = "no picture", "unreadable picture"
TOO_LARGE, ASPECT = "picture too large", "absurd aspect ratio"
NO_CAPTION, EMPTY = "no caption", "empty caption"
NOT_UTF8, NOT_JSON = "caption is not UTF-8", "json cannot be read"
TOO_LONG = "caption too large"
DUPLICATE = "duplicate key"
DAMAGED, MISSING = "cut off by a damaged shard", "missing from its shard"
CAUSES = (
    *(NO_PICTURE, UNREADABLE, TOO_LARGE, ASPECT, NO_CAPTION, EMPTY, NOT_UTF8, NOT_JSON),
    *(TOO_LONG, DUPLICATE, DAMAGED, MISSING),
)


class Bad(ValueError):
    """A sample that cannot be trained on; `cause` is one of CAUSES."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def image_of(sample: Raw) -> bytes:
    """The encoded picture of a sample; Bad where it has none."""
    for key in IMAGE_KEYS:
        if key in sample:
            data: bytes = sample[key]
            return data
    raise Bad(NO_PICTURE)


def captions_of(sample: Raw, caption_key: str, lines: bool = False) -> list[str]:
    """A sample's captions without space or zeros around them: its txt, or a text or list of texts
    in its json. Bad where it has none.

    lines: each line of the txt is a caption of its own.
    """
    source: bytes | None = sample.get("txt" if caption_key == "txt" else "json")
    if source is None:
        raise Bad(NO_CAPTION)
    if len(source) > MAX_TEXT:
        raise Bad(TOO_LONG)
    found: Any
    try:
        if caption_key == "txt":
            text = source.decode("utf-8-sig")  # without the mark that some editors put in front
            found = text.splitlines() if lines else [text]
        else:
            found = json.loads(source)[caption_key]
            found = found if isinstance(found, list) else [found]
    except UnicodeDecodeError as error:
        raise Bad(NOT_UTF8) from error
    except (KeyError, TypeError) as error:  # TypeError: a json that holds no keys
        raise Bad(NO_CAPTION) from error
    except (ValueError, RecursionError) as error:
        raise Bad(NOT_JSON) from error
    captions = [cleaned for text in found if isinstance(text, str) and (cleaned := _cleaned(text))]
    if not captions:
        raise Bad(EMPTY)
    return captions


def _cleaned(text: str) -> str:
    # Of a file that a crash left behind, only zeros may be there. And JSON's escapes can spell half
    # a surrogate pair, which no encoder takes.
    return text.strip().strip("\0").strip().encode(errors="replace").decode()


def caption_of(sample: Raw, caption_key: str) -> str:
    """The first of a sample's captions; Bad where it has none."""
    return captions_of(sample, caption_key)[0]


def caption_keys(sample: Raw) -> list[str]:
    """What `caption_key` may be for this sample: txt, and keys of the json that hold text."""
    keys = ["txt"] if "txt" in sample else []
    try:
        content = json.loads(sample["json"])
        held = {k: v if isinstance(v, list) else [v] for k, v in content.items()}
        keys += [k for k, values in held.items() if values and isinstance(values[0], str)]
    except (KeyError, ValueError, AttributeError, RecursionError):
        pass
    return keys

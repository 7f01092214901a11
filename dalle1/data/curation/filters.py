"""Which samples are worth training on, each by itself (appendix C)."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np
from PIL import Image

from dalle1.common.images import to_rgb
from dalle1.data.curation import caption_filters as captions
from dalle1.data.curation.dedup import DIGEST, DUPLICATE, MAX_DISTANCE, NEAR_DUPLICATE
from dalle1.data.samples import Bad, caption_of, image_of
from dalle1.data.shards.tar import Raw
from dalle1.data.transforms import FORMATS

NO_CAPTION, NO_PICTURE = "no caption", "no readable picture"
BOILERPLATE, TOO_SHORT, NOT_ENGLISH = "mostly boilerplate", "caption too short", "not English"
TOO_SMALL, ASPECT = "picture too small", "aspect ratio"
CUT, OVERSIZED = "cut off by damage", "file too large"
# In the order of the checks: a sample is dropped for the first that it fails.
CAUSES = (
    *(NO_CAPTION, NO_PICTURE, BOILERPLATE, TOO_SHORT, NOT_ENGLISH, ASPECT, TOO_SMALL),
    *(DUPLICATE, NEAR_DUPLICATE, CUT, OVERSIZED),
)
ENGLISH = ("off", "script", "language")
DUPLICATES = ("off", "pair", "picture")


@dataclass(frozen=True)
class FilterSettings:
    """What a sample must be; the paper gives the ratio alone, other numbers are ours."""

    caption_key: str = "txt"
    min_words: int = 3  # 0: any
    boilerplate_words: int = 2  # with fewer that tell something it is mostly boilerplate; 0: off
    english: str = "script"  # off | script: no other letters than Latin ones | language: py3langid
    min_english: float = 0.02  # probability, of 'language'
    max_aspect: float = 2.0  # longer side / shorter side; 0: any
    min_side: int = 0  # pixels of the shorter side
    duplicates: str = "pair"  # off | pair: picture and caption | picture: whatever the caption
    near_duplicates: int | None = None  # bits by which hashes of pictures differ at most; None: off

    def __post_init__(self) -> None:
        for name, choices in (("english", ENGLISH), ("duplicates", DUPLICATES)):
            if getattr(self, name) not in choices:
                expected = ", ".join(choices)
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        for name in ("min_words", "boilerplate_words", "min_side"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 (off) or more, got {getattr(self, name)}")
        if not 0 <= self.min_english <= 1:
            raise ValueError(f"min_english: expected a probability, got {self.min_english}")
        if self.max_aspect != 0 and not self.max_aspect >= 1:
            raise ValueError(f"max_aspect: expected 0 (off) or 1 or more, got {self.max_aspect}")
        if self.near_duplicates is not None and not 0 <= self.near_duplicates <= MAX_DISTANCE:
            raise ValueError(
                f"near_duplicates: expected 0 to {MAX_DISTANCE} of 64 bits, "
                f"got {self.near_duplicates}"
            )


@dataclass(frozen=True)
class Verdict:
    """What a sample shows by itself."""

    key: str
    caption: str = ""
    cause: str | None = None  # why it is dropped
    digest: bytes = b""  # of what makes it the same as another
    look: int = 0  # 64 bits, few of which differ between pictures that look alike


def caption_cause(caption: str, settings: FilterSettings) -> str | None:
    """Why a caption is not trained on; None: it may stay."""
    if settings.boilerplate_words and captions.boilerplate(caption, settings.boilerplate_words):
        return BOILERPLATE
    if captions.too_short(caption, settings.min_words):
        return TOO_SHORT
    if settings.english != "off" and captions.other_script(caption):
        return NOT_ENGLISH
    if settings.english == "language" and captions.english(caption) < settings.min_english:
        return NOT_ENGLISH
    return None


def size_cause(width: int, height: int, settings: FilterSettings) -> str | None:
    """Why a picture of that size is not trained on; None: it may stay."""
    # Of a longer picture the square crops would often miss what the caption tells of.
    if settings.max_aspect and max(width, height) > settings.max_aspect * min(width, height):
        return ASPECT
    return TOO_SMALL if min(width, height) < settings.min_side else None


def judge(sample: Raw, settings: FilterSettings) -> Verdict:
    """Looks at one sample; dirt of any kind is a cause, never an error."""
    key: str = sample["__key__"]
    try:
        caption = caption_of(sample, settings.caption_key)
    except Bad:
        return Verdict(key, cause=NO_CAPTION)
    try:
        data = image_of(sample)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Exception:  # whatever a decoder raises on dirt
        return Verdict(key, caption, NO_PICTURE)
    cause = caption_cause(caption, settings) or size_cause(width, height, settings)
    if cause:
        return Verdict(key, caption, cause)
    look = 0
    if settings.near_duplicates is not None:
        imagehash = _imagehash()
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                bits = imagehash.phash(to_rgb(image)).hash
        except Exception:  # its header was whole, its pixels are not
            return Verdict(key, caption, NO_PICTURE)
        look = int.from_bytes(np.packbits(bits).tobytes(), "big")
    digest = b""
    if settings.duplicates != "off":
        made = hashlib.blake2b(data, digest_size=DIGEST)
        if settings.duplicates == "pair":
            # The length sets the caption apart from the picture's last bytes.
            text = caption.encode(errors="surrogatepass")
            made.update(text + len(text).to_bytes(8, "big"))
        digest = made.digest()
    return Verdict(key, caption, None, digest, look)


@lru_cache(maxsize=1)
def _imagehash() -> Any:
    try:
        return import_module("imagehash")
    except ImportError as error:
        raise ValueError("near_duplicates needs imagehash: pip install 'dalle1[filter]'") from error


def packages(settings: FilterSettings) -> dict[str, str]:
    """The versions of the packages that decide; ValueError for one that is not there."""
    versions = {}
    if settings.english == "language":
        captions.identifier()
        versions["py3langid"] = version("py3langid")
    if settings.near_duplicates is not None:
        _imagehash()
        versions["imagehash"] = version("imagehash")
    return versions

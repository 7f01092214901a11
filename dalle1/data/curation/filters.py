"""Which samples are worth training on, each by itself (appendix C)."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np

from dalle1.common.images import to_rgb
from dalle1.data.curation import caption_filters as captions
from dalle1.data.curation.dedup import DIGEST, DUPLICATE, MAX_DISTANCE, NEAR_DUPLICATE
from dalle1.data.samples import (
    DAMAGED,
    EXTREME_ASPECT,
    IMAGE_TOO_LARGE,
    MAX_PIXELS,
    NO_IMAGE,
    OF_CAPTIONS,
    UNREADABLE,
    BadSample,
    RawSample,
    caption_of,
    image_of,
)
from dalle1.data.transforms import opened_image

BOILERPLATE, TOO_SHORT, NOT_ENGLISH = "mostly boilerplate", "caption too short", "not English"
IMAGE_TOO_SMALL = "image too small"
# Samples that are no pairs at all, by the causes of `data.samples`.
UNUSABLE = (*OF_CAPTIONS, NO_IMAGE, UNREADABLE, IMAGE_TOO_LARGE)
# In the order of the checks: a sample is dropped for the first that it fails.
CAUSES = (
    *(*UNUSABLE, BOILERPLATE, TOO_SHORT, NOT_ENGLISH, EXTREME_ASPECT, IMAGE_TOO_SMALL),
    *(DUPLICATE, NEAR_DUPLICATE, DAMAGED),
)
ENGLISH = ("off", "script", "language")
DUPLICATES = ("off", "pair", "image")
FORMER_DUPLICATES = {"picture": "image"}


def current_duplicates(value: str) -> str:
    """A value of `duplicates` under its name of today; warns of a former one."""
    current = FORMER_DUPLICATES.get(value, value)
    if current != value:
        warnings.warn(
            f"duplicates: {value!r} is called {current!r} now; the former name works for one more "
            "release",
            FutureWarning,
            stacklevel=2,
        )
    return current


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
    max_pixels: int = MAX_PIXELS  # of an image, as the reader's; 0: any
    duplicates: str = "pair"  # off | pair: image and caption | image: whatever the caption
    near_duplicates: int | None = None  # bits by which hashes of images differ at most; None: off

    def __post_init__(self) -> None:
        object.__setattr__(self, "duplicates", current_duplicates(self.duplicates))
        for name, choices in (("english", ENGLISH), ("duplicates", DUPLICATES)):
            if getattr(self, name) not in choices:
                expected = ", ".join(choices)
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        for name in ("min_words", "boilerplate_words", "min_side", "max_pixels"):
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
class FilterResult:
    """What the filters find of a sample by itself."""

    key: str
    caption: str = ""
    cause: str | None = None  # why it is dropped
    digest: bytes = b""  # of what makes it the same as another
    look: int = 0  # 64 bits, few of which differ between images that look alike


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
    """Why an image of that size is not trained on; None: it may stay."""
    # Of a longer image the square crops would often miss what the caption tells of.
    if settings.max_aspect and max(width, height) > settings.max_aspect * min(width, height):
        return EXTREME_ASPECT
    return IMAGE_TOO_SMALL if min(width, height) < settings.min_side else None


def filter_sample(sample: RawSample, settings: FilterSettings) -> FilterResult:
    """What the filters find of one sample; whatever is wrong with it is a cause, never an error."""
    key: str = sample["__key__"]
    caption = ""
    try:
        caption = caption_of(sample, settings.caption_key)
        data = image_of(sample)
        with opened_image(data, settings.max_pixels or None, max_aspect=None) as image:
            width, height = image.size
        cause = caption_cause(caption, settings) or size_cause(width, height, settings)
        if cause:
            return FilterResult(key, caption, cause)
        look = 0 if settings.near_duplicates is None else _look(data)
    except BadSample as error:
        return FilterResult(key, caption, error.cause)
    return FilterResult(key, caption, None, _digest(data, caption, settings.duplicates), look)


def _look(data: bytes) -> int:
    """64 bits of an image's shapes, by a perceptual hash. Raises BadSample."""
    imagehash = _imagehash()
    # The header alone was read before: the pixels may be unreadable.
    with opened_image(data, max_pixels=None, max_aspect=None) as image:
        bits = imagehash.phash(to_rgb(image)).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _digest(data: bytes, caption: str, duplicates: str) -> bytes:
    """Of what makes a sample the same as another; empty where nothing does."""
    if duplicates == "off":
        return b""
    digest = hashlib.blake2b(data, digest_size=DIGEST)
    if duplicates == "pair":
        # The length sets the caption apart from the image's last bytes.
        text = caption.encode(errors="surrogatepass")
        digest.update(text + len(text).to_bytes(8, "big"))
    return digest.digest()


@lru_cache(maxsize=1)
def _imagehash() -> Any:
    try:
        return import_module("imagehash")
    except ImportError as error:
        raise ValueError("near_duplicates needs imagehash: pip install 'dalle1[filter]'") from error


def packages(settings: FilterSettings) -> dict[str, str]:
    """The versions of the packages that decide.

    Raises:
        ValueError: one that a filter needs is not installed.
    """
    versions = {}
    if settings.english == "language":
        captions.identifier()
        versions["py3langid"] = version("py3langid")
    if settings.near_duplicates is not None:
        _imagehash()
        versions["imagehash"] = version("imagehash")
    return versions

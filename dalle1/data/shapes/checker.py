"""Says whether an image of colored shapes shows what its caption says.

This checks everything that is trained on `dalle1.data.shapes`: `parse` reads the caption,
`detect` reads the image without knowing the caption, `check` compares the two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from PIL import Image

from dalle1.data.shapes.dataset import BACKGROUNDS, RELATION_PHRASES, SHAPES, SIZE_WORDS
from dalle1.data.shapes.detector import DetectedThing, Detection, detect
from dalle1.data.shapes.palettes import COLORS

__all__ = [
    "CheckResult",
    "Claims",
    "DetectedThing",
    "Detection",
    "ObjectClaim",
    "check",
    "compare",
    "detect",
    "parse",
]

PLAINNESS = 1.25  # a relation needs this much more distance along its axis than across


@dataclass(frozen=True)
class ObjectClaim:
    """A thing that a caption names; `size` is None where the caption does not say."""

    color: str
    shape: str
    size: str | None


@dataclass(frozen=True)
class Claims:
    """All that a caption says: its objects in the order of naming, the first one's relation to
    the second (None with one object), and the background (None where it does not say)."""

    objects: tuple[ObjectClaim, ...]
    relation: str | None
    background: str | None


@dataclass(frozen=True)
class CheckResult:
    """Whether an image shows what its caption says.

    `attributes` tells it for each attribute the caption claims: "count", "color" and "shape"
    always, "size", "relation" and "background" where claimed. `reason` says what is wrong, and is
    empty when nothing is.
    """

    ok: bool
    attributes: dict[str, bool]
    reason: str


def parse(caption: str) -> Claims:
    """What a caption of `dalle1.data.shapes.describe` says; case and a full stop do not matter.

    Raises:
        ValueError: the caption is not in that language.
    """
    words = " ".join(caption.lower().replace("gray", "grey").split()).removesuffix(".")
    match = _CAPTION.fullmatch(words)
    if match is None:
        raise ValueError(
            f"caption {caption!r} is not in the language of the shapes data set "
            "(such as 'a small red circle to the left of a blue square on a white background')"
        )
    said = match.groupdict()
    objects = tuple(
        ObjectClaim(said[f"color{i}"], said[f"shape{i}"], _SIZE_OF.get(said[f"size{i}"] or ""))
        for i in (1, 2)
        if said[f"color{i}"] is not None
    )
    return Claims(objects, _RELATION_OF.get(said["relation"] or ""), said["background"])


def check(image: Image.Image | np.ndarray, caption: str) -> CheckResult:
    """Whether the image shows what the caption says: exactly the objects it names, each with
    the color, shape and size it claims, in the relation and on the background it claims.

    Raises:
        ValueError: a caption outside the language or an image that `detect` does not take.
    """
    claims = parse(caption)
    return compare(detect(image), claims)


def compare(found: Detection, claims: Claims) -> CheckResult:
    """`check` for a caption and an image that have been read already."""
    wanted = len(claims.objects)
    # Of the ways to match claimed objects with detected things, the one that fulfils most counts;
    # on a tie, the one that gets colors right, then shapes. Things beyond four cannot help.
    candidates: list[DetectedThing | None] = list(found.things[:4])
    candidates += [None] * (wanted - len(candidates))
    options = [_matches(claims, order) for order in permutations(candidates, wanted)]
    matched = max(options, key=lambda held: (sum(held.values()), *held.values()))

    attributes = {"count": len(found.things) == wanted} | matched
    if claims.background is not None:
        attributes["background"] = found.background == claims.background
    wrong = [name for name, right in attributes.items() if not right]
    if not wrong:
        return CheckResult(True, attributes, "")
    shown = ", ".join(str(thing) for thing in found.things) or "nothing"
    where = f"on {found.background or 'an odd'} background"
    return CheckResult(
        False, attributes, f"wrong {', '.join(wrong)}: the image shows {shown} {where}"
    )


def _matches(claims: Claims, things: tuple[DetectedThing | None, ...]) -> dict[str, bool]:
    """Which attributes hold if the claimed objects are these things."""
    pairs = list(zip(claims.objects, things, strict=True))
    found = {
        "color": all(thing is not None and thing.color == said.color for said, thing in pairs),
        "shape": all(thing is not None and thing.shape == said.shape for said, thing in pairs),
    }
    sized = [(said, thing) for said, thing in pairs if said.size is not None]
    if sized:
        found["size"] = all(thing is not None and thing.size == said.size for said, thing in sized)
    if claims.relation is not None:
        found["relation"] = _related(claims.relation, *things)
    return found


def _related(relation: str, first: DetectedThing | None, second: DetectedThing | None) -> bool:
    """Whether the first is plainly in this relation to the second, by their centers."""
    if first is None or second is None:
        return False
    across, down = second.x - first.x, second.y - first.y
    if relation in ("left of", "right of"):
        along, aside = (across if relation == "left of" else -across), down
    else:
        along, aside = (down if relation == "above" else -down), across
    return along > PLAINNESS * abs(aside)


_SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
_RELATION_OF = {phrase: name for name, phrases in RELATION_PHRASES.items() for phrase in phrases}


def _caption_pattern() -> re.Pattern[str]:
    def thing(number: int) -> str:
        return (
            rf"(?:(?:an?|the) )?(?:(?P<size{number}>{'|'.join(_SIZE_OF)}) )?"
            rf"(?P<color{number}>{'|'.join(COLORS)}) (?P<shape{number}>{'|'.join(SHAPES)})"
        )

    return re.compile(
        rf"(?:there is |a picture of )?{thing(1)}"
        rf"(?: (?:is )?(?P<relation>{'|'.join(_RELATION_OF)}) {thing(2)})?"
        rf"(?: on a (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
    )


_CAPTION = _caption_pattern()

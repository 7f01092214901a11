"""Says whether an image of emoji shows what its caption says.

This checks everything that is trained on `dalle1.data.emoji`: `claims` reads the caption,
`matching` finds which of all pictures of all styles explain the image best without knowing which
the caption names, `EmojiJudge` compares the two. No network takes part, so that nothing that
ranks images can also have learned to please the judge.

Pictures of one style that hardly differ are one: whoever draws one has drawn the other too.
"Hardly" is a root mean square difference of at most `ALIKE` levels of 255 over the 64 x 64 pixels,
of the opacity and of the colors multiplied by it. A codec's copy of 30 dB departs from its image
by 8. Of the published packages these are above all families and couples that a style draws as the
same silhouettes, flags that are the same (of France and of Saint Martin), and people of whose skin
few pixels show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle1.data.emoji.claims import CaptionReader, Claim
from dalle1.data.emoji.dataset import (
    CENTER,
    FAR,
    FRAME_SIDE,
    LARGE,
    MIDDLE,
    NEAR,
    PLACES,
    SMALL,
    SMALLEST_SIDE,
    Piece,
    Scene,
)
from dalle1.data.emoji.matching import (
    NEARBY,
    SHORTLIST,
    WORKING_SIDE,
    Candidates,
    Matches,
    Pictures,
    Place,
    alike,
)
from dalle1.data.emoji.pictures import BACKGROUNDS, read_picture
from dalle1.data.emoji.sources import Emoji

TOP = 5
CLEAR = 0.02  # opacity below which the background shows
LEAST_CLEAR = 32  # pixels that its color is read from
LIKELY = 3  # backgrounds that are tried behind a frame
FEW = 8  # candidates that the arrangement is chosen by
ALIKE = 4.0  # levels of 255
BACKGROUND_TOLERANCE = 40.0  # RGB distance; the nearest two backgrounds are 41 apart
_LARGE, _SMALL, _FRAME, _MIDDLE, _NEAR, _CENTER, _FAR = (
    round(length * WORKING_SIDE) for length in (LARGE, SMALL, FRAME_SIDE, MIDDLE, NEAR, CENTER, FAR)
)
_BLOCKS = {_LARGE: 4, _SMALL: 3, _FRAME: 2}


@dataclass(frozen=True)
class FoundEmoji:
    """The picture that explains a part of an image best; `x`, `y` and `side` as of a `Piece`, those
    of a frame are of its first piece."""

    code: str
    style: str
    name: str
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Judgement:
    """Whether an image shows what its caption says.

    Attributes:
        top1: whether all emoji that are named are what explains their parts of the image best, of
            all emoji in all styles; in whichever style.
        top5: whether they are among the five that do.
        style: whether what explains the image best is of the styles asked for.
        background: None where the caption does not say.
        relation: None where there is one emoji. False too where neither of two is among the five.
        found: what the image shows, in the order of the emoji that are named.
        ranks: for each, how many explain its part better than the one named does; 0 is top-1.
        styled: for each, whether it is of the style asked for.
        reason: what is wrong; empty when nothing is.
    """

    top1: bool
    top5: bool
    style: bool
    background: bool | None
    relation: bool | None
    found: tuple[FoundEmoji, ...]
    ranks: tuple[int, ...]
    styled: tuple[bool, ...]
    reason: str

    @property
    def right(self) -> bool:
        """Whether the image shows all that the caption says."""
        return not self.reason


@dataclass(frozen=True)
class _Part:
    """A part of an image: pixels of an image of that size, what may be there, and how often; what
    is there several times is the cell of a pattern."""

    image: Tensor
    candidates: Candidates
    count: int = 1


@dataclass(frozen=True)
class _Arrangement:
    """How an image may be arranged.

    Attributes:
        name: "single", "twice", "beside", "over" or "framed".
        background: float [3], the color that seems to show between the pieces.
        bare: squared error of the background alone.
        parts: left and right, upper and lower, inner and frame.
    """

    name: str
    background: Tensor
    bare: float
    parts: tuple[_Part, ...]


class EmojiJudge:
    """Judges images of a list of emoji, as `sources.read_emoji` gives it.

    Holds all pictures in memory, about 40 kB each; made once, in about half a minute for the
    published packages.

    Raises:
        ValueError: a picture that cannot be read.
    """

    def __init__(self, emoji: Sequence[Emoji]) -> None:
        self.reader = CaptionReader(emoji)
        self.entries = [(e, style) for e in emoji for style in e.pictures]
        self.pictures = Pictures([read_picture(e.pictures[s]) for e, s in self.entries], _BLOCKS)
        styles = [style for _, style in self.entries]
        self.classes = alike(self.pictures, styles, ALIKE)  # the same number for what is one
        self._number = {(e.code, style): i for i, (e, style) in enumerate(self.entries)}
        self._codes: dict[int, set[str]] = {}
        for (e, _), number in zip(self.entries, self.classes, strict=True):
            self._codes.setdefault(number, set()).add(e.code)

    @torch.inference_mode()
    def judge(self, image: Tensor, claim: str | Scene | Claim) -> Judgement:
        """Whether an image shows what a caption says, or what a scene does.

        Args:
            image: float [3, side, side] in [0, 1], side >= 32.

        Raises:
            ValueError: a caption outside the language, an image of another shape or range.
        """
        if isinstance(claim, str):
            claim = self.reader.read(claim)
        elif isinstance(claim, Scene):
            claim = Claim.of(claim)
        pixels = _working(image)
        arranged = list(self._arrangements(pixels, claim.relation))
        if len(arranged) > 1:
            arranged.sort(key=self._error)
        matches = self._matches(arranged[0], SHORTLIST)
        ground = _named(self._ground(pixels, arranged[0], matches))
        orders = [(0,)] if len(matches) == 1 else [(0, 1), (1, 0)]
        options = [
            self._compare(claim, arranged[0].name, ground, matches, order) for order in orders
        ]
        return max(options, key=lambda option: option[0])[1]

    def same(self, first: Piece, second: Piece) -> bool:
        """Whether the pictures of two pieces are one to the judge."""
        one, other = (self._number[p.code, p.style] for p in (first, second))
        return self.classes[one] == self.classes[other]

    def alike(self) -> list[tuple[str, list[str]]]:
        """Style and names of all pictures that are one, the largest classes first."""
        members: dict[int, list[int]] = {}
        for i, number in enumerate(self.classes):
            members.setdefault(number, []).append(i)
        several = sorted((m for m in members.values() if len(m) > 1), key=len, reverse=True)
        return [(self.entries[m[0]][1], [self.entries[i][0].name for i in m]) for m in several]

    def _arrangements(self, image: Tensor, relation: str | None) -> Iterator[_Arrangement]:
        """All that an image may be, given the kind of what it should show."""
        outer = _median(image, _around(*_EDGE))
        if relation is None:
            yield self._arrangement("single", image, outer, [_SINGLE_PLACES])
        elif relation == "twice":
            yield self._arrangement("twice", image, outer, _OVER_PLACES)
        else:
            yield self._arrangement("beside", image, outer, _BESIDE_PLACES)
            yield self._arrangement("over", image, outer, _OVER_PLACES)
            cells = torch.stack([image[:, y : y + _FRAME, x : x + _FRAME] for x, y in _RING])
            mean = cells.mean(0)  # of a frame's pieces, which are all the same
            # A frame may leave little of the background clear: the likely ones are tried.
            for gap in (_median(image, _around(*_GAP)), *_likely(image)):
                framed = self._arrangement("framed", image, gap, [_INNER_PLACES])
                frame = self.pictures.search(mean, gap, _FRAME_PLACES)
                yield replace(framed, parts=(*framed.parts, _Part(mean, frame, len(cells))))

    def _arrangement(
        self,
        name: str,
        image: Tensor,
        background: Tensor,
        places: Sequence[Mapping[int, Sequence[Place]]],
    ) -> _Arrangement:
        found = (self.pictures.search(image, background, of_part) for of_part in places)
        bare = float((image - background[:, None, None]).square().sum())
        return _Arrangement(name, background, bare, tuple(_Part(image, c) for c in found))

    def _matches(self, arrangement: _Arrangement, shortlist: int) -> list[Matches]:
        return [
            self.pictures.compare(
                part.image, arrangement.background, part.candidates[:shortlist], part.count > 1
            )
            for part in arrangement.parts
        ]

    def _error(self, arrangement: _Arrangement) -> float:
        """The squared error that the best of each part leave, of the first few of each."""
        matches = self._matches(arrangement, FEW)
        best = [
            part.count * float(m.errors[0])
            for part, m in zip(arrangement.parts, matches, strict=True)
        ]
        return arrangement.bare + sum(best)

    def _ground(
        self, image: Tensor, arrangement: _Arrangement, matches: Sequence[Matches]
    ) -> Tensor:
        """The color that shows where the pictures that were found leave the background clear.

        The edge of an image is not enough: codecs are often wrong there.
        """
        covered = torch.zeros(WORKING_SIDE + 2 * NEARBY, WORKING_SIDE + 2 * NEARBY)
        for part, found in zip(arrangement.parts, matches, strict=True):
            x, y, side = found.places[0].tolist()
            opacity = self.pictures.sized(found.pictures[:1], side)[0, 3]
            for across, down in _RING if part.count > 1 else [(0, 0)]:
                left, top = x + across + NEARBY, y + down + NEARBY
                here = covered[top : top + side, left : left + side]
                here.copy_(torch.maximum(here, opacity))
        covered = covered[NEARBY:-NEARBY, NEARBY:-NEARBY]
        for blur in (2, 1, 0):  # pixels that a blur reaches, if so many are clear
            clear = F.max_pool2d(covered[None], 2 * blur + 1, 1, blur)[0] < CLEAR
            if int(clear.sum()) >= LEAST_CLEAR:
                return _median(image, clear)
        return arrangement.background

    def _compare(
        self,
        claim: Claim,
        arrangement: str,
        ground: str | None,
        matches: Sequence[Matches],
        order: tuple[int, ...],
    ) -> tuple[tuple[float, ...], Judgement]:
        """The judgement if the emoji that are named are these parts, and how well that fits."""
        parts = [matches[i] for i in order]
        ranks = [self._rank(m, codes) for m, codes in zip(parts, claim.emoji, strict=True)]
        best = [int(m.pictures[0]) for m in parts]
        styled = [self.entries[i][1] == s for i, s in zip(best, claim.styles, strict=True)]
        near = [rank < TOP for rank in ranks]
        found = tuple(self._found(m) for m in parts)
        attributes = {
            "top1": not any(ranks),
            "top5": all(near),
            "style": all(styled),
            "background": None if claim.background is None else ground == claim.background,
            "relation": None
            if claim.relation is None
            else any(near) and _holds(claim.relation, arrangement, order, found),
        }
        wrong = [n for n, held in attributes.items() if held is False and n != "top5"]
        shown = " and ".join(f"{f.style} {f.name}" for f in found)
        said = f"wrong {', '.join(wrong)}: the image shows {shown}, {arrangement}"
        reason = f"{said}, on {ground or 'an odd'} background" if wrong else ""
        fit = (ranks.count(0), sum(styled), sum(near), -sum(ranks))
        of_each = {"found": found, "ranks": tuple(ranks), "styled": tuple(styled)}
        return fit, Judgement(**attributes, **of_each, reason=reason)  # type: ignore[arg-type]

    def _rank(self, matches: Matches, codes: frozenset[str]) -> int:
        """How many classes explain a part better than that of the emoji named."""
        classes = dict.fromkeys(self.classes[i] for i in matches.pictures.tolist())
        ranks = (i for i, number in enumerate(classes) if codes & self._codes[number])
        return next(ranks, len(self.entries) + TOP)

    def _found(self, matches: Matches) -> FoundEmoji:
        emoji, style = self.entries[int(matches.pictures[0])]
        x, y, side = (v / WORKING_SIDE for v in matches.places[0].tolist())
        return FoundEmoji(emoji.code, style, emoji.name, x, y, side)


def _holds(
    relation: str, arrangement: str, order: tuple[int, ...], found: Sequence[FoundEmoji]
) -> bool:
    """Whether the first is in this relation to the second."""
    if arrangement in ("framed", "twice") or relation in ("framed by", "twice"):
        wanted = {"framed by": "framed", "twice": "twice"}.get(relation)
        return arrangement == wanted and order == (0, 1)
    first, second = found
    apart = first.side - 2 * NEARBY / WORKING_SIDE
    along = {
        "left of": second.x - first.x,
        "right of": first.x - second.x,
        "above": second.y - first.y,
        "below": first.y - second.y,
    }
    return along[relation] >= apart


def _working(image: Tensor) -> Tensor:
    """An image at `WORKING_SIDE`, float32."""
    shape = tuple(image.shape)
    if len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2] or shape[1] < SMALLEST_SIDE:
        raise ValueError(
            f"image: expected [3, side, side] of at least {SMALLEST_SIDE} pixels, got {list(shape)}"
        )
    if not image.is_floating_point() or not bool(((image >= 0) & (image <= 1)).all()):
        raise ValueError(f"image: expected floats in [0, 1], got {image.dtype} or values outside")
    image = image.detach().to("cpu", torch.float32)
    if shape[1] == WORKING_SIDE:
        return image
    size = (WORKING_SIDE, WORKING_SIDE)
    sized = F.interpolate(image[None], size, mode="bicubic", antialias=True, align_corners=False)
    return sized[0].clamp(0, 1)


def _median(image: Tensor, mask: Tensor) -> Tensor:
    """The color in the middle of those of a mask: float [3]."""
    return image[:, mask].median(1).values


def _likely(image: Tensor) -> list[Tensor]:
    """The backgrounds that most pixels have the color of: float [3] each, at most `LIKELY`."""
    colors = torch.tensor(list(BACKGROUNDS.values())) / 255
    apart = (image[None] - colors[:, :, None, None]).norm(dim=1).flatten(1)  # of each pixel
    share = (apart <= BACKGROUND_TOLERANCE / 255).float().mean(1)
    return [colors[i] for i in share.topk(LIKELY).indices if share[i] > 0]


def _named(color: Tensor) -> str | None:
    """The background that a color comes nearest to, None where it comes near none."""
    distances = {
        name: float((color * 255 - torch.tensor(rgb)).norm()) for name, rgb in BACKGROUNDS.items()
    }
    name = min(distances, key=lambda n: distances[n])
    return name if distances[name] <= BACKGROUND_TOLERANCE else None


def _around(inner: int, outer: int) -> Tensor:
    """A mask of a square ring about the middle, between squares of these sides in pixels."""
    from_middle = (torch.arange(WORKING_SIDE) + 0.5 - WORKING_SIDE / 2).abs()
    reach = torch.maximum(from_middle[:, None], from_middle)
    return (reach > inner / 2) & (reach < outer / 2)


_Places = dict[int, list[Place]]


_ALONG = [round(place * WORKING_SIDE) for place in PLACES]
_SINGLE_PLACES: _Places = {
    _LARGE: [(_MIDDLE, _MIDDLE)],
    _SMALL: [(x, y) for y in _ALONG for x in _ALONG],
}
_BESIDE_PLACES: list[_Places] = [{_SMALL: [(x, y) for y in _ALONG]} for x in (_NEAR, _FAR)]
_OVER_PLACES: list[_Places] = [{_SMALL: [(x, y) for x in _ALONG]} for y in (_NEAR, _FAR)]
_INNER_PLACES: _Places = {_SMALL: [(_CENTER, _CENTER)]}
_FRAME_PLACES: _Places = {_FRAME: [(0, 0)]}  # of one cell
_STEPS = range(0, WORKING_SIDE, _FRAME)
_RING = [(x, y) for y in _STEPS for x in _STEPS if {x, y} & {_STEPS[0], _STEPS[-1]}]
_EDGE = (WORKING_SIDE - 8, WORKING_SIDE)  # of which a piece covers less than half
_GAP = (_SMALL - 4, WORKING_SIDE - 2 * _FRAME + 4)  # between a frame and what it frames

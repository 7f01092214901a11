"""Scenes of emoji: one, two in a relation, or one in two styles; and their captions.

Every sample is a pure function of (emoji, seed, split, index), so two machines, or a run and its
resumption, see the same images. Lengths and positions are fractions of the image's side, x to the
right and y downwards.

What training never shows is chosen by the code points alone, without their skin tones, so that it
stays the same when emoji are added:

- "heldout_emoji": whole emoji, for the reach of the codec and the ranker;
- "heldout_styles": an emoji in a style, whose other styles training shows;
- "heldout_pairs": two emoji side by side, which training shows with others.

"contrasts" are for training a ranker. Behind each scene, of the kind that training shows, comes the
same with one thing changed: style, emoji, or places. A ranker that sees both in one batch learns
what differs.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dalle1.data.emoji.captions import pair, pick, single, twice
from dalle1.data.emoji.pictures import BACKGROUNDS, draw, stands_out_from
from dalle1.data.emoji.sources import Emoji
from dalle1.data.generated import write_generated

WHITE_SHARE = 0.4
HELD_OUT_SPLITS = ("heldout_emoji", "heldout_styles", "heldout_pairs")
SPLITS = ("train", "test", *HELD_OUT_SPLITS, "contrasts")
SHARES = {"heldout_emoji": 0.02, "heldout_styles": 0.06, "heldout_pairs": 0.1}
KINDS = {"single": 0.7, "pair": 0.15, "twice": 0.15}  # of "train", "test" and "contrasts"
RELATIONS = ("left of", "right of", "above", "below", "framed by")
# Sides and places are whole multiples of 1 / LATTICE of the image: of the 4 x 4 pixels of a token
# at 48 pixels. So a codec whose tokens depend on their own pixels alone gives a picture of one size
# the same tokens everywhere. There are few places, so that a prior soon knows each picture at each
# of them, rather than having to find out first where in a picture a token lies.
LATTICE = 12
LARGE, SMALL, FRAME_SIDE = 10 / LATTICE, 6 / LATTICE, 3 / LATTICE  # the last of a frame's pieces
LARGE_SHARE = 3 / 4  # of single emoji; all others are small
MIDDLE = 1 / LATTICE  # where a large emoji begins, along both axes
PLACES = (0 / LATTICE, 3 / LATTICE, 6 / LATTICE)  # where a small one begins, along each axis
NEAR, CENTER, FAR = PLACES
PLAIN_SHARE = 0.4  # of draws of an emoji with skin tones that show it without
SIDE = 48  # pixels of an image, unless another is asked for
SMALLEST_SIDE = 32
TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
MOST_TRIES = 10_000
NEIGHBORS = 4  # emoji of code points that lie next to each other often look alike: faces, clocks


@dataclass(frozen=True)
class Piece:
    """One drawn emoji: `x`, `y` of its upper left corner and its side are fractions."""

    code: str
    style: str
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Scene:
    """What an image shows.

    `relation` is that of the first piece to the second: one of `RELATIONS`; "twice" for one emoji
    in two styles, one above the other; None for one piece. Of "framed by" the pieces behind the
    first are the frame.
    """

    pieces: tuple[Piece, ...]
    relation: str | None
    background: str


@dataclass(frozen=True, eq=False)
class EmojiSample:
    """An image (uint8 [side, side, 3]), its caption, the scene both come from, and a key that is
    unique within a data set of one seed."""

    key: str
    image: np.ndarray
    caption: str
    scene: Scene


def base_code(code: str) -> str:
    """A code without skin tones, which all variants share."""
    return "-".join(part for part in code.split("-") if part not in TONES)


def without_skin_tones(emoji: Sequence[Emoji]) -> list[Emoji]:
    """Those of a list of emoji whose code has no skin tone."""
    return [e for e in emoji if e.code == base_code(e.code)]


class EmojiDataset:
    """Samples of a list of emoji, as `sources.read_emoji` gives it.

    Raises ValueError where too few are left for a split.
    """

    def __init__(self, emoji: Sequence[Emoji]) -> None:
        self.by_code = {e.code: e for e in emoji}
        self._variants: dict[str, list[Emoji]] = {}  # by base, the one without a tone first
        for e in sorted(emoji, key=lambda e: (len(e.code), e.code)):
            self._variants.setdefault(base_code(e.code), []).append(e)
        self._seen = [b for b in self._variants if not _is_chosen("heldout_emoji", b)]
        self._unseen = [b for b in self._variants if _is_chosen("heldout_emoji", b)]
        self._with_held_out_style = [b for b in self._seen if self._held_out_style(b)]
        if len(self._seen) < 2:
            raise ValueError(f"emoji: expected at least 2 for training, got {len(self._seen)}")

    def styles(self, emoji: Emoji, split: str = "train") -> list[str]:
        """The styles that a split shows the emoji in."""
        held_out = self._held_out_style(base_code(emoji.code))
        if split == "heldout_styles":
            return [s for s in emoji.pictures if s == held_out]
        if split == "heldout_emoji":
            return list(emoji.pictures)
        return [s for s in emoji.pictures if s != held_out]

    def is_held_out_pair(self, first: str, second: str) -> bool:
        """Whether training never shows these two codes side by side, in whatever order."""
        codes = sorted((base_code(first), base_code(second)))
        return _is_chosen("heldout_pairs", "+".join(codes))

    def make(self, seed: int, index: int, split: str = "train", side: int = SIDE) -> EmojiSample:
        """A sample of a split: always the same one for the same arguments.

        Scene and caption do not depend on `side`. "train" and "test" are separate draws without
        what is held out. Of "contrasts" each odd sample is the one before with one thing changed.
        Each other split shows what its name says in every image.

        Raises:
            ValueError: an unknown split, a negative seed or index, a side below 32, a split that
                this list of emoji is too short for.
        """
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if seed < 0 or index < 0:
            raise ValueError(f"seed, index: expected 0 or more, got {seed} and {index}")
        if side < SMALLEST_SIDE:
            raise ValueError(f"side: expected at least {SMALLEST_SIDE} pixels, got {side}")
        first = index - index % 2 if split == "contrasts" else index
        rng = np.random.default_rng([seed, SPLITS.index(split), first])
        scene = self._draw(rng, split)
        if first != index:
            rng = np.random.default_rng([seed, SPLITS.index(split), index])
            scene = self._contrast(rng, scene)
        caption = self._caption(rng, scene)
        return EmojiSample(f"{split}-{index:08d}", self.render(scene, side), caption, scene)

    def render(self, scene: Scene, side: int) -> np.ndarray:
        """The image of a scene: uint8 [side, side, 3]."""
        canvas = np.full((side, side, 3), BACKGROUNDS[scene.background], np.uint8)
        for piece in scene.pieces:
            size = round(piece.side * side)
            x, y = (min(round(v * side), side - size) for v in (piece.x, piece.y))
            draw(canvas, self.by_code[piece.code].pictures[piece.style], x, y, size)
        return canvas

    def _draw(self, rng: np.random.Generator, split: str) -> Scene:
        kind = {"heldout_emoji": "single", "heldout_pairs": "pair"}.get(split)
        kinds, shares = list(KINDS), np.array(list(KINDS.values()))
        if split == "heldout_styles":
            kinds, shares = ["single", "twice"], np.array([0.5, 0.5])
        kind = kind or kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
        if kind == "pair":
            return self._pair(rng, split)
        emoji = self._one(rng, split, styles=2 if kind == "twice" else 1)
        if kind == "single":
            style = pick(rng, self.styles(emoji, split))
            size = LARGE if rng.random() < LARGE_SHARE else SMALL
            x, y = (MIDDLE, MIDDLE) if size == LARGE else (_place(rng), _place(rng))
            piece = Piece(emoji.code, style, x, y, size)
            return Scene((piece,), None, self._background(rng, (piece,)))
        # The held-out style is the lower one, which completion asks for.
        other = pick(rng, self.styles(emoji, split))
        known = "train" if split == "heldout_styles" else split
        style = pick(rng, [s for s in self.styles(emoji, known) if s != other])
        x = _place(rng)
        upper = Piece(emoji.code, style, x, NEAR, SMALL)
        lower = Piece(emoji.code, other, x, FAR, SMALL)
        return Scene((upper, lower), "twice", self._background(rng, (upper, lower)))

    def _pair(self, rng: np.random.Generator, split: str) -> Scene:
        wanted = split == "heldout_pairs"
        for _ in range(MOST_TRIES):
            first, second = self._one(rng, "train"), self._one(rng, "train")
            shared = [s for s in self.styles(first) if s in self.styles(second)]
            same = base_code(first.code) == base_code(second.code)
            if shared and not same and self.is_held_out_pair(first.code, second.code) == wanted:
                break
        else:
            raise ValueError(f"split: {split} has no pair of these {len(self.by_code)} emoji")
        style, relation = pick(rng, shared), pick(rng, RELATIONS)
        pieces = _arranged(rng, first.code, second.code, style, relation)
        return Scene(pieces, relation, self._background(rng, pieces[:2]))

    def _caption(self, rng: np.random.Generator, scene: Scene) -> str:
        """A scene in words."""
        first, second = scene.pieces[0], scene.pieces[-1]
        emoji, background = self.by_code[first.code], scene.background
        if scene.relation is None:
            return single(rng, emoji.name, first.style, background, emoji.keywords)
        if scene.relation == "twice":
            return twice(rng, emoji.name, first.style, second.style, background)
        names = emoji.name, self.by_code[second.code].name
        return pair(rng, *names, scene.relation, first.style, background)

    def _contrast(self, rng: np.random.Generator, scene: Scene) -> Scene:
        """A scene with one thing changed, of those that training may show; or another scene, where
        none can be."""
        changes = (self._swapped, self._restyled, self._renamed)
        for i in rng.permutation(len(changes)):
            pieces = changes[i](rng, scene)
            if pieces is not None and self._may_show(scene.relation, pieces, scene.background):
                return Scene(pieces, scene.relation, scene.background)
        return self._draw(rng, "contrasts")

    def _swapped(self, rng: np.random.Generator, scene: Scene) -> tuple[Piece, ...] | None:
        """Each of two emoji, or of two styles, where the other was."""
        first, second = scene.pieces[0], scene.pieces[-1]
        if scene.relation is None:
            return None
        if scene.relation == "twice":
            return replace(first, style=second.style), replace(second, style=first.style)
        others = {first.code: second.code, second.code: first.code}
        return tuple(replace(p, code=others[p.code]) for p in scene.pieces)

    def _restyled(self, rng: np.random.Generator, scene: Scene) -> tuple[Piece, ...] | None:
        """All in another style; of one emoji in two styles the lower one."""
        shown = [self.styles(self.by_code[p.code]) for p in scene.pieces[:2]]
        free = [s for s in shown[0] if s in shown[-1] and all(s != p.style for p in scene.pieces)]
        if not free:
            return None
        kept = scene.pieces[:1] if scene.relation == "twice" else ()
        style = pick(rng, free)
        return *kept, *(replace(p, style=style) for p in scene.pieces[len(kept) :])

    def _renamed(self, rng: np.random.Generator, scene: Scene) -> tuple[Piece, ...] | None:
        """Another emoji in place of one: another skin tone, or one of near code points."""
        old = pick(rng, [p.code for p in scene.pieces[:2]])
        base = base_code(old)
        others = [e.code for e in self._variants[base] if e.code != old]
        if not others or rng.random() < 0.5:
            at = self._seen.index(base)
            near = self._seen[max(at - NEIGHBORS, 0) : at + NEIGHBORS + 1]
            others = [self._variants[b][0].code for b in near if b != base]
        new = pick(rng, others)
        return tuple(replace(p, code=new) if p.code == old else p for p in scene.pieces)

    def _may_show(self, relation: str | None, pieces: Sequence[Piece], background: str) -> bool:
        """Whether training may show these pieces, and they can be seen on the background."""
        emoji = [self.by_code[p.code] for p in pieces]
        if any(p.style not in self.styles(e) for p, e in zip(pieces, emoji, strict=True)):
            return False
        if relation not in (None, "twice"):
            first, second = pieces[0].code, pieces[-1].code
            if base_code(first) == base_code(second) or self.is_held_out_pair(first, second):
                return False
        return all(
            background in stands_out_from(e.pictures[p.style])
            for p, e in zip(pieces, emoji, strict=True)
        )

    def _background(self, rng: np.random.Generator, pieces: Sequence[Piece]) -> str:
        """White or another one; where pieces would not be seen on it, one where they are.

        Where there is none, since one is as dark as the other is bright, any.
        """
        seen = [stands_out_from(self.by_code[p.code].pictures[p.style]) for p in pieces]
        possible = [name for name in BACKGROUNDS if all(name in s for s in seen)]
        possible = possible or list(BACKGROUNDS)
        colored = [name for name in possible if name != "white"]
        white = "white" in possible and (rng.random() < WHITE_SHARE or not colored)
        return "white" if white else pick(rng, colored)

    def _one(self, rng: np.random.Generator, split: str, styles: int = 1) -> Emoji:
        """An emoji that the split shows, and that has at least so many styles to show it in.

        Every emoji without its skin tones is as likely, however many tones it has.
        """
        bases = {"heldout_emoji": self._unseen, "heldout_styles": self._with_held_out_style}
        possible = bases.get(split, self._seen)
        for _ in range(MOST_TRIES if possible else 0):
            variants = self._variants[pick(rng, possible)]
            plain = len(variants) == 1 or rng.random() < PLAIN_SHARE
            emoji = variants[0 if plain else int(rng.integers(1, len(variants)))]
            shown = self.styles(emoji, split)
            others = self.styles(emoji) if split == "heldout_styles" else shown[1:]
            if shown and len(others) >= styles - 1:
                return emoji
        raise ValueError(f"split: {split} has no emoji among these {len(self.by_code)}")

    def _held_out_style(self, base: str) -> str | None:
        """The style that training never shows an emoji in, if there is one."""
        if not _is_chosen("heldout_styles", base):
            return None
        styles = sorted({s for e in self._variants.get(base, ()) for s in e.pictures})
        return styles[zlib.crc32(f"style:{base}".encode()) % len(styles)] if styles else None


def write_shards(
    dataset: EmojiDataset,
    folder: str | os.PathLike[str],
    split: str,
    count: int,
    seed: int = 0,
    side: int = SIDE,
    samples_per_shard: int = 1000,
) -> list[Path]:
    """Writes samples 0 ... count - 1 of a split as WebDataset shards and returns their paths.

    See `generated.write_generated`.

    Raises:
        ValueError: as `EmojiDataset.make` and `write_generated`.
    """
    return write_generated(
        lambda index: dataset.make(seed, index, split, side),
        folder,
        split,
        count,
        seed,
        samples_per_shard,
    )


def _is_chosen(salt: str, text: str) -> bool:
    """Whether a text is among the share of a split, by a hash that no Python changes."""
    return zlib.crc32(f"{salt}:{text}".encode()) < SHARES[salt] * 2**32


def _place(rng: np.random.Generator) -> float:
    """Where a small piece begins, along one axis."""
    return PLACES[int(rng.integers(len(PLACES)))]


def _arranged(
    rng: np.random.Generator, first: str, second: str, style: str, relation: str
) -> tuple[Piece, ...]:
    """Two emoji in a relation, one in each half of the image, anywhere along the other axis."""
    if relation == "framed by":
        inner = Piece(first, style, CENTER, CENTER, SMALL)
        steps = [i * FRAME_SIDE for i in range(round(1 / FRAME_SIDE))]
        ring = [(x, y) for y in steps for x in steps if {x, y} & {steps[0], steps[-1]}]
        return inner, *(Piece(second, style, x, y, FRAME_SIDE) for x, y in ring)
    one, other = (NEAR, FAR) if relation in ("left of", "above") else (FAR, NEAR)
    across = [_place(rng) for _ in range(2)]
    if relation in ("left of", "right of"):
        places = ((one, across[0]), (other, across[1]))
    else:
        places = ((across[0], one), (across[1], other))
    return tuple(
        Piece(code, style, x, y, SMALL)
        for code, (x, y) in zip((first, second), places, strict=True)
    )

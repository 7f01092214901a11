"""How right the judge is: on true scenes, and on scenes with one thing wrong.

    python -m dalle1.data.emoji.trials noto=FOLDER twemoji=FOLDER fluent=FOLDER names=FOLDER

draws scenes of each split, damages their images as a codec or a model does, and prints the share of
true ones that are called right, the share of wrong ones that are called wrong, and the time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from PIL import Image, ImageFilter

from dalle1.common.images import to_tensor
from dalle1.data.emoji.captions import pick
from dalle1.data.emoji.dataset import (
    FRAME_SIDE,
    SIDE,
    SPLITS,
    EmojiDataset,
    Piece,
    Scene,
    base_code,
)
from dalle1.data.emoji.judge import EmojiJudge
from dalle1.data.emoji.matching import WORKING_SIDE
from dalle1.data.emoji.pictures import BACKGROUNDS
from dalle1.data.emoji.sources import read_emoji

WRONG = ("another emoji", "a near emoji", "another style", "another background", "swapped")
NEAREST = 5  # other emoji of a style that count as near
NEAR_SIDE = round(FRAME_SIDE * WORKING_SIDE)  # pixels of the pictures that are compared for it
NOISE = 10 ** (-30 / 20)  # of 30 dB

Damage = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class TrialResult:
    """Outcomes of one damage: shares by kind of scene, and the mean time of a judgement.

    Attributes:
        true: shares of true scenes called right, with "all".
        wrong: shares of scenes called wrong, by what is wrong with them.
        top1, top5: shares of true scenes.
        milliseconds: of one judgement.
    """

    true: dict[str, float]
    wrong: dict[str, float]
    top1: float
    top5: float
    milliseconds: float


def blurred(image: np.ndarray, radius: float) -> np.ndarray:
    """A Gaussian blur of this standard deviation in pixels."""
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """With noise of 30 dB."""
    noise = rng.normal(0, 255 * NOISE, image.shape)
    return (image + noise).round().clip(0, 255).astype(np.uint8)


def shifted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moved by up to one pixel each way; the border is repeated."""
    x, y = rng.integers(0, 3, 2)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    return padded[y : y + len(image), x : x + len(image)].copy()


def tinted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All of one color channel lighter or darker, by 3 % of the range as a standard deviation."""
    return (image + rng.normal(0, 0.03 * 255, 3)).round().clip(0, 255).astype(np.uint8)


DAMAGES: dict[str, Damage] = {
    "none": lambda image, rng: image.copy(),
    "blur of 1 pixel, noise of 30 dB": lambda image, rng: noisy(blurred(image, 1.0), rng),
    "the same, shift of 1 pixel, tint of 3 %": lambda image, rng: tinted(
        shifted(noisy(blurred(image, 1.0), rng), rng), rng
    ),
    "blur of 1.5 pixels": lambda image, rng: blurred(image, 1.5),
}


def wrong_scene(
    judge: EmojiJudge, dataset: EmojiDataset, scene: Scene, wrong: str, rng: np.random.Generator
) -> Scene | None:
    """The scene with one of `WRONG` in it, or None where that cannot be.

    A near emoji has another skin tone, or is one of the nearest in the same style. Of a pair one of
    both is another. What the judge takes for one (see its module) is never put for the other.
    """
    if wrong == "another background":
        others = [b for b in BACKGROUNDS if b != scene.background]
        return replace(scene, background=pick(rng, others))
    if wrong == "swapped":
        if scene.relation is None:
            return None
        first, second = scene.pieces[:2]
        one, other = replace(first, code=second.code), replace(second, code=first.code)
        if scene.relation == "twice":
            one, other = replace(first, style=second.style), replace(second, style=first.style)
        behind = [replace(p, code=other.code) for p in scene.pieces[2:]]
        same = judge.same(first, one) and judge.same(second, other)
        return None if same else replace(scene, pieces=(one, other, *behind))
    if wrong == "another style":
        return _restyled(dataset, scene, rng)
    chosen = scene.pieces[0 if len(scene.pieces) == 1 else int(rng.integers(2))]
    if wrong == "a near emoji":
        codes = near_codes(judge, chosen)
    else:
        codes = [c for c, e in dataset.by_code.items() if chosen.style in e.pictures]
    codes = [c for c in codes if not judge.same(chosen, replace(chosen, code=c))]
    if scene.relation == "twice":  # the same emoji twice, in both styles
        styles = {p.style for p in scene.pieces}
        codes = [c for c in codes if styles <= dataset.by_code[c].pictures.keys()]
    if not codes:
        return None
    code = pick(rng, codes)
    replaced = [
        replace(p, code=code) if p.code == chosen.code else p  # all of a frame, or both of "twice"
        for p in scene.pieces
    ]
    return replace(scene, pieces=tuple(replaced))


def near_codes(judge: EmojiJudge, piece: Piece) -> list[str]:
    """Codes of the emoji that look most like a piece's in its style: its skin tones, or else the
    nearest."""
    codes = [e.code if style == piece.style else None for e, style in judge.entries]
    own = codes.index(piece.code)
    tones = [c for c in codes if c and base_code(c) == base_code(piece.code) and c != piece.code]
    if tones:
        return tones
    order = judge.pictures.distances(own, NEAR_SIDE).argsort().tolist()
    others = (c for i in order if (c := codes[i]) is not None)
    return list(
        islice((c for c in others if not judge.same(piece, replace(piece, code=c))), NEAREST)
    )


def run_trial(
    judge: EmojiJudge, dataset: EmojiDataset, count: int, damage: Damage, side: int = SIDE
) -> TrialResult:
    """Judges `count` true scenes of each split, and each with everything wrong that can be.

    Every second claim is the caption, the others are scenes, of which the background counts too.
    """
    true: dict[str, list[bool]] = {"all": []}
    wrong: dict[str, list[bool]] = {name: [] for name in WRONG}
    top1, top5, seconds = 0, 0, 0.0
    for split, index in _indices(count):
        sample = dataset.make(7, index, split, side)
        rng = np.random.default_rng([SPLITS.index(split), index])
        image = to_tensor(damage(sample.image, rng))
        start = time.perf_counter()
        found = judge.judge(image, sample.caption if index % 2 else sample.scene)
        seconds += time.perf_counter() - start
        top1, top5 = top1 + found.top1, top5 + found.top5
        true["all"].append(found.right)
        true.setdefault(sample.scene.relation or "single", []).append(found.right)
        for name in WRONG:
            other = wrong_scene(judge, dataset, sample.scene, name, rng)
            if other is not None:
                image = to_tensor(damage(dataset.render(other, side), rng))
                wrong[name].append(not judge.judge(image, sample.scene).right)
    judged = len(true["all"])
    return TrialResult(
        {name: sum(held) / len(held) for name, held in true.items()},
        {name: sum(held) / len(held) for name, held in wrong.items() if held},
        top1 / judged,
        top5 / judged,
        1000 * seconds / judged,
    )


def _indices(count: int) -> Iterator[tuple[str, int]]:
    return ((split, index) for split in SPLITS for index in range(count))


def _restyled(dataset: EmojiDataset, scene: Scene, rng: np.random.Generator) -> Scene | None:
    """The scene with its first emoji, both of a pair, or the lower of two, in another style."""
    shown = [set(dataset.by_code[p.code].pictures) for p in scene.pieces]
    free = set.intersection(*shown) - {p.style for p in scene.pieces}
    if not free:
        return None
    style = pick(rng, sorted(free))
    changed = scene.pieces[1:] if scene.relation == "twice" else scene.pieces
    kept = scene.pieces[: len(scene.pieces) - len(changed)]
    return replace(scene, pieces=(*kept, *(replace(p, style=style) for p in changed)))


def main(arguments: list[str]) -> None:
    """Prints the trials of all damages. See the module for the arguments; `count=100` is the scenes
    of each split, `side=48` the pixels of their images."""
    given = dict(a.partition("=")[::2] for a in arguments)
    count, side = int(given.pop("count", "100")), int(given.pop("side", str(SIDE)))
    if "names" not in given:
        raise ValueError(f"names: expected names=FOLDER, got {' '.join(arguments) or 'nothing'}")
    names = given.pop("names")
    emoji = read_emoji(given, names)
    start = time.perf_counter()
    judge, dataset = EmojiJudge(emoji), EmojiDataset(emoji)
    print(f"{len(judge.entries)} pictures, {time.perf_counter() - start:.0f} s to read them")
    alike = judge.alike()
    print(
        f"{sum(len(members) for _, members in alike)} of them in {len(alike)} classes of several:"
    )
    for style, members in alike:
        print(f"  {style}: {', '.join(members)}")
    for name, damage in DAMAGES.items():
        result = run_trial(judge, dataset, count, damage, side)
        print(f"{name}: top-1 {result.top1:.1%}, top-5 {result.top5:.1%}", end=", ")
        print(f"{result.milliseconds:.0f} ms an image")
        for title, shares in (("right", result.true), ("rejected", result.wrong)):
            said = ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items())
            print(f"  {title}: {said}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

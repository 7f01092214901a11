"""The judge of emoji: what it must accept, reject and read, on drawn patterns in three styles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dalle1.common.images import to_tensor
from dalle1.data.emoji import SPLITS, EmojiDataset, read_emoji
from dalle1.data.emoji.claims import CaptionReader, Claim
from dalle1.data.emoji.dataset import (
    CENTER,
    FAR,
    FRAME_SIDE,
    LARGE,
    MIDDLE,
    NEAR,
    SIDE,
    SMALL,
    Piece,
    Scene,
)
from dalle1.data.emoji.judge import EmojiJudge
from dalle1.data.emoji.matching import Pictures, alike
from dalle1.data.emoji.pictures import BACKGROUNDS
from dalle1.data.emoji.sources import Emoji
from dalle1.data.emoji.trials import DAMAGES, WRONG, run_trial, wrong_scene

from .packages import draw_patterns, write_packages

ANY = list(BACKGROUNDS)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> list[Emoji]:
    packages, names = write_packages(tmp_path_factory.mktemp("packages"))
    listed = read_emoji(packages, names)
    draw_patterns(listed)
    return listed


@pytest.fixture(scope="module")
def dataset(emoji: list[Emoji]) -> EmojiDataset:
    return EmojiDataset(emoji)


@pytest.fixture(scope="module")
def judge(emoji: list[Emoji]) -> EmojiJudge:
    return EmojiJudge(emoji)


def codes(dataset: EmojiDataset, count: int) -> list[str]:
    """Emoji that are there in all styles and have no tones."""
    plain = [c for c, e in dataset.by_code.items() if len(e.pictures) == 3 and "-" not in c]
    return [c for c in plain if f"{c}-1f3fb" not in dataset.by_code][:count]


def drawn(dataset: EmojiDataset, scene: Scene) -> torch.Tensor:
    """The image of a scene, float32 [3, 48, 48]."""
    return to_tensor(dataset.render(scene, SIDE).copy())


def beside(
    first: str, second: str, style: str = "noto", y: tuple[float, float] = (CENTER, FAR)
) -> Scene:
    """The first to the left of the second."""
    pieces = (
        Piece(first, style, NEAR, y[0], SMALL),
        Piece(second, style, FAR, y[1], SMALL),
    )
    return Scene(pieces, "left of", "blue")


@pytest.mark.parametrize("damage", DAMAGES)
def test_true_scenes_are_right_and_wrong_ones_are_not(
    judge: EmojiJudge, dataset: EmojiDataset, damage: str
) -> None:
    """A judge that calls clear pictures wrong, or passes another emoji, tone, style, background
    or order, in whatever arrangement; on clean images or on such as a codec returns."""
    result = run_trial(judge, dataset, 5, DAMAGES[damage])
    assert result.true["all"] >= 0.95, result
    assert set(result.wrong) == set(WRONG) and min(result.wrong.values()) >= 0.95, result


@pytest.mark.parametrize("side", [32, 64, 96, 128])
def test_other_sides_are_judged_too(judge: EmojiJudge, dataset: EmojiDataset, side: int) -> None:
    """Places or sizes that are only found in images of 48 pixels."""
    result = run_trial(judge, dataset, 2, DAMAGES["none"], side)
    assert result.true["all"] >= 0.95 and min(result.wrong.values()) >= 0.9, result


def test_what_is_found_is_what_was_drawn(judge: EmojiJudge, dataset: EmojiDataset) -> None:
    """An emoji that is right by chance: found at a place where it is not."""
    for i in range(40):
        sample = dataset.make(5, i)
        found = judge.judge(drawn(dataset, sample.scene), sample.scene).found
        for piece, seen in zip(sample.scene.pieces, found, strict=False):
            if seen.side != FRAME_SIDE:  # of a frame all pieces count
                assert (seen.code, seen.style) == (piece.code, piece.style)
                assert (seen.x, seen.y) == pytest.approx((piece.x, piece.y))
                assert seen.side == piece.side


def test_the_search_finds_the_least_squared_error(
    emoji: list[Emoji], dataset: EmojiDataset
) -> None:
    """Reduction, background or opacity that the formula of the errors has wrong: compared with
    rendering every emoji at every place, in float64."""
    few = emoji[:6]
    entries = [(e.code, s) for e in few for s in e.pictures]
    images = [Image.open(e.pictures[s]).convert("RGBA") for e in few for s in e.pictures]
    pictures = Pictures(images, {24: 3, 40: 4})
    places = {24: [(0, 0), (12, 8), (24, 24)], 40: [(0, 8), (8, 0)]}
    for i in range(6):
        (code, style), background = entries[3 * i % len(entries)], ANY[i]
        color = np.array(BACKGROUNDS[background]) / 255
        image = drawn(dataset, Scene((Piece(code, style, 1 / 4, 1 / 6, 1 / 2),), None, background))
        errors = {}
        for number, (c, s) in enumerate(entries):
            for side, corners in places.items():
                for x, y in corners:
                    piece = Piece(c, s, x / SIDE, y / SIDE, side / SIDE)
                    shown = dataset.render(Scene((piece,), None, background), SIDE) / 255
                    pixels = image.double().numpy().transpose(1, 2, 0)
                    bare = np.square(pixels - color).sum()
                    errors[number, x, y, side] = np.square(pixels - shown).sum() - bare
        best = min(errors, key=lambda key: errors[key])
        behind = torch.tensor(color, dtype=torch.float32)
        found = pictures.compare(image, behind, pictures.search(image, behind, places))
        assert (int(found.pictures[0]), *found.places[0].tolist()) == best
        assert found.errors[0].item() == pytest.approx(errors[best], abs=0.2)  # of some 1,000


def test_the_relation_is_that_of_the_places(judge: EmojiJudge, dataset: EmojiDataset) -> None:
    """Left taken for right; a relation that is right since both emoji are there."""
    a, b, c, d = codes(dataset, 4)
    image = drawn(dataset, beside(a, b))
    for relation, right in (("left of", True), ("right of", False), ("above", False)):
        found = judge.judge(image, replace(beside(a, b), relation=relation))
        assert found.top1 and found.style and found.relation is right is found.right
    assert judge.judge(image, replace(beside(b, a), relation="right of")).right
    other = judge.judge(image, beside(a, c))
    assert not other.top1 and other.relation  # the one of them that is there is at its place
    neither = judge.judge(image, beside(c, d))
    assert not neither.relation and "relation" in neither.reason
    diagonal = beside(a, b, y=(NEAR, FAR))  # is above too, and is not below
    image = drawn(dataset, diagonal)
    for relation, right in (("left of", True), ("above", True), ("below", False)):
        assert judge.judge(image, replace(diagonal, relation=relation)).relation is right


def test_a_style_that_is_not_asked_for_is_not_another_emoji(
    judge: EmojiJudge, dataset: EmojiDataset
) -> None:
    """A figure of emoji that mixes in styles, of which there is a figure of its own."""
    a, b = codes(dataset, 2)
    image = drawn(dataset, beside(a, b, "twemoji"))
    found = judge.judge(image, beside(a, b))
    assert found.top1 and found.relation and found.background and not found.style
    assert not found.right and found.reason.startswith("wrong style: the image shows twemoji")


def test_what_a_caption_does_not_say_is_not_judged(
    judge: EmojiJudge, dataset: EmojiDataset
) -> None:
    """A background that nobody asked for, or a relation of one emoji, counted in a mean."""
    (a,) = codes(dataset, 1)
    scene = Scene((Piece(a, "noto", MIDDLE, MIDDLE, LARGE),), None, "pink")
    image = drawn(dataset, scene)
    name = dataset.by_code[a].name
    found = judge.judge(image, f"A noto emoji of a {name}.")
    assert found.right and found.background is None and found.relation is None
    assert judge.judge(image, f"a {name}, noto style, on a pink background").background
    found = judge.judge(image, f"a {name}, noto style, on orange")
    assert found.background is False and not found.right and found.top1


def test_the_background_is_what_the_emoji_leave_clear(
    judge: EmojiJudge, dataset: EmojiDataset
) -> None:
    """A border that a codec paints wrongly taken for the background of the whole image."""
    (a,) = codes(dataset, 1)
    scene = Scene((Piece(a, "fluent", MIDDLE, MIDDLE, LARGE),), None, "orange")
    image = drawn(dataset, scene)
    yellow = torch.tensor(BACKGROUNDS["yellow"])[:, None, None] / 255
    for part in (slice(0, 3), slice(-3, None)):
        image[:, part], image[:, :, part] = yellow, yellow
    assert judge.judge(image, scene).right


def test_the_second_best_counts_for_top5(judge: EmojiJudge, dataset: EmojiDataset) -> None:
    """A top-5 that is the top-1, or that anything passes."""
    a, b, c = codes(dataset, 3)
    scenes = [Scene((Piece(x, "noto", MIDDLE, MIDDLE, LARGE),), None, "white") for x in (a, b, c)]
    image, other = (drawn(dataset, s) for s in scenes[:2])
    mixed = 0.55 * image + 0.45 * other
    first, second, third = (judge.judge(mixed, s) for s in scenes)
    assert first.top1 and first.top5
    assert not second.top1 and second.top5 and not second.right
    assert not third.top1 and not third.top5


def test_pictures_that_hardly_differ_are_one_within_a_style() -> None:
    """Emoji that nobody can tell apart counted as wrong, or two styles taken for one."""
    plain = np.zeros((64, 64, 4), np.uint8)
    plain[8:56, 8:56] = (200, 100, 50, 255)
    levels = [0, 3, 6, 60]  # those at 0 and 6 are joined by the one between
    images = [Image.fromarray(plain + np.array([v, v, v, 0], np.uint8)) for v in (*levels, 0)]
    hidden = plain.copy()
    hidden[:4] = (255, 255, 255, 0)  # what is see-through does not count
    images.append(Image.fromarray(hidden))
    groups = ["noto"] * 4 + ["fluent", "noto"]
    assert alike(Pictures(images, {}), groups, 3.0) == [0, 0, 0, 3, 4, 0]
    assert alike(Pictures(images, {}), groups, 1.0) == [0, 1, 2, 3, 4, 0]


def test_alike_emoji_are_right_for_each_other(emoji: list[Emoji]) -> None:
    """A family that is drawn like another one, of which the judge knows the first alone."""
    twin = replace(emoji[0], code="1fff0", name="twin")
    judge = EmojiJudge([*emoji[:10], twin])
    scene = Scene((Piece("1fff0", "noto", MIDDLE, MIDDLE, LARGE),), None, "white")
    image = drawn(EmojiDataset([*emoji[:10], twin]), scene)
    for code in (twin.code, emoji[0].code):
        assert judge.judge(
            image, replace(scene, pieces=(replace(scene.pieces[0], code=code),))
        ).right
    assert ("noto", [emoji[0].name, "twin"]) in judge.alike()


def test_captions_are_read_as_the_scene_they_describe(
    emoji: list[Emoji], dataset: EmojiDataset
) -> None:
    """A pattern of captions that cannot be read, or the second emoji taken for the first."""
    reader = CaptionReader(emoji)
    for split in SPLITS:
        for i in range(150):
            sample = dataset.make(9, i, split, 32)
            read, shown = reader.read(sample.caption.capitalize() + "."), Claim.of(sample.scene)
            assert read.background in (None, shown.background), sample.caption
            assert replace(read, background=shown.background) == shown, sample.caption


def test_names_may_hold_words_of_captions(emoji: list[Emoji]) -> None:
    """Names that are cut at "over" or "on blue", and two emoji of one name."""
    named = ["ox over moon", "moon", "ox on blue", "moon"]
    listed = [replace(e, name=n) for e, n in zip(emoji, named, strict=False)]
    reader = CaptionReader(listed)
    ox, moon, blue = (frozenset({e.code for e in listed if e.name == n}) for n in named[:3])
    read = reader.read("an ox over moon over a moon, noto style")
    assert read.emoji == (ox, moon) and len(moon) == 2
    read = reader.read("a noto emoji of an ox on blue on a pink background")
    assert read.emoji == (blue,) and read.background == "pink"


@pytest.mark.parametrize(
    "caption",
    ["", "a red circle", "a noto emoji of a unicorn cloud", "an apple emoji of a thing 1"],
)
def test_captions_of_another_language_are_named(judge: EmojiJudge, caption: str) -> None:
    """A caption that is judged as if it said nothing."""
    with pytest.raises(ValueError, match=r"caption: expected the language of the emoji data set"):
        judge.judge(torch.zeros(3, 64, 64), caption)


def test_bad_images_are_named(judge: EmojiJudge) -> None:
    """Bytes, channels last or values of another range, judged as something wrong."""
    caption = "a noto emoji of a thing 1"
    for shape in ((64, 64, 3), (3, 64, 32), (3, 16, 16), (1, 3, 64, 64)):
        with pytest.raises(ValueError, match=r"image: expected \[3, side, side\] of at least 32"):
            judge.judge(torch.zeros(shape), caption)
    for image in (
        torch.zeros(3, 64, 64, dtype=torch.uint8),
        torch.full((3, 64, 64), 2.0),
        torch.full((3, 64, 64), float("nan")),
    ):
        with pytest.raises(ValueError, match=r"image: expected floats in \[0, 1\]"):
            judge.judge(image, caption)


def test_wrong_scenes_differ_from_the_true_one_as_they_say(
    judge: EmojiJudge, dataset: EmojiDataset
) -> None:
    """Trials of the judge with scenes that are not wrong, or wrong in more than they say."""
    rng = np.random.default_rng(0)
    for i in range(60):
        scene = dataset.make(3, i, side=32).scene
        for wrong in WRONG:
            other = wrong_scene(judge, dataset, scene, wrong, rng)
            if other is None:
                assert wrong == "another style" or (wrong == "swapped" and scene.relation is None)
                continue
            assert (other.background != scene.background) == (wrong == "another background")
            pairs = list(zip(scene.pieces, other.pieces, strict=True))
            if wrong == "another style":
                assert all(a.code == b.code for a, b in pairs)
                assert any(a.style != b.style for a, b in pairs)
            elif wrong == "swapped":
                assert {p.code for p in scene.pieces} == {p.code for p in other.pieces}
                assert any(not judge.same(a, b) for a, b in pairs)
            elif wrong != "another background":
                assert any(not judge.same(a, b) for a, b in pairs)
                assert all(a.style == b.style for a, b in pairs)
            assert [(p.x, p.y, p.side) for p in scene.pieces] == [
                (p.x, p.y, p.side) for p in other.pieces
            ]

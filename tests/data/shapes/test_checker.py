"""The checker of images of shapes: what it must accept, reject, and read."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dalle1.data import shapes
from dalle1.data.shapes import Scene, ShapesSample, Thing
from dalle1.data.shapes import checker as shapes_checker
from dalle1.data.shapes.dataset import MIN_GAP

COUNT = 2000


@pytest.fixture(scope="module")
def samples() -> list[ShapesSample]:
    """Samples of all splits, so that the checker is also tried on held-out pairs."""
    return [shapes.make(11, index, shapes.SPLITS[index % 3]) for index in range(COUNT)]


def full_caption(scene: Scene) -> str:
    """A caption that claims everything there is to claim."""
    names = [f"a {thing.size} {thing.color} {thing.shape}" for thing in scene.things]
    phrase = f" {scene.relation} " if scene.relation else ""
    return f"{phrase.join(names)} on a {scene.background} background"


def box_blur(image: np.ndarray) -> np.ndarray:
    """The mean of 3x3 pixels, the edge repeated."""
    side = len(image)
    padded = np.pad(image.astype(np.float64), ((1, 1), (1, 1), (0, 0)), mode="edge")
    shifts = itertools.product(range(3), repeat=2)
    blurred: np.ndarray = np.mean([padded[i : i + side, j : j + side] for i, j in shifts], axis=0)
    return blurred


def degrade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur and noise such as a discrete VAE leaves."""
    noisy = box_blur(image) + rng.normal(0, 6, image.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def fits(scene: Scene) -> bool:
    """Whether things are inside the image and apart along one axis."""
    inside = all(
        thing.extent <= min(thing.x, thing.y) and max(thing.x, thing.y) <= 1 - thing.extent
        for thing in scene.things
    )
    if len(scene.things) == 1:
        return inside
    first, second = scene.things
    reach = first.extent + second.extent + MIN_GAP
    return inside and max(abs(first.x - second.x), abs(first.y - second.y)) >= reach


# Each of these breaks one attribute of a scene, or gives None where it cannot.


def other_color(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """One thing in another color."""
    thing, *rest = scene.things
    color = str(rng.choice([name for name in shapes.COLORS if name != thing.color]))
    return replace(scene, things=(replace(thing, color=color), *rest))


def other_shape(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """One thing of another shape."""
    *rest, thing = scene.things
    wrong = replace(
        scene,
        things=(
            *rest,
            replace(thing, shape=str(rng.choice([s for s in shapes.SHAPES if s != thing.shape]))),
        ),
    )
    return wrong if fits(wrong) else None


def other_size(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """One thing of the other size."""
    thing, *rest = scene.things
    size = "small" if thing.size == "big" else "big"
    radius = shapes.SIZES[size] * rng.uniform(0.95, 1.05)
    wrong = replace(scene, things=(replace(thing, size=size, radius=radius), *rest))
    return wrong if fits(wrong) else None


def other_relation(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """The two things turned by half a turn, or mirrored at the diagonal."""
    if scene.relation is None:
        return None
    first, second = scene.things
    if rng.random() < 0.5:
        things = (replace(first, x=first.y, y=first.x), replace(second, x=second.y, y=second.x))
    else:
        things = (
            replace(first, x=1 - first.x, y=1 - first.y),
            replace(second, x=1 - second.x, y=1 - second.y),
        )
    return replace(scene, things=things)


def other_background(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """The same things on another background."""
    others = [name for name in shapes.BACKGROUNDS if name != scene.background]
    return replace(scene, background=str(rng.choice(others)))


def other_count(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """One thing too few or too many."""
    if len(scene.things) == 2 and rng.random() < 0.5:
        return replace(scene, things=scene.things[:1], relation=None)
    # A small extra thing of a random look in some free corner.
    color, shape = str(rng.choice(list(shapes.COLORS))), str(rng.choice(shapes.SHAPES))
    for x, y in itertools.product((0.16, 0.84), repeat=2):
        extra = Thing(color, shape, "small", x, y, shapes.SIZES["small"])
        if all(fits(replace(scene, things=(thing, extra))) for thing in scene.things):
            return replace(scene, things=(*scene.things, extra))
    return None


def exchanged_colors(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """The two things with each other's colors."""
    if scene.relation is None:
        return None
    first, second = scene.things
    if first.color == second.color or first.shape == second.shape:
        return None
    things = replace(first, color=second.color), replace(second, color=first.color)
    return replace(scene, things=things)


FAULTS: dict[str, Callable[[Scene, np.random.Generator], Scene | None]] = {
    "color": other_color,
    "shape": other_shape,
    "size": other_size,
    "relation": other_relation,
    "background": other_background,
    "count": other_count,
    "exchanged": exchanged_colors,
}


def test_right_images_are_accepted(samples: list[ShapesSample]) -> None:
    """A checker that misses true images, which would hide what a model can do."""
    short = [shapes_checker.check(s.image, s.caption).ok for s in samples]
    full = [shapes_checker.check(s.image, full_caption(s.scene)).ok for s in samples[::4]]
    assert np.mean(short) >= 0.99
    assert np.mean(full) >= 0.99


def test_blurred_and_noisy_images_are_accepted(samples: list[ShapesSample]) -> None:
    """A checker that only knows the renderer's own pixels and fails on a decoder's."""
    rng = np.random.default_rng(0)
    accepted = [shapes_checker.check(degrade(s.image, rng), s.caption).ok for s in samples]
    assert np.mean(accepted) >= 0.97


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_images_are_rejected(samples: list[ShapesSample], fault: str) -> None:
    """A checker that lets one kind of mistake pass, which would flatter every model."""
    rng = np.random.default_rng(1)
    rejected, named = [], []
    for number, sample in enumerate(samples):
        wrong = FAULTS[fault](sample.scene, rng)
        if wrong is None:
            continue
        image = shapes.render(wrong)
        if number % 2:
            image = degrade(image, rng)
        verdict = shapes_checker.check(image, full_caption(sample.scene))
        rejected.append(not verdict.ok)
        named.append(not verdict.attributes.get(fault, True))
        assert verdict.ok == (verdict.reason == "")
        if len(rejected) == 300:
            break
    assert len(rejected) == 300
    assert np.mean(rejected) >= 0.99
    if fault != "exchanged":  # either the colors or the shapes may be called wrong there
        assert np.mean(named) >= 0.97


@pytest.mark.parametrize("side", [16, 24, 64, 256])
def test_checker_works_at_any_side(side: int) -> None:
    """Lengths in pixels where fractions of the side are meant."""
    for index in range(60):
        sample = shapes.make(5, index, side=side)
        verdict = shapes_checker.check(Image.fromarray(sample.image), sample.caption)
        assert verdict.ok, verdict.reason
        as_float = (sample.image / 255).astype(np.float32)
        assert shapes_checker.check(as_float, sample.caption).ok


def test_odd_images_do_not_pass() -> None:
    """Taking a blank image, noise, a cut-off or a holed shape for the real thing."""
    caption = "a red circle"
    rng = np.random.default_rng(2)
    assert not shapes_checker.check(np.full((32, 32, 3), 245, np.uint8), caption).ok
    for _ in range(50):
        noise = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        assert not shapes_checker.check(noise, caption).ok

    def circle(x: float) -> np.ndarray:
        thing = Thing("red", "circle", "big", x, 0.5, shapes.SIZES["big"])
        return shapes.render(Scene((thing,), None, "white"))

    assert shapes_checker.check(circle(0.5), caption).ok
    assert not shapes_checker.check(circle(0.0), caption).ok
    holed = circle(0.5)
    holed[13:19, 13:19] = 245
    assert not shapes_checker.check(holed, caption).ok
    two_colored = circle(0.5)
    two_colored[:, 16:] = shapes.render(
        Scene((Thing("blue", "circle", "big", 0.5, 0.5, shapes.SIZES["big"]),), None, "white")
    )[:, 16:]
    assert not shapes_checker.check(two_colored, caption).ok


def test_specks_are_overlooked_and_blots_are_not() -> None:
    """A stray pixel that counts as an object, or an extra object that does not."""
    thing = Thing("blue", "square", "small", 0.7, 0.7, shapes.SIZES["small"])
    image = shapes.render(Scene((thing,), None, "black"))
    image[4:6, 4:6] = shapes.COLORS["yellow"]
    assert shapes_checker.check(image, "a blue square").ok
    image[4:7, 4:7] = shapes.COLORS["yellow"]
    verdict = shapes_checker.check(image, "a blue square")
    assert not verdict.ok
    assert verdict.attributes == {"count": False, "color": True, "shape": True}


def test_parse_inverts_describe() -> None:
    """A caption that is untrue, or one that the checker reads otherwise than it was meant."""
    rng = np.random.default_rng(4)
    tally: Counter[str] = Counter()
    captions = set()
    for _ in range(4000):
        scene = shapes.draw_scene(rng)
        caption = shapes.describe(scene, rng)
        captions.add(caption)
        assert len(caption.split()) <= shapes.MAX_WORDS
        claims = shapes_checker.parse(caption)
        things, relation = list(scene.things), scene.relation
        if relation is not None and claims.relation != relation:
            things.reverse()
            relation = shapes.OPPOSITE[relation]
        assert claims.relation == relation
        assert claims.background in (None, scene.background)
        assert len(claims.objects) == len(things)
        for said, thing in zip(claims.objects, things, strict=True):
            assert (said.color, said.shape) == (thing.color, thing.shape)
            assert said.size in (None, thing.size)
            tally["things"] += 1
            tally["unsized"] += said.size is None
        tally["single"] += len(things) == 1
        tally["background"] += claims.background is not None
    assert 0.22 < tally["unsized"] / tally["things"] < 0.28
    assert 0.27 < tally["single"] / 4000 < 0.33
    assert 0.17 < tally["background"] / 4000 < 0.23
    assert len(captions) > 3000


def test_parse_reads_each_part() -> None:
    """A reader that agrees with the writer only because both have the same fault."""
    claims = shapes_checker.parse("The tiny RED circle is to the left of the blue cross.")
    assert claims.objects == (
        shapes_checker.ObjectClaim("red", "circle", "small"),
        shapes_checker.ObjectClaim("blue", "cross", None),
    )
    assert (claims.relation, claims.background) == ("left of", None)
    claims = shapes_checker.parse("an orange square on a grey background")
    assert (claims.relation, claims.background) == (None, "grey")
    assert shapes_checker.parse("a pink cross under a red cross").relation == "below"


@pytest.mark.parametrize(
    "caption", ["", "a red dog", "circle red", "a red circle near a blue cross", "a red circle a"]
)
def test_parse_refuses_other_language(caption: str) -> None:
    """A caption half understood, whose unread half would never be checked."""
    with pytest.raises(ValueError, match="caption"):
        shapes_checker.parse(caption)


def test_unfit_images_are_named() -> None:
    """An image in the wrong layout or range that is accepted all the same, as blank or white."""
    with pytest.raises(ValueError, match=r"\[32, 16, 3\]"):
        shapes_checker.detect(np.zeros((32, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="16 pixels"):
        shapes_checker.detect(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        shapes_checker.detect(np.full((32, 32, 3), 200.0))
    with pytest.raises(ValueError, match="int64"):
        shapes_checker.detect(np.zeros((32, 32, 3), np.int64))

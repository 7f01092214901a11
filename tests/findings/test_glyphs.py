"""Images of one glyph: pairs, captions, and what the reader says of images."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dalle1.findings.glyphs import (
    PLACES,
    GlyphSettings,
    draw_images,
    encode_captions,
    glyphs,
    pairs_of,
    palette,
    read_images,
)


@pytest.mark.parametrize(("colors", "shapes", "held_out"), [(8, 32, 1), (8, 4, 1), (4, 8, 2)])
def test_what_is_held_out_is_never_shown(colors: int, shapes: int, held_out: int) -> None:
    """A held-out pair in training; a color or a shape that training never shows."""
    settings = GlyphSettings(colors=colors, shapes=shapes, held_out=held_out)
    seen, unseen = ({*map(tuple, pairs_of(settings, out).tolist())} for out in (False, True))
    assert not seen & unseen and len(seen | unseen) == colors * shapes
    assert Counter(shape for _, shape in unseen) == dict.fromkeys(range(shapes), held_out)
    for part, count in ((0, colors), (1, shapes)):
        assert {pair[part] for pair in seen} == set(range(count))


@pytest.mark.parametrize("shades", [1, 3])
def test_true_images_are_read_as_what_they_show(shades: int) -> None:
    """A reader that rejects true images, or that reads a shade as a color."""
    settings = GlyphSettings(colors=5, shapes=40, shades=shades)
    pairs = np.concatenate([pairs_of(settings, out) for out in (False, True)])
    images = draw_images(settings, pairs, np.random.default_rng(0))
    assert images.shape == (200, 3, 8, 8)
    assert (read_images(settings, images) == pairs).all()


def test_wrong_images_are_not_read_as_right() -> None:
    """A glyph with a wrong pixel, or with a pixel of another color, that counts as right."""
    settings = GlyphSettings(colors=3, shapes=6)
    pairs = np.array([[1, 2]])
    image = draw_images(settings, pairs, np.random.default_rng(1))
    y, x = np.argwhere(image[0].sum(0).numpy() > 0)[0]
    gone, other = image.clone(), image.clone()
    gone[0, :, y, x] = 0
    other[0, :, y, x] = torch.from_numpy(palette(settings)[1])  # of color 0
    assert (read_images(settings, gone) == [[1, -1]]).all()
    assert (read_images(settings, other) == [[-1, 2]]).all()
    assert (read_images(settings, torch.zeros(1, 3, 8, 8)) == [[-1, -1]]).all()


def test_shapes_are_told_apart_at_all_places() -> None:
    """Two shapes that are the same pixels at different places, of which one is never right."""
    seen = set()
    for glyph in glyphs(200):
        for y, x in PLACES:
            image = np.zeros((8, 8), bool)
            image[y : y + 4, x : x + 4] = glyph
            seen.add(image.tobytes())
    assert len(seen) == 200 * len(PLACES)
    assert (glyphs(10) == glyphs(200)[:10]).all()  # more shapes are the same and others


def test_captions_say_color_and_shape() -> None:
    """Colors and shapes that share a token, or a padding that is a word."""
    settings = GlyphSettings(colors=8, shapes=4)
    pairs = np.concatenate([pairs_of(settings, out) for out in (False, True)])
    text = encode_captions(settings, pairs)
    assert len({*map(tuple, text.tolist())}) == 32
    assert set(text[:, 0].tolist()) == set(range(1, 9))
    assert set(text[:, 1].tolist()) == set(range(9, 13))
    assert set(text[:, 2].tolist()) == {settings.text_vocab + 2}


def test_no_color_of_a_shape_may_be_held_out_entirely() -> None:
    """A shape that training never shows, whose pairs no model can draw."""
    with pytest.raises(ValidationError, match="held_out: expected less than 4, got 4"):
        GlyphSettings(colors=4, held_out=4)

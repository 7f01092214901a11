"""What users hand to `sample`, `rank` and a model: read as a person expects, or refused at once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import dalle1
from dalle1 import CLIP, Model
from dalle1.common.images import to_tensor
from dalle1.generation.generator import Generator
from dalle1.generation.options import SamplingOptions, candidate_uniforms
from tests.conftest import ModelMaker

CAPTION = "a red cat"
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
IMAGES = torch.stack([to_tensor(image) for image in PIXELS])


def sample(model: Model, captions: Any = CAPTION, **settings: Any) -> dalle1.Result:
    settings = {"candidates": 4, "keep": 2, "progress": False, **settings}
    return dalle1.sample(captions, model=model, **settings)


@pytest.fixture
def _nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(*_: object) -> Tensor:
        raise AssertionError("drawn before the arguments were checked")

    monkeypatch.setattr(Generator, "draw", draw)


# Numbers and captions.


NUMBERS: list[dict[str, Any]] = [
    {"seed": np.int64(3)},
    {"seed": 3.0},
    {"seed": torch.tensor(3)},
    {"candidates": np.uint8(4), "keep": np.int16(2), "seed": np.array(3)},
    {"candidates": 4.0, "keep": torch.tensor(2), "seed": 3},
    {"temperature": np.float32(1), "guidance": np.float64(1), "seed": 3},
    {"temperature": torch.tensor(1.0), "guidance": 1, "seed": 3},
    {"batch_size": np.int64(3), "preview_rows": np.int64(2), "rows": np.int64(0), "seed": 3},
]


@pytest.mark.parametrize("settings", NUMBERS, ids=str)
def test_numbers_of_numpy_and_torch(model: Model, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Images of another seed for np.int64(3), or images written and `result.json` not."""
    result = sample(model, **settings)
    assert torch.equal(result.tokens, sample(model, seed=3).tokens)
    result.save(tmp_path)
    content = json.loads((tmp_path / "result.json").read_text())["settings"]
    assert (content["seed"], content["candidates"], content["keep"]) == (3, 4, 2)
    assert content["temperature"] == content["guidance"] == 1


def test_options_of_numpy_and_torch(model: Model) -> None:
    """A top_k or top_p that only some libraries' numbers can be."""
    expected = sample(model, top_k=3, top_p=0.5, guidance=1.5, temperature=0.5)
    found = sample(
        model,
        top_k=np.int32(3),
        top_p=np.float64(0.5),
        guidance=torch.tensor(1.5),
        temperature=np.float16(0.5),
    )
    assert torch.equal(found.tokens, expected.tokens)
    assert found.settings == expected.settings
    options = SamplingOptions(np.float32(0.5), np.int64(3), torch.tensor(0.5))  # type: ignore[arg-type]
    assert options == SamplingOptions(0.5, 3, 0.5) and hash(options) == hash(
        SamplingOptions(0.5, 3, 0.5)
    )
    numbers = candidate_uniforms(np.int64(3), np.str_("x"), np.int64(0), 2, 4)  # type: ignore[arg-type]
    assert torch.equal(numbers, candidate_uniforms(3, "x", 0, 2, 4))
    caption = model.complete_caption("a", top_k=np.int64(2), seed=np.int64(3))  # type: ignore[arg-type]
    assert caption == model.complete_caption("a", top_k=2, seed=3)


COUNTS = (
    *("seed", "candidates", "keep", "batch_size", "top_k", "preview_rows", "rows"),
    "first_candidate",
)


@pytest.mark.usefixtures("_nothing_is_drawn")
@pytest.mark.parametrize("value", [True, np.False_, 1.5, "4", None, [4], math.nan], ids=repr)
def test_what_is_no_number_is_refused_before_drawing(model: Model, value: Any) -> None:
    """keep=True taken for 1, or a TypeError that names no argument."""
    for name in COUNTS:
        if value is None and name in ("batch_size", "top_k"):
            continue
        with pytest.raises(ValueError, match=f"{name}: expected a whole number, got"):
            sample(model, **{name: value})
    if isinstance(value, float):
        return
    for name in ("temperature", "guidance", "top_p"):
        if value is not None or name != "top_p":
            with pytest.raises(ValueError, match=f"{name}: expected a number, got"):
                sample(model, **{name: value})
    with pytest.raises(ValueError, match="seed: expected a whole number"):
        model.complete_caption("a", seed=value)


@pytest.mark.usefixtures("_nothing_is_drawn")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_step": 3}, "on_step: expected a function, got int"),
        ({"model": 3}, "model: expected a Model or its folder, got int"),
        ({"captions": b"a cat"}, "captions: expected a string or a list"),
        ({"captions": ["a cat", None]}, "caption: expected text, got None"),
        ({"captions": ["a cat", "\ud83d"]}, "caption: expected text"),
        ({"captions": {"a cat": 1}}, "captions: expected"),
        ({"captions": np.array(["a", ""])}, "caption: expected text, got ''"),
    ],
)
def test_other_slips_are_refused_before_drawing(
    model: Model, settings: dict[str, Any], message: str
) -> None:
    """A mistake that shows when the first row is done, or at the second caption."""
    with pytest.raises(ValueError, match=message):
        dalle1.sample(**{"captions": CAPTION, "model": model, "progress": False, **settings})


@pytest.mark.parametrize(
    "captions",
    [
        np.array([CAPTION, "the blue dog"]),
        np.array([CAPTION, "the blue dog"], dtype=object),
        (CAPTION, "the blue dog"),
        [np.str_(CAPTION), np.str_("the blue dog")],
        (x for x in (CAPTION, "the blue dog")),
    ],
)
def test_captions_of_any_kind(model: Model, tmp_path: Path, captions: Any) -> None:
    """Captions in a NumPy array: the images are written, `result.json` is not."""
    result = sample(model, captions)
    assert torch.equal(result.tokens, sample(model, [CAPTION, "the blue dog"]).tokens)
    result.save(tmp_path)
    content = json.loads((tmp_path / "result.json").read_text())["results"]
    assert [entry["caption"] for entry in content] == [CAPTION, "the blue dog"]


@pytest.mark.filterwarnings("ignore:caption has")
@pytest.mark.parametrize(
    "caption",
    ["a\0cat", "\u202ea cat", "x" * 3000, "/", "..", "a\ncat\r\n\tb", "\ufeffa", "👩‍👩‍👧"],
)
def test_saving_never_fails(model: Model, tmp_path: Path, caption: str) -> None:
    """Hours of drawing that end in an error of a file's name, of a font or of JSON."""
    result = sample(model, caption)
    result.scores[0, 0] = math.inf
    result.settings |= {"note": np.int64(3), "array": np.arange(2), "tensor": torch.ones(2)}
    result.settings |= {"path": tmp_path, "object": object()}

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    result.save(tmp_path)
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    content = json.loads(text, parse_constant=refuse)
    assert content["results"][0]["caption"] == caption
    assert content["results"][0]["scores"][0] is None
    assert content["settings"]["note"] == 3 and content["settings"]["array"] == [0, 1]


def test_tokens_of_any_type(model: Model) -> None:
    """Tokens of a NumPy array refused as "expected int64, got int64", or many texts for one."""
    tokens = np.random.default_rng(0).integers(0, 5, (2, 4, 4))
    expected = model.log_prob(CAPTION, torch.from_numpy(tokens))
    for found in (tokens, tokens.astype(np.uint8), torch.from_numpy(tokens).int(), tokens.tolist()):
        assert torch.equal(model.log_prob(np.str_(CAPTION), found), expected)
    for wrong in (tokens > 2, tokens / 2, "abc", None, [[1], [1, 2]], tokens[:0]):
        with pytest.raises(ValueError, match="image_tokens: expected"):
            model.log_prob(CAPTION, wrong)
    for caption in ([CAPTION], [CAPTION, CAPTION], None, 3):
        with pytest.raises(ValueError, match="caption: expected text"):
            model.log_prob(caption, torch.from_numpy(tokens))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="text: expected text"):
            model.complete_caption(caption)  # type: ignore[arg-type]


# Images.


def test_a_list_of_captions_gives_a_row_each(model: Model, make_model: ModelMaker) -> None:
    """The first caption's scores alone, or a caption read letter by letter."""
    captions = [CAPTION, "the blue dog"]
    rows = [dalle1.rank(caption, IMAGES, model) for caption in captions]
    assert rows[0].shape == (3,) and not torch.equal(rows[0], rows[1])
    for several in (captions, tuple(captions), np.array(captions), iter(captions)):
        found = dalle1.rank(several, IMAGES, model)
        assert found.shape == (2, 3)
        torch.testing.assert_close(found, torch.stack(rows))
    assert dalle1.rank([CAPTION], IMAGES, model).shape == (1, 3)
    assert dalle1.rank(np.str_(CAPTION), IMAGES, model).shape == (3,)
    clip = model.ranker
    assert isinstance(clip, CLIP)
    torch.testing.assert_close(clip.score(CAPTION, IMAGES), rows[0][None])
    torch.testing.assert_close(clip.embed_captions(CAPTION), clip.embed_captions([CAPTION]))
    assert clip.classify(IMAGES, "a cat").shape == (3, 1)


def test_images_of_any_kind_are_ranked(model: Model, tmp_path: Path) -> None:
    """A path, an array or an image alone that ends in an AttributeError."""
    expected = dalle1.rank(CAPTION, IMAGES, model)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, pixels in zip(paths, PIXELS, strict=True):
        Image.fromarray(pixels).save(path)
    several: list[Any] = [
        *(paths, [str(path) for path in paths], tuple(paths), tmp_path.glob("*.png")),
        *(PIXELS, list(PIXELS), PIXELS / 255, IMAGES, IMAGES.double(), list(IMAGES)),
        [Image.fromarray(pixels) for pixels in PIXELS],
        [paths[0], PIXELS[1], IMAGES[2]],
    ]
    for images in several:
        if not isinstance(images, list | tuple | np.ndarray | Tensor):  # a glob has no order
            images = sorted(images)
        found = dalle1.rank(CAPTION, images, model)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for one in (
        paths[1],
        str(paths[1]),
        PIXELS[1],
        PIXELS[1] / 255,
        IMAGES[1],
        Image.open(paths[1]),
    ):
        for caption, shape in ((CAPTION, (1,)), ([CAPTION], (1, 1))):
            found = dalle1.rank(caption, one, model)
            assert found.shape == shape
            torch.testing.assert_close(found.flatten(), expected[1:2], rtol=1e-4, atol=1e-5)
    assert dalle1.rank(CAPTION, [PIXELS[0], PIXELS[1, :3], PIXELS[2, ..., 0]], model).shape == (3,)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "images: expected a PIL image, .*got NoneType"),
        (7, "got int"),
        ([[Image.fromarray(PIXELS[0])]], r"images\[0\]: .*got list"),
        ("gone.png", "image gone.png: cannot be read"),
        (PIXELS.astype(np.int32), "got an array of int32"),
        (2 * IMAGES - 1, r"from \[-1, 1\]"),
        (255 * IMAGES, r"from \[0, 255\]"),
        ((IMAGES - 0.48) / 0.27, "before they are normalized"),
        (IMAGES * math.nan, "NaN"),
        ([IMAGES[0], IMAGES[1] * math.inf], r"images\[1\]: .*inf|images\[1\]: .*NaN"),
        (PIXELS / 127.5 - 1, r"from \[-1, 1\]"),
    ],
)
def test_what_cannot_be_ranked_is_refused(
    model: Model, make_model: ModelMaker, images: Any, message: str
) -> None:
    """Images of another range that get scores without a word, or a puzzling error."""
    with pytest.raises(ValueError, match=message):
        dalle1.rank(CAPTION, images, model)
    if isinstance(images, Tensor):
        clip = model.ranker
        assert isinstance(clip, CLIP)
        for method in (clip.encode_image, clip.embed_images, lambda x: clip.score([CAPTION], x)):
            with pytest.raises(ValueError, match=message):
                method(images)


def test_a_ranker_of_our_own_gets_no_bad_images(make_model: ModelMaker) -> None:
    """A check that is CLIP's alone."""

    class Mean:
        def score(self, captions: list[str], images: Tensor) -> Tensor:
            return images.mean(dim=(1, 2, 3)).expand(len(captions), -1)

    model = make_model(clip=False)
    model.ranker = Mean()
    torch.testing.assert_close(model.rank(CAPTION, PIXELS), IMAGES.mean(dim=(1, 2, 3)))
    with pytest.raises(ValueError, match="images: expected floats"):
        model.rank(CAPTION, 255 * IMAGES)


def test_an_image_to_complete_of_any_kind(model: Model, tmp_path: Path) -> None:
    """A path or an array to complete that is refused, or read with its channels exchanged."""
    path = tmp_path / "x.png"
    Image.fromarray(PIXELS[0]).save(path)
    expected = sample(model, image=Image.fromarray(PIXELS[0]), rows=2).tokens
    for image in (path, str(path), PIXELS[0], PIXELS[:1], PIXELS[0] / 255, IMAGES[0], IMAGES[:1]):
        assert torch.equal(sample(model, image=image, rows=np.int64(2)).tokens, expected)
    assert sample(model, image=PIXELS[0, ..., 0], rows=1).tokens.shape == (1, 2, 4, 4)


@pytest.mark.usefixtures("_nothing_is_drawn")
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS, "image: expected one image, got 3"),
        (IMAGES, "image: expected one image, got 3"),
        (PIXELS[0, :6], "image: expected 8x8 pixels, got 8x6"),
        (IMAGES[0, :, :, :5], "image: expected 8x8 pixels, got 5x8"),
        (2 * IMAGES[0] - 1, r"image: expected floats .*from \[-1, 1\]"),
        (PIXELS[0].astype(float), r"image: expected floats .*from \[0, 255\]"),
        (IMAGES[0] * math.nan, "image: .*NaN"),
        ("gone.png", "image gone.png: cannot be read"),
        (3, "image: expected a PIL image, .*got int"),
        ((255 * IMAGES[0]).to(torch.uint8), "image: .*uint8.*divide by 255"),
    ],
)
def test_what_cannot_be_completed_is_refused(model: Model, image: Any, message: str) -> None:
    """An image of another range that is completed, or a traceback after the drawing began."""
    with pytest.raises(ValueError, match=message):
        sample(model, image=image, rows=2)

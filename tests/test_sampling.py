"""`dalle1.sample` and `dalle1.rank`: what they return, keep, refuse and write."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import dalle1
from dalle1 import CLIP, Model, models
from dalle1.common.images import to_rgb
from dalle1.common.png_settings import read_png_settings
from dalle1.generation.generator import Generator
from dalle1.model import load
from dalle1.sampling import Preview
from tests.conftest import ModelMaker

CAPTION = "a red cat"


def sample(model: Model, captions: str | list[str] = CAPTION, **settings: Any) -> dalle1.Result:
    settings = {"candidates": 6, "keep": 3, "progress": False, **settings}
    return dalle1.sample(captions, model=model, **settings)


def random_image(seed: int = 0, side: int = 8) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_result(model: Model) -> None:
    """A result of other shapes or types than the contract's."""
    result = sample(model, ["a red cat", "the blue dog"])
    assert result.captions == ["a red cat", "the blue dog"]
    assert [len(row) for row in result.images] == [3, 3]
    for image in (x for row in result.images for x in row):
        assert (image.size, image.mode) == ((8, 8), "RGB")
    assert result.tokens.shape == (2, 3, 4, 4) and result.tokens.dtype == torch.int64
    assert result.scores.shape == (2, 3) and result.scores.dtype == torch.float32
    assert bool((result.scores.abs() <= 1 + 1e-6).all())
    assert sample(model).tokens.shape == (1, 3, 4, 4)  # a caption alone is a list of one


def test_images_are_the_tokens(model: Model) -> None:
    """Images in another order than their tokens and scores, or transposed."""
    result = sample(model, ["a red cat", "the blue dog"])
    for i, caption in enumerate(result.captions):
        for image, tokens in zip(result.images[i], result.tokens[i], strict=True):
            pixels = model.dvae.decode(tokens[None])[0].permute(1, 2, 0).numpy()
            assert np.abs(np.asarray(image) - 255 * pixels).max() <= 0.51
        exact = model.dvae.decode(result.tokens[i])
        torch.testing.assert_close(
            dalle1.rank(caption, exact, model=model), result.scores[i], rtol=1e-4, atol=1e-5
        )


def test_best_first(model: Model) -> None:
    """The worst candidates kept, or the best in another order."""
    every = sample(model, candidates=12, keep=12)
    scores = every.scores[0].tolist()
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1]
    best = sample(model, candidates=12, keep=4)
    assert torch.equal(best.tokens[0], every.tokens[0, :4])
    assert torch.equal(best.scores[0], every.scores[0, :4])
    few = {tuple(t.flatten().tolist()) for t in sample(model, candidates=5, keep=5).tokens[0]}
    assert few < {tuple(t.flatten().tolist()) for t in every.tokens[0]}


@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_draws_depend_on_seed_and_caption_alone(model: Model, batch_size: int | None) -> None:
    """Images that change with the batch size or with the captions beside them."""
    both = sample(model, ["a blue dog", CAPTION], batch_size=batch_size)
    alone = sample(model, CAPTION)
    assert torch.equal(both.tokens[1], alone.tokens[0])
    assert not torch.equal(sample(model, seed=1).tokens, alone.tokens)
    state = torch.get_rng_state()
    sample(model)
    assert torch.equal(torch.get_rng_state(), state)  # nor do they touch the global generator


def test_options_reach_the_draw(model: Model) -> None:
    """A keyword that does nothing."""
    greedy = sample(model, temperature=0.0).tokens[0]
    assert len(greedy.unique(dim=0)) == 1
    assert torch.equal(sample(model, top_k=1).tokens[0], greedy)
    assert torch.equal(sample(model, top_p=1e-6).tokens[0], greedy)
    assert not torch.equal(sample(model, guidance=3.0).tokens, sample(model).tokens)


def test_without_clip(make_model: ModelMaker) -> None:
    """A model without CLIP that keeps some as if it had ranked them."""
    model = make_model(clip=False)
    with pytest.raises(ValueError, match=r"no ranker.*keep = candidates = 6"):
        sample(model)
    result = sample(model, keep=6)
    assert result.tokens.shape == (1, 6, 4, 4)
    assert bool(result.scores.isnan().all()) and result.scores.shape == (1, 6)
    assert torch.equal(sample(model, candidates=2, keep=2).tokens[0], result.tokens[0, :2])
    with pytest.raises(ValueError, match="no ranker"):
        dalle1.rank(CAPTION, [random_image()], model=model)


@pytest.mark.parametrize(
    ("captions", "settings", "message"),
    [
        (CAPTION, {"keep": 7}, "keep: expected 1 to candidates = 6, got 7"),
        (CAPTION, {"keep": 0}, "keep: .*got 0"),
        (CAPTION, {"candidates": 0, "keep": 0}, "candidates: expected at least 1, got 0"),
        (CAPTION, {"batch_size": 0}, "batch_size: .*got 0"),
        (CAPTION, {"temperature": -1.0}, "temperature: .*got -1"),
        (CAPTION, {"top_k": 0}, "top_k: .*got 0"),
        (CAPTION, {"top_p": 1.5}, "top_p: .*got 1.5"),
        (CAPTION, {"guidance": math.nan}, "guidance: .*got nan"),
        ("", {}, "caption: expected text, got ''"),
        ([CAPTION, " "], {}, "caption: expected text"),
        ([], {}, "captions: expected at least one"),
        (CAPTION, {"rows": 2}, "rows: 2 rows of which image"),
        (CAPTION, {"image": random_image()}, "rows: expected 1 to 3 of the 4 token rows, got 0"),
        (CAPTION, {"image": random_image(), "rows": 4}, "rows: .*got 4"),
        (CAPTION, {"image": random_image(), "rows": -1}, "rows: .*got -1"),
        (
            CAPTION,
            {"image": random_image(side=9), "rows": 2},
            "image: expected 8x8 pixels, got 9x9",
        ),
    ],
)
def test_errors_before_anything_is_drawn(
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    captions: str | list[str],
    settings: dict[str, Any],
    message: str,
) -> None:
    """A mistake that shows only after an hour of drawing, or without the setting's name."""

    def draw(*_: object) -> Tensor:
        raise AssertionError("drawn before the arguments were checked")

    monkeypatch.setattr(Generator, "draw", draw)
    with pytest.raises(ValueError, match=message):
        sample(model, captions, **settings)


@pytest.mark.parametrize("part", ["prior", "codec", "ranker"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(make_model: ModelMaker, part: str, value: float) -> None:
    """A diverged model that draws something all the same."""
    broken = make_model()
    weight = list(getattr(broken, part).parameters())[-1]
    with torch.no_grad():
        weight.view(-1)[-1] = value
    with pytest.raises(ValueError, match=rf"{part} \(\w+\): the weight \S+ is not finite"):
        sample(broken)
    with pytest.raises(ValueError, match="not finite"):
        dalle1.rank(CAPTION, [random_image()], model=broken)


def test_unknown_keyword(model: Model) -> None:
    """A misspelled keyword that is swallowed silently."""
    with pytest.raises(TypeError, match="temprature"):
        sample(model, temprature=0.5)
    with pytest.raises(TypeError, match="candidates"):
        dalle1.rank(CAPTION, [random_image()], model=model, candidates=3)  # type: ignore[call-arg]


def test_model_from_the_environment(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model that is not found where DALLE1_MODEL names it, or an error that names nothing."""
    settings: dict[str, Any] = {"candidates": 2, "keep": 2, "progress": False}
    monkeypatch.delenv("DALLE1_MODEL", raising=False)
    monkeypatch.setattr(models, "folder", lambda: tmp_path)  # without those that come along
    with pytest.raises(ValueError, match="DALLE1_MODEL"):
        dalle1.sample(CAPTION, **settings)
    with pytest.raises(ValueError, match="DALLE1_MODEL"):
        dalle1.rank(CAPTION, [random_image()])
    model.save(tmp_path)
    expected = dalle1.sample(CAPTION, model=model, **settings).tokens
    assert torch.equal(dalle1.sample(CAPTION, model=tmp_path, **settings).tokens, expected)
    assert torch.equal(dalle1.sample(CAPTION, model=str(tmp_path), **settings).tokens, expected)
    monkeypatch.setenv("DALLE1_MODEL", str(tmp_path))
    assert torch.equal(dalle1.sample(CAPTION, **settings).tokens, expected)
    monkeypatch.setenv("DALLE1_MODEL", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="gone"):
        dalle1.sample(CAPTION, **settings)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_completion(model: Model, rows: int, mode: str) -> None:
    """First rows that are drawn anew, are the columns, or come from another channel order."""
    image = random_image(3).convert(mode)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255
    given = model.dvae.encode(pixels)[0, :rows]
    result = sample(model, image=image, rows=rows, candidates=8, keep=8)
    assert torch.equal(result.tokens[0, :, :rows], given.expand(8, -1, -1))
    assert len(result.tokens[0, :, rows:].unique(dim=0)) > 1
    assert result.settings["rows"] == rows


@pytest.mark.filterwarnings("ignore:caption has")
def test_save(model: Model, tmp_path: Path) -> None:
    """An image, score or setting that is not written, or a caption that makes a path."""
    captions = ["A red/cat: ../../x?", "the blue dog", "日本"]
    result = sample(model, captions, seed=3, top_k=4)
    folder = tmp_path / "deep" / "out"
    assert result.save(str(folder)) == folder
    content = json.loads((folder / "result.json").read_text())
    expected = {"candidates": 6, "keep": 3, "seed": 3, "top_k": 4, "temperature": 1.0,
                "top_p": None, "guidance": 1.0}  # fmt: skip
    assert expected.items() <= content["settings"].items()
    names = []
    for i, entry in enumerate(content["results"]):
        assert entry["caption"] == captions[i]
        assert entry["scores"] == pytest.approx(result.scores[i].tolist(), abs=1e-6)
        for name, image in zip(entry["files"], result.images[i], strict=True):
            with Image.open(folder / name) as saved:
                assert saved.tobytes() == image.tobytes()
            names.append(name)
    assert len(set(names)) == 9
    assert {p.name for p in folder.iterdir()} == {*names, "sheet.png", "result.json"}
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 3 * 64 and sheet.height > 3 * 64


@pytest.mark.parametrize("clip", [True, False])
def test_candidate_numbers(make_model: ModelMaker, clip: bool) -> None:
    """Numbers of places and not of candidates: another image when one is drawn again."""
    drawing, settings = make_model(clip=clip), {"seed": 2, "temperature": 0.8}
    captions = ["a blue dog", CAPTION]
    result = sample(drawing, captions, candidates=6, keep=6, batch_size=4, **settings)
    numbers = result.candidate_numbers
    assert numbers.shape == (2, 6) and numbers.dtype == torch.int64
    assert [sorted(row) for row in numbers.tolist()] == [list(range(6))] * 2
    assert (numbers[0].tolist() == list(range(6))) is not clip
    for i, caption in enumerate(captions):
        for j, number in enumerate(numbers[i].tolist()):
            one = sample(drawing, caption, candidates=1, keep=1, first_candidate=number, **settings)
            assert torch.equal(one.tokens[0, 0], result.tokens[i, j])
            assert one.candidate_numbers.tolist() == [[number]]


@pytest.mark.parametrize("batch_size", [2, None])
def test_first_candidate_goes_on(model: Model, batch_size: int | None) -> None:
    """Candidates that are drawn twice, or a bar, a preview or a Ctrl-C that counts from 0."""
    every = sample(model, candidates=9, keep=9)
    of = dict(zip(every.candidate_numbers[0].tolist(), every.tokens[0], strict=True))
    seen: list[Preview] = []
    more = sample(
        model,
        candidates=5,
        keep=5,
        first_candidate=4,
        batch_size=batch_size,
        on_step=seen.append,
        progress=True,
    )
    assert sorted(more.candidate_numbers[0].tolist()) == [4, 5, 6, 7, 8]
    for number, tokens in zip(more.candidate_numbers[0].tolist(), more.tokens[0], strict=True):
        assert torch.equal(tokens, of[number])
    assert seen[0].first == 4 and seen[-1].first == (4 if batch_size is None else 8)
    assert more.settings["first_candidate"] == 4 and more.settings["drawn"] == [5]


def test_settings_in_the_pngs(model: Model, tmp_path: Path) -> None:
    """Settings of another image of the result, or scores and numbers that are not its own."""
    captions = ["a blue dog", "日本 cat"]
    result = sample(model, captions, seed=3, top_k=4, guidance=1.5)
    result.save(tmp_path)
    content = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    for i, entry in enumerate(content["results"]):
        assert entry["candidates"] == result.candidate_numbers[i].tolist()
        for j, name in enumerate(entry["files"]):
            found = read_png_settings(tmp_path / name)
            assert found is not None and found["caption"] == captions[i]
            assert found["candidate"] == entry["candidates"][j]
            assert found["score"] == entry["scores"][j]
            expected = {"seed": 3, "top_k": 4, "guidance": 1.5, "candidates": 6, "keep": 3}
            assert expected.items() <= found.items()
            assert found["model"] == model.fingerprint() and found["dtype"] == "float32"


def test_the_fingerprint_tells_models_apart(make_model: ModelMaker, tmp_path: Path) -> None:
    """The same digits for a model that was trained on, or others for a copy of it."""
    one = make_model()
    digits = one.fingerprint()
    assert len(digits) == 16
    one.save(tmp_path)
    assert load(tmp_path).fingerprint() == digits
    assert load(tmp_path, ranker="none").fingerprint() == digits  # what draws is the same
    assert make_model(seed=1).fingerprint() != digits
    for part in (one.prior, one.codec):
        weight = list(part.parameters())[-1]
        with torch.no_grad():
            weight += 1e-3
        assert one.fingerprint() != digits
        digits = one.fingerprint()
    assert one.to("cpu", torch.bfloat16).fingerprint() != digits


def test_save_of_odd_settings(model: Model, tmp_path: Path) -> None:
    """Images that are lost since what a user has put into the settings does not fit a PNG."""
    result = sample(model, keep=1)
    result.settings["seed"] = object()
    with pytest.warns(UserWarning, match="without its settings: .*seed"):
        result.save(tmp_path)
    (path,) = tmp_path.glob("000*.png")
    assert read_png_settings(path) is None
    by_hand = dalle1.Result(["a"], [[random_image()]], result.tokens, result.scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_hand.save(tmp_path / "b")
    assert len(list((tmp_path / "b").glob("*.png"))) == 2


def test_save_without_scores(make_model: ModelMaker, tmp_path: Path) -> None:
    """A NaN in result.json, which is no JSON."""
    sample(make_model(clip=False), keep=6).save(tmp_path)

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    content = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert content["results"][0]["scores"] == [None] * 6


def test_rank_of_sizes_and_modes(model: Model) -> None:
    """Images that must share a size or a mode; scores in another order than the images."""
    sizes = [(8, 8), (16, 16), (30, 11), (7, 40), (1, 1)]
    modes = ["RGB", "RGBA", "L", "P", "1", "CMYK", "LA", "I;16"]
    images = [random_image(i, 40).crop((0, 0, *size)) for i, size in enumerate(sizes)]
    images += [random_image(9, 12).convert("L" if mode == "I;16" else mode) for mode in modes]
    images[-1] = images[-1].convert("I;16")
    scores = dalle1.rank(CAPTION, images, model=model)
    assert scores.shape == (len(images),) and scores.dtype == torch.float32
    assert bool(scores.isfinite().all()) and bool((scores.abs() <= 1 + 1e-6).all())
    assert len(scores.unique()) > len(sizes)
    for image, score in zip(images, scores, strict=True):
        pixels = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)[None] / 255
        one = dalle1.rank(CAPTION, pixels, model=model)
        torch.testing.assert_close(one, score[None], rtol=1e-4, atol=1e-5)


def test_rank_errors(model: Model) -> None:
    """No images, or no caption, answered with an empty or a senseless score."""
    with pytest.raises(ValueError, match="images: expected at least one"):
        dalle1.rank(CAPTION, [], model=model)
    with pytest.raises(ValueError, match="images"):
        dalle1.rank(CAPTION, torch.rand(0, 3, 8, 8), model=model)
    with pytest.raises(ValueError, match="caption: expected text"):
        dalle1.rank("", [random_image()], model=model)
    with pytest.raises(ValueError, match="images: expected floats"):
        dalle1.rank(CAPTION, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), model=model)


def test_loaded_model_moves(model: Model, tmp_path: Path) -> None:
    """A `to` that forgets a part or returns nothing."""
    model.save(tmp_path)
    again = load(tmp_path).to("meta")
    assert isinstance(again, Model) and again.device.type == "meta"
    assert again.clip is not None
    for part in (again.transformer, again.dvae, again.clip):
        assert {p.device.type for p in part.parameters()} == {"meta"}


@pytest.mark.parametrize(("every", "rows"), [(1, [1, 2, 3, 4]), (3, [3, 4]), (9, [4])])
def test_previews(model: Model, every: int, rows: list[int]) -> None:
    """Previews of rows that are not drawn yet, or of other candidates than they say."""
    seen: list[Preview] = []
    result = sample(
        model, candidates=6, keep=6, batch_size=4, on_step=seen.append, preview_rows=every
    )
    assert [(p.first, p.rows) for p in seen] == [(f, r) for f in (0, 3) for r in rows]
    assert all(p.caption == CAPTION and p.images.shape[2:] == (2 * p.rows, 8) for p in seen)
    last = torch.cat([p.images for p in seen if p.rows == 4])
    full = model.dvae.decode(result.tokens[0])
    drawn = {tuple(image.flatten().tolist()) for image in last}
    assert drawn == {tuple(image.flatten().tolist()) for image in full}


def test_ctrl_c_returns_what_is_complete(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished candidates that are thrown away, or half-drawn ones that are kept."""
    full = sample(model, ["a blue dog", CAPTION], candidates=6, keep=2, batch_size=2)
    draw = Generator.draw
    for allowed, counts in ((5, [6, 4]), (4, [6, 2]), (3, [6]), (2, [4])):
        calls = 0

        def interrupted(*arguments: Any, allowed: int = allowed) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise KeyboardInterrupt
            return draw(*arguments)

        monkeypatch.setattr(Generator, "draw", interrupted)
        result = sample(model, ["a blue dog", CAPTION], candidates=6, keep=2, batch_size=2)
        assert result.settings["drawn"] == counts
        assert len(result.captions) == len(result.images) == len(counts)
        if counts[0] == 6:
            assert torch.equal(result.tokens[0], full.tokens[0])
        assert f"stopped: {sum(counts)} of 12 candidates" in capsys.readouterr().err
    for allowed in (0, 1):  # nothing, or fewer than are to be kept
        calls = 0

        def at_once(*arguments: Any, allowed: int = allowed) -> torch.Tensor:
            return interrupted(*arguments, allowed=allowed)

        monkeypatch.setattr(Generator, "draw", at_once)
        with pytest.raises(KeyboardInterrupt):
            sample(model, keep=3, batch_size=2)


def test_ctrl_c_while_ranking(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions that were done, lost because Ctrl-C came while the next was ranked."""
    assert isinstance(model.ranker, CLIP)
    score, calls = model.ranker.score, []

    def interrupted(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(model.ranker, "score", interrupted)
    result = sample(model, ["a blue dog", CAPTION])
    assert result.captions == ["a blue dog"] and result.settings["drawn"] == [6]
    with pytest.raises(KeyboardInterrupt):
        sample(model)


def test_complete_caption(model: Model) -> None:
    """A caption that does not begin as asked, changes with each call, or ignores its options."""
    captions = {model.complete_caption("A red", seed=s) for s in range(8)}
    assert len(captions) > 2 and all(c.startswith("a red") for c in captions)
    assert model.complete_caption("a red", seed=3) == model.complete_caption("a red", seed=3)
    greedy = {model.complete_caption("a red", seed=s, temperature=0) for s in range(4)}
    assert len(greedy) == 1 and greedy == {model.complete_caption("a red", top_k=1)}
    assert isinstance(model.complete_caption(seed=1), str)
    with pytest.raises(ValueError, match="leave no room in the 10 text positions"):
        model.complete_caption("one small mat a red cat on the blue dog a")

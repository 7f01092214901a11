"""Results and previews in notebooks: what a cell shows, and how much of it."""

from __future__ import annotations

import base64
import io
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dalle1
from dalle1 import Model, Preview, Result
from dalle1.common.png_settings import read_png_settings
from dalle1.generation.notebook import MAX_PIXELS, PreviewCell

CAPTION = "a red cat"
PNG = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def in_html(page: str) -> list[bytes]:
    return [base64.b64decode(found) for found in PNG.findall(page)]


def made(captions: int, images: int, side: int = 8, caption: str = CAPTION) -> Result:
    """A result of noise, which no PNG packs."""
    noise = np.random.default_rng(0)
    drawn = [
        [Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8))] * images
        for _ in range(captions)
    ]
    scores = torch.arange(captions * images).view(captions, images) / 8
    tokens = torch.zeros(captions, images, 2, 2, dtype=torch.int64)
    return Result([f"{caption} {i}" for i in range(captions)], drawn, tokens, scores)


class Display:
    """What IPython's `display` gives to a notebook: the contents of one cell, one after another."""

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def __call__(self, content: dict[str, str], raw: bool, display_id: bool) -> Display:
        assert raw and display_id and not self.shown  # once; then it is updated
        self.shown.append(content)
        return self

    def update(self, content: dict[str, str], raw: bool) -> None:
        assert raw
        self.shown.append(content)

    def images(self) -> list[Image.Image]:
        return [opened(base64.b64decode(content["image/png"])) for content in self.shown]


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Display:
    """The kernel of a notebook, as far as we ask it."""
    display, shell = Display(), SimpleNamespace(kernel=object())
    ipython, inner = ModuleType("IPython"), ModuleType("IPython.display")
    monkeypatch.setattr(ipython, "get_ipython", lambda: shell, raising=False)
    monkeypatch.setattr(inner, "display", display, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", inner)
    return display


def test_a_result_shows_its_images(model: Model) -> None:
    """Images in another order than best first, or without their captions and scores."""
    result = dalle1.sample([CAPTION, "a blue dog"], model, 6, 3, progress=False, seed=2)
    page = result._repr_html_()
    drawn = in_html(page)
    assert len(drawn) == 6 and page.count("<tr>") == 2
    for i, row in enumerate(result.images):
        for j, image in enumerate(row):
            data = drawn[3 * i + j]
            assert opened(data).tobytes() == image.tobytes()
            found = read_png_settings(io.BytesIO(data))  # an image that is saved from the page
            assert found is not None and found["caption"] == result.captions[i]
            assert found["candidate"] == result.candidate_numbers[i, j]
            assert f"<br>{float(result.scores[i, j]):.3f}" in page
    assert page.index(CAPTION) < page.index("a blue dog") and "Not shown" not in page
    sheet = result._repr_png_()
    assert sheet is not None and opened(sheet).width > 3 * 64


def test_a_caption_is_text(model: Model) -> None:
    """A caption of somebody else's that is run as a script in the reader's notebook."""
    result = made(1, 1, caption="<script>alert(1)</script> & \"x\" 'y' <b>")
    page = result._repr_html_()
    assert "<script" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;x&quot;" in page


def test_scores_that_are_none() -> None:
    """The word nan beside the images of a model without a ranker."""
    result = made(1, 2)
    result.scores[0, 0] = float("nan")
    page = result._repr_html_()
    assert page.count("<br>") == 1 and "nan" not in PNG.sub("", page)


@pytest.mark.parametrize(
    ("captions", "images", "side", "shown"),
    [(1, 1, 1024, 1), (3, 40, 8, 48), (40, 2, 8, 32), (20, 20, 128, 256), (1, 2000, 4, 16)],
)
def test_a_large_result_stays_small(captions: int, images: int, side: int, shown: int) -> None:
    """A notebook of a gigabyte after one call, or images that are left out without a word."""
    result = made(captions, images, side, "x" * 10_000)
    page, sheet = result._repr_html_(), result._repr_png_()
    found = [opened(data) for data in in_html(page)]
    assert len(found) == shown
    assert sum(image.width * image.height for image in found) <= MAX_PIXELS
    assert len(page) < 4 * MAX_PIXELS + 100_000 and sheet is not None
    assert len(sheet) < 4 * MAX_PIXELS
    left_out = [str(captions - 16)] * (captions > 16) + [str(images - 16)] * (images > 16)
    assert all(f"{number} more" in page for number in left_out)
    assert ("Not shown" in page) is bool(left_out)
    assert result.images[0][0].size == (side, side)  # the result's own stay as they are


def test_a_result_of_nothing() -> None:
    """A traceback in place of an empty cell."""
    empty = Result([], [], torch.zeros(0, 0, 2, 2), torch.zeros(0, 0))
    assert empty._repr_png_() is None and "<img" not in empty._repr_html_()


def test_previews_update_one_cell(model: Model, notebook: Display) -> None:
    """A new output for every few rows, rows that are not drawn yet, or no result at the end."""
    seen: list[Preview] = []
    arguments: dict[str, Any] = {"candidates": 6, "keep": 2, "progress": False, "preview_rows": 2}
    plain = dalle1.sample(CAPTION, model, **arguments)
    result = dalle1.sample(CAPTION, model, **arguments, preview=True, on_step=seen.append)
    assert torch.equal(result.tokens, plain.tokens)
    assert [p.rows for p in seen] == [2, 4] and len(seen[0].images) == 6
    *previews, last = notebook.shown
    assert len(previews) == 2 and last["text/html"] == result._repr_html_()
    half, full = (np.asarray(image) for image in notebook.images()[:2])
    zoom, top, left = 8, 4, 190  # of a contact sheet
    gray = (half == 211).all(axis=2)  # lightgray
    assert gray[top + 4 * zoom : top + 8 * zoom, left : left + 64].all()
    assert not gray[top : top + 4 * zoom, left : left + 64].all()
    assert not (full == 211).all(axis=2)[top : top + 64, left : left + 64].all()


def test_a_preview_decodes_what_it_shows(
    model: Model, notebook: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Previews that decode 512 images to show 8."""
    decoded: list[int] = []
    inner = model.codec.decode

    def decode(tokens: torch.Tensor) -> torch.Tensor:
        decoded.append(len(tokens))
        return inner(tokens)

    monkeypatch.setattr(model.codec, "decode", decode)
    dalle1.sample(CAPTION, model, 40, 2, progress=False, preview=True, preview_rows=1)
    assert decoded[:4] == [8] * 4 and sum(decoded) == 4 * 8 + 40


def test_many_captions_take_turns() -> None:
    """A cell that grows with every caption of a long list."""
    display = Display()
    cell = PreviewCell(display, 8)
    sizes = set()
    for i in range(20):
        cell.update(Preview(f"caption {i}", 0, 1, torch.rand(30, 3, 2, 8)))
        sizes.add(display.images()[-1].size)
    assert max(height for _, height in sizes) == 4 + 4 * 68
    assert len({width for width, _ in sizes}) == 1 and max(sizes)[0] == 190 + 8 * 68


@pytest.mark.parametrize("shell", ["none", "terminal"])
def test_outside_of_a_notebook(
    model: Model,
    shell: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A script from a notebook that dies, or prints a picture as letters."""
    if shell == "none":
        monkeypatch.delitem(sys.modules, "IPython", raising=False)
    else:
        ipython = ModuleType("IPython")
        monkeypatch.setattr(ipython, "get_ipython", lambda: object(), raising=False)
        monkeypatch.setitem(sys.modules, "IPython", ipython)
    arguments: dict[str, Any] = {"candidates": 4, "keep": 2, "progress": False}
    seen: list[Preview] = []
    result = dalle1.sample(CAPTION, model, **arguments, preview=True, on_step=seen.append)
    said = capsys.readouterr().err
    assert said.count("preview: expected a notebook") == 1 and said.count("\n") == 1
    assert len(seen) == 1 and torch.equal(
        result.tokens, dalle1.sample(CAPTION, model, **arguments).tokens
    )

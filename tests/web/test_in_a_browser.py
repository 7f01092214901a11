"""The page in Chromium, as a visitor uses it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import dalle1
from dalle1.common.png_settings import png_bytes, read_png_settings
from dalle1.serving.worker import SamplingWorker
from tests.web.browser import open_section, write
from tests.web.conftest import Pace

Visit = Callable[[], Any]


def fixed_seed(page: Any, seed: int) -> None:
    page.uncheck('label:has-text("Another seed") input[type=checkbox]')
    write(page, "Seed", seed)


def draw(page: Any, captions: str) -> None:
    page.fill("#d1-captions textarea", captions)
    page.click("#d1-draw")


def until(page: Any, selector: str, pace: Pace) -> None:
    """Lets rows through until something is seen."""
    for _ in range(40):
        if page.locator(selector).count():
            return
        pace.let(1)
        page.wait_for_timeout(200)
    raise AssertionError(f"{selector} is not there: {page.locator('#d1-status').inner_html()}")


def shown(page: Any, section: int = 0) -> list[tuple[int, float]]:
    """Candidate and score of the tiles that are seen, in the order in which they are seen."""
    tiles = page.locator(".d1-caption").nth(section).locator(".d1-tile:visible")
    found = tiles.evaluate_all(
        "tiles => tiles.map(t => [+t.style.order, +t.dataset.number, +t.dataset.score])"
    )
    return [(number, score) for _, number, score in sorted(found)]


def pixels(page: Any, selector: str) -> np.ndarray:
    """The pixels of an image whose source is a data URL."""
    source = page.locator(selector).first.get_attribute("src")
    data = base64.b64decode(source.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_rows_appear_and_then_the_ranked_gallery(
    visit: Visit, worker: SamplingWorker, pace: Pace
) -> None:
    """A page that shows nothing until all is drawn, or ranks in another order than `sample`."""
    page = visit()
    open_section(page, "d1-options")
    fixed_seed(page, 5)
    write(page, "Candidates", 6)
    write(page, "Pictures", 3)
    pace.hold()
    draw(page, "a red cat\nthe blue cat")
    page.wait_for_selector("#d1-stop:visible")
    heights = []
    for _ in range(3):
        pace.let(1)
        style = f'.d1-drawing img[style*="{25 * (len(heights) + 1)}.00%"]'
        page.wait_for_selector(style)
        heights.append(pixels(page, ".d1-drawing img").shape[0])
    assert heights == sorted(set(heights))  # more rows each time
    assert page.locator(".d1-drawing .d1-tile").count() == 6  # of each caption three
    pace.free()
    page.wait_for_selector(".d1-save >> nth=0")
    result = dalle1.sample(
        ["a red cat", "the blue cat"], worker.models["tiny"], 6, 3, seed=5, progress=False
    )
    for i in range(2):
        wanted = result.candidate_numbers[i].tolist()
        assert [number for number, _ in shown(page, i)] == wanted
        np.testing.assert_allclose(
            [score for _, score in shown(page, i)], result.scores[i], rtol=1e-5
        )
    np.testing.assert_array_equal(pixels(page, ".d1-tile img"), np.asarray(result.images[0][0]))
    assert page.locator("#d1-draw").is_visible() and page.locator("#d1-stop").is_hidden()
    ranks = page.locator(".d1-caption").first.locator(".d1-rank:visible").all_text_contents()
    assert ranks == ["1", "2", "3"]


def test_best_of_fewer_without_drawing(visit: Visit, worker: SamplingWorker) -> None:
    """A slider that draws again, or shows another ranking than fewer candidates have."""
    page = visit()
    open_section(page, "d1-options")
    fixed_seed(page, 2)
    write(page, "Candidates", 12)
    write(page, "Pictures", 2)
    draw(page, "a red cat")
    page.wait_for_selector(".d1-first")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for first in (1, 3, 7, 12, 5):
        page.evaluate(
            "n => { const s = document.querySelector('.d1-first'); s.value = n;"
            " s.dispatchEvent(new Event('input', {bubbles: true})) }",
            first,
        )
        result = dalle1.sample(
            "a red cat", worker.models["tiny"], first, min(2, first), seed=2, progress=False
        )
        assert [number for number, _ in shown(page)] == result.candidate_numbers[0].tolist()
        note = page.locator(".d1-count").text_content()
        assert note == f"the best {min(2, first)} of {first}"
    assert not any("queue/join" in url for url in asked)
    draw(page, "a red cat")  # the slider is at the end again
    page.wait_for_function("document.querySelector('.d1-first')?.value == '12'")


def test_stop_returns_what_is_complete(visit: Visit, pace: Pace) -> None:
    """A stop that loses complete captions, or does not stop."""
    page = visit()
    open_section(page, "d1-options")
    write(page, "Candidates", 16)  # as many as are drawn at once
    write(page, "Pictures", 2)
    pace.hold()
    draw(page, "a red cat\na blue dog")
    pace.let(5)  # four rows of the first caption, one of the second
    page.wait_for_selector('.d1-caption:has-text("blue") img')
    page.click("#d1-stop")
    until(page, '.d1-status:has-text("stopped")', pace)
    assert page.locator(".d1-caption").count() == 1
    assert "the best 2 of 16" in page.locator(".d1-caption").inner_text()
    page.wait_for_selector("#d1-draw:visible")

    draw(page, "a blue dog")  # nothing is complete at the second stop
    pace.let(1)
    page.wait_for_selector('.d1-drawing:has-text("blue") img')
    page.click("#d1-stop")
    until(page, '.d1-status:has-text("before anything")', pace)
    assert page.locator(".d1-drawing img").count() == 2  # the rows stay
    pace.free()
    draw(page, "a red cat")  # it goes on as before
    page.wait_for_selector(".d1-save >> nth=0")


def test_download_holds_the_settings_and_fills_the_form(
    visit: Visit, worker: SamplingWorker, tmp_path: Path
) -> None:
    """A PNG without its settings, or a page that does not read its own."""
    page = visit()
    open_section(page, "d1-options")
    fixed_seed(page, 11)
    write(page, "Candidates", 4)
    write(page, "Pictures", 2)
    write(page, "Top k", 3)
    draw(page, "a small red dog")
    page.wait_for_selector(".d1-save >> nth=1")
    with page.expect_download() as download:
        page.locator(".d1-save").first.click()
    saved = tmp_path / download.value.suggested_filename
    download.value.save_as(saved)
    assert saved.name.startswith("a-small-red-dog-11-") and saved.suffix == ".png"
    settings = read_png_settings(saved)
    assert settings is not None
    assert (settings["caption"], settings["seed"], settings["top_k"]) == ("a small red dog", 11, 3)
    assert settings["model"] == worker.models["tiny"].fingerprint()

    other = visit()
    open_section(other, "d1-complete")
    other.set_input_files("input[type=file]", str(saved))
    other.wait_for_selector('.d1-status:has-text("settings")')
    assert other.locator("#d1-captions textarea").input_value() == "a small red dog"
    other.click("#d1-draw")
    other.wait_for_selector(".d1-save >> nth=1")
    assert shown(other) == shown(page)
    np.testing.assert_array_equal(pixels(other, ".d1-tile img"), pixels(page, ".d1-tile img"))


def test_a_picture_is_completed(visit: Visit, worker: SamplingWorker, tmp_path: Path) -> None:
    """Kept rows that are not those of the picture, or a slider that does nothing."""
    colors = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    image = Image.fromarray(colors)
    image.save(tmp_path / "picture.png")
    page = visit()
    open_section(page, "d1-options")
    fixed_seed(page, 3)
    write(page, "Candidates", 3)
    write(page, "Pictures", 3)
    open_section(page, "d1-complete")
    page.set_input_files("input[type=file]", str(tmp_path / "picture.png"))
    page.wait_for_selector('.d1-drop img[src^="data:"]')
    write(page, "Rows to keep", 2)
    page.wait_for_function(
        "getComputedStyle(document.documentElement).getPropertyValue('--d1-kept') == 0.5"
    )
    draw(page, "a red cat")
    page.wait_for_selector(".d1-save >> nth=2")
    result = dalle1.sample(
        "a red cat", worker.models["tiny"], 3, 3, image=image, rows=2, seed=3, progress=False
    )
    np.testing.assert_array_equal(pixels(page, ".d1-tile img"), np.asarray(result.images[0][0]))
    page.locator(".d1-use").first.click()  # and goes on from there
    page.wait_for_selector('.d1-status:has-text("upper half")')
    np.testing.assert_array_equal(pixels(page, ".d1-drop img"), np.asarray(result.images[0][0]))


def test_two_visitors_at_once(visit: Visit, worker: SamplingWorker, pace: Pace) -> None:
    """One visitor's drawing, stop or leaving that reaches another's."""
    first, second = visit(), visit()
    for page, seed in ((first, 1), (second, 2)):
        open_section(page, "d1-options")
        fixed_seed(page, seed)
        write(page, "Candidates", 4)
        write(page, "Pictures", 2)
    pace.hold()
    draw(first, "a red cat")
    first.wait_for_selector("#d1-stop:visible")
    draw(second, "a blue dog")
    second.wait_for_selector("#d1-stop:visible")
    first.click("#d1-stop")
    pace.free()
    second.wait_for_selector(".d1-save >> nth=1")
    result = dalle1.sample("a blue dog", worker.models["tiny"], 4, 2, seed=2, progress=False)
    assert [number for number, _ in shown(second)] == result.candidate_numbers[0].tolist()
    first.wait_for_selector("#d1-draw:visible")
    assert "blue" not in first.locator("#d1-pictures").inner_text()


def test_a_visitor_who_leaves_frees_the_place(
    visit: Visit, worker: SamplingWorker, pace: Pace
) -> None:
    """A closed tab whose drawing goes on for nobody."""
    page = visit()
    pace.hold()
    draw(page, "a red cat")
    page.wait_for_selector("#d1-stop:visible")
    assert worker.waiting == 1
    page.close()
    other = visit()
    for _ in range(100):
        if worker.waiting == 0:
            break
        other.wait_for_timeout(100)
    assert worker.waiting == 0


def test_mistakes_are_told_in_a_line(visit: Visit, tmp_path: Path) -> None:
    """A limit, a broken picture or an empty form that ends in silence or in a stack of code."""
    page = visit()
    page.click("#d1-draw")
    page.wait_for_selector('.d1-mistake:has-text("captions")')
    draw(page, "x" * 61)
    page.wait_for_selector('.d1-mistake:has-text("at most 60 letters")')
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    open_section(page, "d1-complete")
    page.set_input_files("input[type=file]", str(tmp_path / "broken.png"))
    page.wait_for_selector('.d1-mistake:has-text("cannot be read")')
    (tmp_path / "large.png").write_bytes(bytes(2**16 + 1))
    page.set_input_files("input[type=file]", str(tmp_path / "large.png"))
    page.wait_for_selector('.d1-said:has-text("at most 0.1 MB")')
    image = png_bytes(Image.new("RGB", (101, 100)), None)
    (tmp_path / "wide.png").write_bytes(image)
    page.set_input_files("input[type=file]", str(tmp_path / "wide.png"))
    page.wait_for_selector('.d1-mistake:has-text("pixels")')


def test_another_model(visit: Visit, worker: SamplingWorker) -> None:
    """A choice of models that draws with the first one, or asks for scores where there are none."""
    page = visit()
    page.click("#d1-go input")
    page.click('[role=option]:has-text("plain")')
    open_section(page, "d1-options")
    fixed_seed(page, 4)
    write(page, "Pictures", 2)
    draw(page, "a red cat")
    page.wait_for_selector(".d1-save >> nth=1")
    result = dalle1.sample("a red cat", worker.models["plain"], 2, 2, seed=4, progress=False)
    np.testing.assert_array_equal(pixels(page, ".d1-tile img"), np.asarray(result.images[0][0]))
    assert page.locator(".d1-first").count() == 0


def test_a_phone_and_the_dark(browser: Any, server: Any) -> None:
    """A page that is wider than a phone, or is white where the system is dark."""
    context = browser.new_context(viewport={"width": 360, "height": 700}, color_scheme="dark")
    page = context.new_page()
    page.goto(server.address)
    page.wait_for_selector("#d1-draw")
    page.fill("#d1-captions textarea", "a red cat")
    page.click("#d1-draw")
    page.wait_for_selector(".d1-save >> nth=1")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(x) for x in color[4:-1].split(",")[:3]) < 60
    zoomed = page.evaluate(
        "getComputedStyle(document.querySelector('.d1-tile img')).imageRendering"
    )
    assert zoomed == "pixelated"
    page.locator(".d1-look").first.click()
    assert page.locator("dialog.d1-dialog").is_visible()
    context.close()

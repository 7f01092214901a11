"""What a visitor sees of a drawing, from the form to the pictures; no browser, no Gradio."""

from __future__ import annotations

import asyncio
import io
import re
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import dalle1
from dalle1.common.png_settings import read_png_settings
from dalle1.serving.requests import Request
from dalle1.serving.worker import SamplingWorker
from dalle1.web import drawing
from dalle1.web.complete import galleries
from dalle1.web.drawing import View, Visitors, ticking
from dalle1.web.form import Form
from dalle1.web.limits import PageLimits
from tests.web.conftest import PAGE, SECONDS, Pace

FORM = Form("tiny", "a red cat", candidates=6, keep=2, seed=3)


@pytest.fixture
def visitors(worker: SamplingWorker) -> Visitors:
    return Visitors(worker, PAGE)


async def collect(visitors: Visitors, form: Form = FORM, visitor: str = "a") -> list[View]:
    return [view async for view in visitors.draw(visitor, form)]


def run(visitors: Visitors, form: Form = FORM) -> list[View]:
    return asyncio.run(collect(visitors, form))


def test_empty_tiles_then_rows_then_pictures(visitors: Visitors, worker: SamplingWorker) -> None:
    """A page that jumps, or shows nothing until all is drawn."""
    views = run(visitors)
    assert all(view.drawing for view in views[:-1]) and not views[-1].drawing
    assert {view.seed for view in views} == {3}
    heights = [re.findall(r"height: ([\d.]+)%", view.pictures or "") for view in views[:-1]]
    assert heights[0] == []
    seen = [float(found[0]) for found in heights if found]
    assert seen == sorted(seen) and seen[0] == 25 and all(len(f) in (0, 2) for f in heights)
    assert all((view.pictures or "").count("<li") == 2 for view in views[:-1])
    result = dalle1.sample("a red cat", worker.models["tiny"], 6, 2, seed=3, progress=False)
    numbers = re.findall(r'data-number="(\d+)"', views[-1].pictures or "")
    assert [int(n) for n in numbers[:2]] == result.candidate_numbers[0].tolist()
    assert visitors.drawing == 0


def test_mistakes_leave_the_pictures(visitors: Visitors) -> None:
    """A mistake that clears the page, or a visitor who is taken for one who draws."""
    (view,) = run(visitors, replace(FORM, captions=""))
    assert view.pictures is None and not view.drawing
    assert 'role="alert"' in view.status and "captions" in view.status
    # What only the worker knows: the caption does not fit the model.
    (view,) = run(visitors, replace(FORM, captions="red cat " * 7))
    assert "text positions" in view.status and visitors.drawing == 0


def test_what_is_unforeseen_is_not_shown(
    visitors: Visitors, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Paths and code of the server's in front of every visitor; or an error that nobody is told."""

    def fail(*_: object) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(drawing, "read_form", fail)
    (view,) = run(visitors)
    assert "secret" not in view.status and "try again" in view.status
    assert "secret" in caplog.text


@pytest.mark.parametrize("row", [1, 5])
def test_stop_keeps_the_captions_that_are_done(visitors: Visitors, pace: Pace, row: int) -> None:
    """A stop that loses what is complete, or says nothing."""
    pace.hold()
    form = replace(FORM, captions="a red cat\na blue dog", candidates=16, keep=2)

    async def stopping() -> list[View]:
        views, rows = [], 0
        async for view in visitors.draw("a", form):
            views.append(view)
            if rows == row:
                visitors.stop("a")
                visitors.stop("another")
            pace.let(1)
            rows += 1
        return views

    last = asyncio.run(stopping())[-1]
    assert not last.drawing and "stopped" in last.status
    if row == 1:  # nothing was complete: the rows stay
        assert last.pictures is None
    else:
        assert last.pictures is not None
        assert "the best 2 of 16" in last.pictures and "blue" not in last.pictures


def test_a_visitor_has_one_drawing(visitors: Visitors, worker: SamplingWorker, pace: Pace) -> None:
    """Drawings of one visitor that pile up, or a second one that ends the first's place."""
    pace.hold()

    async def twice() -> tuple[list[View], int, list[View]]:
        first = asyncio.create_task(collect(visitors))
        while not visitors.drawing:
            await asyncio.sleep(0.01)
        second = asyncio.create_task(collect(visitors, replace(FORM, seed=9)))
        ended = await first
        drawing = visitors.drawing
        pace.free()
        return ended, drawing, await second

    ended, drawing, views = asyncio.run(twice())
    assert not ended[-1].drawing and drawing == 1
    assert views[-1].pictures and views[-1].seed == 9


def test_who_leaves_frees_the_place(visitors: Visitors, worker: SamplingWorker, pace: Pace) -> None:
    """A drawing for nobody that others wait for."""
    pace.hold()

    async def leave() -> None:
        task = asyncio.create_task(collect(visitors))
        while not worker.waiting:
            await asyncio.sleep(0.01)
        visitors.leave("a")
        await asyncio.wait_for(task, SECONDS)

    asyncio.run(leave())
    assert worker.waiting == visitors.drawing == 0


def test_an_iterator_that_is_closed_frees_the_place(
    visitors: Visitors, worker: SamplingWorker, pace: Pace
) -> None:
    """A browser that is gone without a word."""
    pace.hold()

    async def close() -> None:
        views = visitors.draw("a", FORM)
        await anext(views)
        assert worker.waiting == 1
        await views.aclose()  # type: ignore[attr-defined]

    asyncio.run(close())
    assert worker.waiting == visitors.drawing == 0


def test_more_visitors_than_places(worker: SamplingWorker, pace: Pace) -> None:
    """Visitors without end who fill the memory, or one too many who is told nothing."""
    visitors = Visitors(worker, PageLimits(visitors=1))
    pace.hold()

    async def two() -> list[View]:
        task = asyncio.create_task(collect(visitors))
        while not visitors.drawing:
            await asyncio.sleep(0.01)
        views = await collect(visitors, visitor="b")
        pace.free()
        await task
        return views

    (view,) = asyncio.run(two())
    assert "try again later" in view.status


def test_ticks_come_between_events() -> None:
    """A bar that stands still while no rows are shown; an event that is lost to a tick."""
    go = threading.Event()

    async def events() -> AsyncIterator[object]:
        yield 1
        while not go.is_set():
            await asyncio.sleep(0.01)
        yield 2

    async def collect_ticks() -> list[object]:
        found: list[object] = []
        async for event in ticking(events(), 0.03):  # type: ignore[arg-type]
            found.append(event)
            if found.count(None) == 3:
                go.set()
        return found

    found = asyncio.run(collect_ticks())
    assert [event for event in found if event is not None] == [1, 2] and found.count(None) >= 3


def test_pngs_hold_their_settings(worker: SamplingWorker) -> None:
    """Settings of another image, or of none, in what is downloaded."""
    request = Request("tiny", ["a red cat", "a blue dog"], 8, 2, seed=5, of_fewer=True)
    result = worker.submit(request).result(SECONDS)
    for gallery in galleries(result):
        assert (gallery.drawn, gallery.keep, gallery.seed) == (8, 2, 5)
        assert len(gallery.entries) >= 2
        for entry in gallery.entries:
            settings = read_png_settings(io.BytesIO(entry.png))
            assert settings is not None and settings["caption"] == gallery.caption
            again = dalle1.sample(
                gallery.caption, worker.models["tiny"], 1, 1, seed=settings["seed"],
                first_candidate=settings["candidate"], progress=False,
            )  # fmt: skip
            pixels = np.asarray(Image.open(io.BytesIO(entry.png)))
            np.testing.assert_array_equal(pixels, np.asarray(again.images[0][0]))
            assert entry.number == settings["candidate"]
            np.testing.assert_allclose(entry.score, again.scores[0, 0], rtol=1e-5)

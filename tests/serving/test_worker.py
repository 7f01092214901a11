"""`SamplingWorker`: what a client gets, who waits how long, and who ends alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import dalle1
from dalle1 import Model, Preview, Result, SamplingOptions
from dalle1.common.hardware import released_threads
from dalle1.generation.generator import Generator
from dalle1.serving.requests import (
    Cancelled,
    Closed,
    LimitExceeded,
    Limits,
    NothingComplete,
    QueueFull,
    Request,
    UnknownModel,
)
from dalle1.serving.worker import SamplingWorker
from tests.conftest import ModelMaker

CAPTION, SECONDS = "a red cat", 60.0


def ask(captions: str | list[str] = CAPTION, **settings: Any) -> Request:
    return Request("tiny", captions, **{"candidates": 4, "keep": 2, **settings})


def expected(model: Model, request: Request) -> Result:
    """What the library draws for the same request."""
    return dalle1.sample(
        request.captions, model, request.candidates, request.keep,
        request.options.temperature, request.options.top_k, request.options.top_p,
        request.options.guidance, request.image, request.rows, request.seed, progress=False,
        first_candidate=request.first_candidate,
    )  # fmt: skip


def assert_same(found: Result, model: Model, request: Request) -> None:
    wanted = expected(model, request)
    assert found.captions == wanted.captions and found.settings == wanted.settings
    assert torch.equal(found.tokens, wanted.tokens)
    assert torch.equal(found.candidate_numbers, wanted.candidate_numbers)
    torch.testing.assert_close(found.scores, wanted.scores)
    for own, others in zip(found.images, wanted.images, strict=True):
        assert [x.tobytes() for x in own] == [x.tobytes() for x in others]


class Gate:
    """Holds the drawing back at each row of a batch until it is let through, and counts batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[tuple[int, int]] = []  # captions and candidates of each
        self.rows = 0  # told of so far
        self._open = threading.Event()
        self._began = threading.Event()
        plain = Generator.draw

        def draw(
            generator: Generator,
            text: Tensor,
            uniforms: Tensor,
            prefix: Tensor | None,
            on_step: Callable[[int, Tensor], None],
        ) -> Tensor:
            self.batches.append((uniforms.shape[0], uniforms.shape[1]))
            self._began.set()
            assert self._open.wait(SECONDS)

            def on_row(done: int, tokens: Tensor) -> None:
                self.rows += 1
                on_step(done, tokens)

            return plain(generator, text, uniforms, prefix, on_row)

        monkeypatch.setattr(Generator, "draw", draw)

    def wait(self) -> None:
        """Until a batch is about to be drawn."""
        assert self._began.wait(SECONDS)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


def worker_of(model: Model, **limits: Any) -> SamplingWorker:
    return SamplingWorker({"tiny": model}, Limits(**{"gather_seconds": 0, **limits}))


def random_image(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


REQUESTS = [
    ask(),
    ask(["a blue dog", CAPTION, "the blue cat"], seed=3),
    ask(candidates=1, keep=1, seed=1),
    ask(candidates=30, keep=3, seed=2),
    ask(options=SamplingOptions(0.7, 4, 0.9, 2.0)),
    ask(options=SamplingOptions(top_k=2), seed=5),
    ask(candidates=20, seed=2, first_candidate=7),
    ask(image=random_image(1), rows=2),
    ask(image=random_image(2), rows=2),
    ask(image=random_image(2), rows=2, seed=4, candidates=3),
]


@pytest.mark.parametrize("batch_size", [None, 7, 1])
def test_every_client_gets_what_the_library_draws(model: Model, batch_size: int | None) -> None:
    """Tokens, scores or images that change with those who share a batch, or that are swapped."""
    with worker_of(model, batch_size=batch_size, gather_seconds=0.1) as worker:
        jobs = [worker.submit(request) for request in REQUESTS]
        for job, request in zip(jobs, REQUESTS, strict=True):
            assert_same(job.result(SECONDS), model, request)
        assert worker.waiting == 0 and worker.alive
    assert not worker.alive


def test_the_queue_computes_with_the_threads_that_it_is_given(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue that draws with the one thread of the process that released the others, or a process
    that computes with several again and so slows its queue down."""
    plain, found = Generator.draw, []

    def draw(generator: Generator, *arguments: Any) -> Tensor:
        found.append(torch.get_num_threads())
        return plain(generator, *arguments)

    monkeypatch.setattr(Generator, "draw", draw)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with (
            released_threads() as threads,
            SamplingWorker({"tiny": model}, threads=threads) as worker,
        ):
            worker.submit(ask()).result(SECONDS)
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        torch.set_num_threads(2)
        with SamplingWorker({"tiny": model}) as worker:
            worker.submit(ask()).result(SECONDS)
    finally:
        torch.set_num_threads(before)
    assert found == [3, 2]


def test_requests_are_drawn_together(model: Model, gate: Gate) -> None:
    """Clients with the same options that are drawn one after the other, or with other ones in one
    batch."""
    with worker_of(model) as worker:
        first = worker.submit(ask(candidates=2))
        gate.wait()
        later = [worker.submit(ask(candidates=2, seed=s)) for s in range(5)]
        other = worker.submit(ask(candidates=2, options=SamplingOptions(top_k=2)))
        gate.open()
        for job in (first, *later, other):
            job.result(SECONDS)
    assert gate.batches == [(1, 2), (5, 2), (1, 2)]


def test_a_small_request_does_not_wait_for_a_huge_one(model: Model, gate: Gate) -> None:
    """One client's hundreds of candidates in front of everybody else."""
    with worker_of(model, batch_size=8) as worker:
        huge = worker.submit(ask(candidates=200))
        gate.wait()
        small = worker.submit(ask(candidates=3))
        other = worker.submit(ask(candidates=2, options=SamplingOptions(top_k=2)))
        gate.open()
        for job in (small, other):
            job.result(SECONDS)
        assert huge.progress < 0.5 and not huge.done
        assert len(gate.batches) < 8
        assert_same(small.result(SECONDS), model, small.request)
        huge.cancel()


def test_previews(model: Model) -> None:
    """Rows that are not those of the final images, or previews nobody asked for."""
    request = ask(candidates=4, keep=4, preview_rows=2, preview_images=3)
    with worker_of(model) as worker:
        *previews, result = list(worker.submit(request).events())
        (silent,) = worker.submit(ask()).events()
    assert isinstance(silent, Result) and isinstance(result, Result)
    shown: list[Preview] = []
    dalle1.sample(CAPTION, model, 4, 4, on_step=shown.append, preview_rows=2, progress=False)
    assert [p.rows for p in previews if isinstance(p, Preview)] == [2, 4]
    for preview, wanted in zip(previews, shown, strict=True):
        assert isinstance(preview, Preview)
        assert (preview.caption, preview.first) == (CAPTION, 0)
        assert preview.images.shape == (3, 3, 2 * preview.rows, 8)
        torch.testing.assert_close(preview.images, wanted.images[:3])


def test_asyncio(model: Model) -> None:
    """A stream that blocks the loop, or ends without the result or the error."""

    async def all_of(request: Request) -> list[Any]:
        return [event async for event in worker.submit(request).stream()]

    async def several() -> list[list[Any]]:
        return await asyncio.gather(*(all_of(ask(seed=s, preview_rows=1)) for s in range(3)))

    async def cancelled() -> None:
        job = worker.submit(ask(candidates=400))
        asyncio.get_running_loop().call_later(0.05, job.cancel)
        with pytest.raises(Cancelled):
            async for _ in job.stream():
                pass

    with worker_of(model) as worker:
        for seed, events in enumerate(asyncio.run(several())):
            assert [e.rows for e in events[:-1]] == [1, 2, 3, 4]
            assert_same(events[-1], model, ask(seed=seed))
        asyncio.run(cancelled())


def test_cancelling_frees_the_place(model: Model, gate: Gate) -> None:
    """A client that is gone for whom the device goes on drawing."""
    options = SamplingOptions(window=1)
    with worker_of(model, waiting=2) as worker:
        gone = worker.submit(ask(candidates=64, options=options))
        gate.wait()
        waiting = worker.submit(ask())
        with pytest.raises(QueueFull, match="2 requests are waiting"):
            worker.submit(ask())
        gone.cancel()
        last = worker.submit(ask(seed=1))  # its place is free at once
        gate.open()
        with pytest.raises(Cancelled):
            gone.result(SECONDS)
        results = [job.result(SECONDS) for job in (waiting, last)]
    assert gate.rows == 1 + 4  # one of the batch that nobody waits for
    for job, result in zip((waiting, last), results, strict=True):
        assert_same(result, model, job.request)


@pytest.mark.parametrize(("stop_in", "drawn"), [(1, []), (2, [5]), (3, [10]), (4, [10, 5])])
def test_stop_returns_what_is_complete(
    model: Model, monkeypatch: pytest.MonkeyPatch, stop_in: int, drawn: list[int]
) -> None:
    """Complete candidates that are lost, or unfinished ones that are returned."""
    plain, batches = Generator.draw, []

    def draw(self: Generator, *arguments: Any) -> Tensor:
        batches.append(1)
        if len(batches) == stop_in:
            job.stop()
        return plain(self, *arguments)

    with worker_of(model, batch_size=5, gather_seconds=0.1) as worker, monkeypatch.context() as m:
        m.setattr(Generator, "draw", draw)
        captions = ["a blue dog", CAPTION]  # of each two batches
        job = worker.submit(ask(captions, candidates=10, keep=3))
        if not drawn:
            with pytest.raises(NothingComplete, match="0 of 3 candidates"):
                job.result(SECONDS)
            return
        result = job.result(SECONDS)
    assert len(batches) == stop_in
    assert result.settings["drawn"] == drawn and result.captions == captions[: len(drawn)]
    for tokens, caption, count in zip(result.tokens, captions, drawn, strict=False):
        whole = dalle1.sample(caption, model, count, 3, progress=False)
        assert torch.equal(tokens, whole.tokens[0])


def test_a_failing_request_fails_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """One client's error that ends the others or the worker."""
    plain = Generator.draw

    def draw(self: Generator, text: Tensor, uniforms: Tensor, *rest: Any) -> Tensor:
        bad = model.tokenizer.encode("the blue cat")[0]
        if bool((text == bad).all(dim=1).any()):
            raise RuntimeError("kernel is broken")
        return plain(self, text, uniforms, *rest)

    monkeypatch.setattr(Generator, "draw", draw)
    with worker_of(model, gather_seconds=0.1) as worker:
        good = [worker.submit(ask(seed=s)) for s in range(3)]
        bad = worker.submit(ask("the blue cat"))
        for job in good:
            assert_same(job.result(SECONDS), model, job.request)
        with pytest.raises(RuntimeError, match="kernel is broken"):
            bad.result(SECONDS)
        assert_same(worker.submit(ask(seed=9)).result(SECONDS), model, ask(seed=9))
        counts = worker.queues["cpu"].counts
        assert counts.jobs == {"done": 4, "cancelled": 0, "failed": 1}
        assert counts.candidates == 16


def test_out_of_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is too large and ends its clients, or is tried for ever."""
    plain, most = Generator.draw, 3

    def narrow(self: Generator, text: Tensor, uniforms: Tensor, *rest: Any) -> Tensor:
        if uniforms.shape[0] * uniforms.shape[1] > most:
            raise torch.OutOfMemoryError("no memory")
        return plain(self, text, uniforms, *rest)

    monkeypatch.setattr(Generator, "draw", narrow)
    with worker_of(model) as worker:
        jobs = [worker.submit(ask(seed=s, candidates=5)) for s in range(3)]
        results = [job.result(SECONDS) for job in jobs]
        most = 0
        with pytest.raises(torch.OutOfMemoryError):
            worker.submit(ask()).result(SECONDS)
        most = 100
        again = worker.submit(ask()).result(SECONDS)
    monkeypatch.undo()
    for job, result in zip(jobs, results, strict=True):
        assert_same(result, model, job.request)
    assert_same(again, model, ask())


def test_ranking_that_fails(make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error behind the drawing that ends the thread."""
    model = make_model()
    assert model.ranker is not None
    monkeypatch.setattr(model.ranker, "score", lambda *_: 1 / 0)
    with worker_of(model) as worker:
        with pytest.raises(ZeroDivisionError):
            worker.submit(ask()).result(SECONDS)
        monkeypatch.undo()
        assert_same(worker.submit(ask()).result(SECONDS), model, ask())


@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        (Request("other", CAPTION), UnknownModel, "model: expected one of tiny, got 'other'"),
        (ask("x" * 101), LimitExceeded, "caption: expected at most 100 letters, got 101"),
        (ask("cat dog " * 9), LimitExceeded, "fits the model's 10 text positions"),
        (ask([CAPTION] * 3, candidates=7), LimitExceeded, "at most 20 of all captions, got 21"),
        (ask([CAPTION] * 4), LimitExceeded, "captions: expected at most 3, got 4"),
        (ask(" "), ValueError, "caption: expected text"),
        (ask(keep=5), ValueError, "keep: expected 1 to candidates = 4, got 5"),
        (ask(rows=2), ValueError, "rows: 2 rows of which image"),
        (ask(image=random_image(), rows=4), ValueError, "rows: expected 1 to 3"),
        (ask(image=random_image().resize((9, 9)), rows=1), ValueError, "expected 8x8 pixels"),
    ],
)
def test_refused(model: Model, request_: Request, kind: type[Exception], message: str) -> None:
    """A mistake that takes a place in the queue, or shows only when its turn comes."""
    with worker_of(model, letters=100, candidates=20, captions=3) as worker:
        with pytest.raises(kind, match=message):
            worker.submit(request_)
        assert worker.waiting == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": 1.5}, "candidates: expected a whole number"),
        ({"preview_rows": 0}, "preview_rows: expected at least 1"),
        ({"preview_images": -1}, "preview_images: expected at least 1"),
        ({"seed": "x"}, "seed: expected a whole number"),
    ],
)
def test_no_request(settings: dict[str, Any], message: str) -> None:
    """A value of another type that fails in the worker's thread."""
    with pytest.raises(ValueError, match=message):
        ask(**settings)


def test_closing(model: Model, gate: Gate) -> None:
    """A client that waits for ever for a worker that is gone, or a job that is thrown away though
    there was time."""
    worker = worker_of(model)
    drawn = worker.submit(ask())
    gate.wait()
    threading.Timer(0.05, gate.open).start()
    worker.close(SECONDS)
    assert_same(drawn.result(0), model, ask())
    with pytest.raises(Closed):
        worker.submit(ask())
    worker = worker_of(model)
    left = worker.submit(ask(candidates=400, keep=400))
    worker.close()
    with pytest.raises(Closed):
        left.result(0)
    assert not worker.alive


def test_a_result_that_takes_too_long(model: Model, gate: Gate) -> None:
    """A wait without end, or one that gives the job up."""
    with worker_of(model) as worker:
        job = worker.submit(ask())
        gate.wait()
        with pytest.raises(TimeoutError):
            job.result(0.01)
        gate.open()
        assert_same(job.result(SECONDS), model, ask())


def test_models_that_cannot_be_served(make_model: ModelMaker) -> None:
    """A diverged model that shows with the first client."""
    with pytest.raises(ValueError, match="models: expected at least one"):
        SamplingWorker({})
    broken = make_model()
    with torch.no_grad():
        next(broken.transformer.parameters()).fill_(torch.nan)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"model 'b'.*not finite"):
        SamplingWorker({"a": make_model(), "b": broken})

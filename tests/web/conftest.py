"""A page on a socket of this machine, with a tiny model whose drawing the tests hold and let go."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dalle1.generation.defaults import SamplingDefaults
from dalle1.generation.generator import Generator
from dalle1.serving.requests import Limits
from dalle1.serving.worker import SamplingWorker
from dalle1.web.limits import PageLimits
from tests.conftest import ModelMaker
from tests.web.browser import find_browser, launch

SECONDS = 60.0
LIMITS = Limits(waiting=8, captions=3, letters=60, candidates=64, batch_size=16, gather_seconds=0)
PAGE = PageLimits(keep=8, upload_bytes=2**16, upload_pixels=10_000)


class Pace:
    """Lets token rows through, one by one, or all."""

    def __init__(self) -> None:
        self._rows = threading.Semaphore(0)
        self._free = threading.Event()
        self._free.set()

    def hold(self) -> None:
        """From here on every row waits."""
        self._free.clear()

    def let(self, rows: int) -> None:
        """Lets so many rows through."""
        for _ in range(rows):
            self._rows.release()

    def free(self) -> None:
        """Lets all rows through."""
        self._free.set()
        self.let(1)

    def wait(self) -> None:
        while not self._free.is_set():
            if self._rows.acquire(timeout=0.05):
                return


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pace]:
    """Every row of a drawing waits for it."""
    pace, plain = Pace(), Generator.draw

    def draw(
        generator: Generator,
        text: Tensor,
        uniforms: Tensor,
        prefix: Tensor | None,
        on_step: Callable[[int, Tensor], None],
    ) -> Tensor:
        def on_row(done: int, tokens: Tensor) -> None:
            pace.wait()
            on_step(done, tokens)

        return plain(generator, text, uniforms, prefix, on_row)

    monkeypatch.setattr(Generator, "draw", draw)
    yield pace
    pace.free()


@pytest.fixture
def worker(make_model: ModelMaker, pace: Pace) -> Iterator[SamplingWorker]:
    """Two models: one that ranks, and one that does not."""
    models = {"tiny": make_model(), "plain": make_model(clip=False, seed=1)}
    models["plain"].sampling = SamplingDefaults(temperature=0.75)
    with SamplingWorker(models, LIMITS) as worker:
        yield worker
        pace.free()


@dataclass
class Server:
    address: str
    app: Any


@contextmanager
def running(app: Any) -> Iterator[str]:
    """An application while the block runs: its address."""
    from dalle1.serving.api.server import bind, make_server
    from dalle1.web.server import address_of

    with bind("127.0.0.1", 0) as listening:
        server = make_server(app, SECONDS)
        thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
        thread.start()
        until = time.monotonic() + SECONDS
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        yield address_of(listening)
        server.should_exit = True
        thread.join(SECONDS)


@pytest.fixture
def server(worker: SamplingWorker) -> Iterator[Server]:
    """The page, as `dalle1 web` shows it."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'dalle1[web]'")
    from dalle1.web.server import create_app

    app = create_app(worker, page=PAGE)
    with running(app) as address:
        yield Server(address, app)


@pytest.fixture(scope="module")  # while it runs, no other test may run an event loop
def browser() -> Iterator[Any]:
    """Chromium of the system; skips where there is none, or nothing to drive it with."""
    pytest.importorskip("playwright", reason="no playwright to drive a browser")
    path = find_browser()
    if path is None:
        pytest.skip("no browser: chromium is not installed, and DALLE1_BROWSER is not set")
    with launch(path) as browser:
        yield browser


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Callable[[], Any]]:
    """Opens the page for another visitor. What leads away from this machine, and errors of the
    page's own scripts, fail the test."""
    contexts, faults = [], []

    def open_page() -> Any:
        context = browser.new_context(accept_downloads=True, viewport={"width": 900, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SECONDS * 1000)
        page.on("request", lambda r: _check_address(r.url, server.address, faults))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda m: m.type == "error" and faults.append(m.text))
        page.goto(server.address)
        page.wait_for_selector("#d1-draw")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def _check_address(url: str, address: str, faults: list[str]) -> None:
    if not url.startswith((address, "data:", "blob:")):
        faults.append(f"asked for {url}")


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port of this machine on which something else listens."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


@pytest.fixture
def model_folder(make_model: ModelMaker, tmp_path: Path) -> Path:
    """The folder of a tiny model."""
    make_model().save(tmp_path / "model")
    return tmp_path / "model"

"""Seconds until the first rows and until the gallery, in a browser; and screenshots of the page.

    python -m tests.web.measure --model FOLDER [--candidates 32] [--visitors 2] [--shots docs/web]

The page runs in this process, on the same cores as the browser. Prints a line of JSON for the first
drawing, in which memory is taken, for a later one, and for several visitors at once. Screenshots
are taken with the seed, so that they can be taken again.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from dalle1 import load
from dalle1.serving.api.server import bind, make_server
from dalle1.serving.worker import SamplingWorker
from dalle1.web.server import address_of, create_app
from tests.web.browser import find_browser, launch, open_section, write

LATE = 600_000  # milliseconds
COLORS = 128  # of a screenshot
# Of any number of rows: an image is as high as the share of them that is drawn.
HALF_DRAWN = """() => [...document.querySelectorAll(".d1-drawing img")].some(
  (image) => parseFloat(image.style.height) >= 50)"""
NOTE = """() => {
  const seen = (window.d1 = {});
  const note = (what) => { seen[what] ??= performance.now(); };
  document.querySelector("#d1-draw").addEventListener("click", () => note("click"), { once: true });
  new MutationObserver(() => {
    if (seen.click === undefined) return;
    if (document.querySelector(".d1-drawing img")) note("rows");
    if (seen.rows && document.querySelector(".d1-save")) note("gallery");
  }).observe(document.querySelector("#d1-pictures"), { childList: true, subtree: true });
}"""


@contextmanager
def page_of(worker: SamplingWorker) -> Iterator[str]:
    """The page while the block runs: its address."""
    started = threading.Event()
    with bind("127.0.0.1", 0) as bound:
        server = make_server(create_app(worker, started.set), LATE / 1000)
        thread = threading.Thread(target=lambda: server.run(sockets=[bound]), daemon=True)
        thread.start()
        started.wait()
        yield address_of(bound)
        server.should_exit = True
        thread.join()


class Visitor:
    """A browser's page, its form filled in."""

    def __init__(self, browser: Any, address: str, options: argparse.Namespace, **how: Any) -> None:
        self.page = browser.new_context(**how).new_page()
        self.page.set_default_timeout(LATE)
        self.page.goto(address)
        self.page.wait_for_selector("#d1-draw")
        open_section(self.page, "d1-options")
        self.page.uncheck('label:has-text("Another seed") input[type=checkbox]')
        write(self.page, "Seed", options.seed)
        if self.page.locator('input[aria-label$="Candidates"]').count():
            write(self.page, "Candidates", options.candidates)
        write(self.page, "Pictures", options.keep)
        open_section(self.page, "d1-options")
        self.page.fill("#d1-captions textarea", "\n".join(options.captions))

    def draw(self) -> None:
        """Begins to draw; the page itself notes when it shows what."""
        self.page.evaluate(NOTE)
        self.page.click("#d1-draw")

    def seen(self, what: str) -> float:
        """Seconds from the click until `rows` or `gallery` was seen; waits for it."""
        self.page.wait_for_function(f"window.d1.{what} !== undefined")
        found: float = self.page.evaluate(f"(window.d1.{what} - window.d1.click) / 1000")
        return found


def tell(what: str, seconds: dict[str, float]) -> None:
    print(json.dumps({"what": what, **{k: round(v, 2) for k, v in seconds.items()}}), flush=True)


def measure(browser: Any, address: str, options: argparse.Namespace) -> None:
    visitor = Visitor(browser, address, options)
    for what in ("the first drawing", "a later drawing"):
        visitor.draw()
        tell(what, {"first rows": visitor.seen("rows"), "gallery": visitor.seen("gallery")})
    visitors = [Visitor(browser, address, options) for _ in range(options.visitors)]
    for visitor in visitors:
        visitor.draw()
    seconds = [(visitor.seen("rows"), visitor.seen("gallery")) for visitor in visitors]
    rows, galleries = zip(*seconds, strict=True)
    tell(f"{options.visitors} visitors", {"last rows": max(rows), "last gallery": max(galleries)})


def take_shots(browser: Any, address: str, options: argparse.Namespace) -> None:
    """The page while it draws, its gallery, a completion, and a phone in the dark."""
    folder: Path = options.shots
    folder.mkdir(parents=True, exist_ok=True)

    def shoot(page: Any, name: str) -> None:
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)
        path = folder / f"{name}.png"
        page.screenshot(path=path)
        with Image.open(path) as image:
            image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(
                path, optimize=True
            )

    desk = Visitor(browser, address, options, viewport={"width": 1080, "height": 860})
    desk.draw()
    desk.page.wait_for_function(HALF_DRAWN)
    shoot(desk.page, "drawing")
    desk.seen("gallery")
    shoot(desk.page, "gallery")
    desk.page.locator(".d1-use").first.click()
    desk.page.wait_for_selector('.d1-drop img[src^="data:"]')
    shoot(desk.page, "completion")
    phone = Visitor(
        browser, address, options, viewport={"width": 390, "height": 844}, color_scheme="dark"
    )
    phone.draw()
    phone.seen("gallery")
    shoot(phone.page, "phone")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, and takes screenshots where a folder is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or name")
    parser.add_argument("--ranker", help="in place of the model's own")
    parser.add_argument("--captions", nargs="+", default=["a noto emoji of a frog"])
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--keep", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--visitors", type=int, default=2)
    parser.add_argument("--shots", type=Path)
    options = parser.parse_args(arguments)
    path = find_browser()
    if path is None:
        raise SystemExit("no browser: install chromium, or set DALLE1_BROWSER")
    with (
        SamplingWorker({"model": load(options.model, options.ranker)}) as worker,
        page_of(worker) as address,
        launch(path) as browser,
    ):
        measure(browser, address, options)
        if options.shots:
            take_shots(browser, address, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Chromium of the system, driven by playwright, and how the page's form is filled in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


def find_browser() -> str | None:
    """The program: what DALLE1_BROWSER names, or the system's; None where there is none."""
    return os.environ.get("DALLE1_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def launch(path: str) -> Iterator[Any]:
    """The browser while the block runs."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(OPTIONS))
        yield browser
        browser.close()


def open_section(page: Any, name: str) -> None:
    """Opens a folded section of the form, or folds it."""
    page.click(f"#{name} > button")


def write(page: Any, label: str, value: float | str) -> None:
    """Fills in the number field of a slider or a number."""
    field = page.locator(f'input[type=number][aria-label$="{label}"]')
    field.fill(str(value))
    field.blur()

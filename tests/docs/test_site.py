"""The site that `make docs` has made: its links, what it loads, what its reference names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import dalle1
import dvae
from dalle1 import clip, protocols, published
from dalle1.commands import main as cli
from dalle1.generation import decoding

MADE = os.environ.get("DALLE1_SITE")
pytestmark = pytest.mark.skipif(not MADE, reason="the site is made and tested by `make docs`")
SITE = Path(MADE or ".").resolve()
# Elements that load something, by the attribute that says what.
LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
OF_A_FORM = {"search.html", "genindex.html", "py-modindex.html"}  # Sphinx's own


class Page(HTMLParser):
    """What a page loads, links to and may be linked at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.meta: dict[str, str] = {}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "meta" and "name" in given:
            self.meta[given["name"]] = given.get("content", "")
        is_page = tag == "link" and given.get("rel") not in ("stylesheet", "icon", "preload")
        if tag in LOADS and LOADS[tag] in given and not is_page:
            self.loads.append(given[LOADS[tag]])


@pytest.fixture(scope="module")
def pages() -> dict[Path, Page]:
    """All pages of the site."""
    found = {path: Page(path) for path in sorted(SITE.rglob("*.html"))}
    assert len(found) > 20
    return found


def targets(path: Path, links: list[str]) -> Iterator[tuple[str, Path, str]]:
    """Links into the site, with the file and the anchor of each."""
    for link in links:
        parts = urlsplit(link)
        if not parts.scheme and not parts.netloc:
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            yield link, file, unquote(parts.fragment)


def test_every_link_of_the_site_leads_somewhere(pages: dict[Path, Page]) -> None:
    """A page, a file or an anchor that is not there when the site is opened from a disk."""
    broken = []
    for path, page in pages.items():
        for link, file, anchor in targets(path, page.links):
            found = pages.get(file)
            is_top = anchor in ("", "top") or path.name in OF_A_FORM
            if not file.is_file() or not (is_top or (found and anchor in found.anchors)):
                broken.append(f"{path.relative_to(SITE)}: {link}")
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page]) -> None:
    """A font, a script or an image of another server, which a reader offline does not get."""
    for path, page in pages.items():
        for address in page.loads:
            assert not urlsplit(address).netloc, f"{path.relative_to(SITE)}: {address}"
            if not address.startswith("data:"):
                assert (path.parent / unquote(urlsplit(address).path)).is_file(), address
    for style in SITE.rglob("*.css"):
        outside = re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"']*", style.read_text())
        assert outside == [], style


def test_pages_fit_a_phone(pages: dict[Path, Page]) -> None:
    """A page that a phone shows as a small picture of a wide one."""
    assert all("width=device-width" in page.meta.get("viewport", "") for page in pages.values())


def test_the_reference_has_every_public_name(pages: dict[Path, Page]) -> None:
    """A public name without an entry."""
    anchors = {
        anchor
        for path, page in pages.items()
        if path.parent.name == "api"
        for anchor in page.anchors
    }
    names = {f"dvae.{name}" for name in dvae.__all__}
    names |= {
        f"dalle1.{name}"
        for name in {*dalle1.__all__} - {"attention", "clip", "decoding", "published"}
    }
    names |= {f"dalle1.decoding.{name}" for name in {*decoding.__all__} - {"SamplingOptions"}}
    names |= {f"dalle1.clip.{name}" for name in {*clip.__all__} - {"CLIP", "CLIPConfig"}}
    names |= {f"dalle1.published.{name}" for name in published.__all__}
    own = (name for name, value in vars(protocols).items() if getattr(value, "_is_protocol", False))
    names |= {f"dalle1.protocols.{name}" for name in own if name != "Protocol"} - {
        "dalle1.protocols.Codec"
    }
    names.add("dalle1.attention.allowed")
    assert names - anchors == set()


def test_the_command_line_has_every_verb(pages: dict[Path, Page]) -> None:
    """A verb without a section, or whose options are left out."""
    page = pages[SITE / "commands.html"]
    assert {f"dalle1-{verb.replace(' ', '-')}" for verb in cli.VERBS} <= page.anchors
    text = (SITE / "commands.html").read_text(encoding="utf-8")
    assert all(
        f"--{flag}" in text for flag in ("candidates", "resume", "gpus-per-node", "download")
    )

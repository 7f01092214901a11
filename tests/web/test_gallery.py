"""The pictures as HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from dalle1.web.gallery import Entry, Gallery, Rows, gallery_html, rows_html
from dalle1.web.uploads import read_data_url
from tests.web.conftest import PAGE

EVIL = '<script>alert(1)</script>" onerror="alert(2)'
ENTRIES = [Entry(3, 0.5, b"first"), Entry(0, 0.25, b"second"), Entry(1, 0.1, b"third")]
GALLERY = Gallery("a red cat", 4, 2, 7, ENTRIES)


class Elements(HTMLParser):
    """The elements of a text, and whether each is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]


def test_tiles_have_what_ranking_needs() -> None:
    """A script that has no number or score to rank by; images beyond `keep` that are seen."""
    elements = Elements(gallery_html([GALLERY], (64, 64)))
    tiles = elements.of("li")
    assert [(t["data-number"], t["data-score"]) for t in tiles] == [
        ("3", "0.5"), ("0", "0.25"), ("1", "0.1")
    ]  # fmt: skip
    assert ["hidden" in t for t in tiles] == [False, False, True]
    assert elements.of("section")[0]["data-keep"] == "2"
    assert [read_data_url(i["src"], PAGE) for i in elements.of("img")] == [
        b"first", b"second", b"third"
    ]  # fmt: skip
    assert elements.of("input")[0]["max"] == "4"
    assert "the best 2 of 4" in elements.text and "seed 7" in elements.text
    assert elements.open == []


def test_without_scores_there_is_no_ranking() -> None:
    """Scores of None or NaN on the page."""
    gallery = Gallery("a red cat", 2, 2, 7, [Entry(0, None, b""), Entry(1, None, b"")])
    elements = Elements(gallery_html([gallery], (64, 64)))
    assert elements.of("input") == [] and "2 images" in elements.text
    assert not re.search("nan|None", elements.text)


def test_captions_are_escaped() -> None:
    """A caption that runs in another visitor's browser, or breaks the page."""
    html = gallery_html([Gallery(EVIL, 4, 2, 7, ENTRIES)], (64, 64))
    html += rows_html([Rows(EVIL, [], 0.5)], [EVIL], 2, (64, 64))
    elements = Elements(html)
    assert elements.of("script") == [] and elements.open == []
    assert not any("onerror" in attrs for _, attrs in elements.found)
    assert elements.text.count("alert(1)") == 3


def test_small_images_are_enlarged_with_hard_edges() -> None:
    """Pixel art that is blurred, or photographs in squares."""
    assert "d1-pixels" in gallery_html([GALLERY], (64, 64))
    assert "d1-pixels" not in gallery_html([GALLERY], (256, 256))


def test_rows_have_their_share_of_the_tile() -> None:
    """Upper rows that are stretched over the whole tile; tiles that jump when they are done."""
    rows = [Rows("a red cat", ["data:,1", "data:,2"], 0.375)]
    elements = Elements(rows_html(rows, ["a blue dog"], 3, (64, 64)))
    assert [image["style"] for image in elements.of("img")] == ["height: 37.50%"] * 2
    assert len(elements.of("li")) == 6  # as many as there will be
    assert elements.text == "a red cata blue dog"


def test_names_of_downloads() -> None:
    """A name that is a path, or the same one for two images."""
    elements = Elements(gallery_html([Gallery("../Ä red/cat", 4, 3, 7, ENTRIES)], (64, 64)))
    names = [button["data-name"] for button in elements.of("button") if "data-name" in button]
    assert names == ["red-cat-7-003.png", "red-cat-7-000.png", "red-cat-7-001.png"]

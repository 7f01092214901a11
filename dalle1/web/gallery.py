"""The pictures of the page as HTML: rows that are being drawn, and what is complete, ranked.

All texts are escaped. The order and the ranks of complete images are the script's (gallery.js):
every image has its number and its score, so the best of fewer candidates is shown at once, without
drawing and without asking the server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dalle1.common.files import slug
from dalle1.web.uploads import data_url

SMALL = 128  # pixels: images up to this side are enlarged with hard edges


@dataclass(frozen=True)
class Entry:
    """A complete image."""

    number: int  # of the candidate
    score: float | None  # the ranker's
    png: bytes  # with its settings inside


@dataclass(frozen=True)
class Gallery:
    """Complete images of a caption."""

    caption: str
    drawn: int  # candidates that they were chosen among
    keep: int
    seed: int
    entries: Sequence[Entry]  # best first; and then those that are best of fewer candidates


@dataclass(frozen=True)
class Rows:
    """A caption that is being drawn: the upper parts of its first candidates, as far as they go."""

    caption: str
    images: Sequence[str]  # data URLs
    share: float  # of each image that is drawn, in [0, 1]


def gallery_html(galleries: Sequence[Gallery], size: tuple[int, int]) -> str:
    """The captions' complete images.

    size: width and height of an image in pixels.
    """
    return "".join(_gallery(gallery, size) for gallery in galleries)


def rows_html(
    rows: Sequence[Rows], waiting: Sequence[str], keep: int, size: tuple[int, int]
) -> str:
    """Captions that are being drawn, and those that wait, as empty tiles.

    keep: tiles of a caption.
    """
    shown = [_rows(row, keep, size) for row in rows]
    return "".join(shown + [_rows(Rows(caption, (), 0.0), keep, size) for caption in waiting])


def _gallery(gallery: Gallery, size: tuple[int, int]) -> str:
    ranked = any(entry.score is not None for entry in gallery.entries)
    tiles = "".join(_tile(gallery, place, entry) for place, entry in enumerate(gallery.entries))
    shown = min(gallery.keep, len(gallery.entries))
    note = f"the best {shown} of {gallery.drawn}" if ranked else f"{shown} images"
    return (
        f'<section class="d1-caption" data-keep="{gallery.keep}">'
        f"<header><h3>{escape(gallery.caption)}</h3>"
        f'<p class="d1-note"><span class="d1-count">{note}</span> · seed {gallery.seed}</p>'
        "</header>"
        + (_slider(gallery) if ranked and gallery.drawn > 1 else "")
        + f'<ol class="d1-tiles{_pixelated(size)}" style="{_ratio(size)}">{tiles}</ol></section>'
    )


def _tile(gallery: Gallery, place: int, entry: Entry) -> str:
    scored = entry.score is not None and math.isfinite(entry.score)
    score = f'<span class="d1-score">{entry.score:.3f}</span>' if scored else ""
    hidden = "" if place < gallery.keep else " hidden"
    name = escape(file_name(gallery, entry.number))
    alt = escape(f"{gallery.caption}, candidate {entry.number}")
    return (
        f'<li class="d1-tile" data-number="{entry.number}" data-score="{entry.score}"'
        f' style="order: {place}"{hidden}>'
        f'<button class="d1-look" title="Look at it closely">'
        f'<img src="{data_url(entry.png)}" alt="{alt}" draggable="false"></button>'
        f'<div class="d1-bar"><span class="d1-rank">{place + 1}</span>{score}'
        f'<button class="d1-use" title="Keep its upper rows and draw the rest again">Continue'
        f'</button><button class="d1-save" data-name="{name}" '
        'title="Download the PNG, with its settings inside">Save</button></div></li>'
    )


def _slider(gallery: Gallery) -> str:
    return (
        '<label class="d1-best">Best of the first '
        f'<output>{gallery.drawn}</output><input type="range" class="d1-first" min="1" '
        f'max="{gallery.drawn}" value="{gallery.drawn}" '
        f'aria-label="candidates that are ranked: {escape(gallery.caption)}"></label>'
    )


def _rows(rows: Rows, keep: int, size: tuple[int, int]) -> str:
    tiles = "".join(
        f'<li class="d1-tile"><span class="d1-look"><img src="{url}" alt="" '
        f'style="height: {100 * rows.share:.2f}%"></span></li>'
        for url in rows.images[:keep]
    )
    empty = '<li class="d1-tile"><span class="d1-look"></span></li>' * (keep - len(rows.images))
    return (
        '<section class="d1-caption d1-drawing"><header>'
        f"<h3>{escape(rows.caption)}</h3></header>"
        f'<ol class="d1-tiles{_pixelated(size)}" style="{_ratio(size)}">{tiles}{empty}</ol>'
        "</section>"
    )


def file_name(gallery: Gallery, number: int) -> str:
    """The name that an image is downloaded under."""
    return f"{slug(gallery.caption, 'caption')}-{gallery.seed}-{number:03d}.png"


def _ratio(size: tuple[int, int]) -> str:
    return f"--ratio: {size[0]} / {size[1]}"


def _pixelated(size: tuple[int, int]) -> str:
    return " d1-pixels" if max(size) <= SMALL else ""

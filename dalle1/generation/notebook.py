"""Results and previews in notebooks, of a size that a notebook can keep.

Dimensions: b candidates, H W image height and width.
"""

from __future__ import annotations

import base64
import html
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from dalle1.common.images import contact_sheet
from dalle1.common.png_settings import png_bytes
from dalle1.generation.previews import Preview, unfinished_image

# Of a result at most so many captions and images of each are shown, and so many letters of a
# caption; all images together have at most so many pixels: a few MB in the notebook's file.
MAX_CAPTIONS, MAX_IMAGES, MAX_LETTERS = 16, 16, 300
MAX_PIXELS = 2**20
MIN_SIDE, MAX_SIDE = 64, 256  # pixels of an image's width on the page
# Of a preview: it is drawn anew after every few token rows.
PREVIEW_CAPTIONS, PREVIEW_IMAGES = 4, 8


def html_sheet(
    captions: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    scores: Tensor,
    encode: Callable[[int, int], bytes],
) -> str:
    """A table with a row for each caption: its images, best first, each with its score.

    Args:
        images: of each caption, all of one size.
        scores: float32 [captions, images]; NaN is left out.
        encode: the PNG of images[i][j] as it is kept; not asked where the image is shown smaller.
    """
    shown = [list(row[:MAX_IMAGES]) for row in images[:MAX_CAPTIONS]]
    width = shown[0][0].width if shown and shown[0] else 1
    smaller = _fitting(shown)
    zoomed = min(MAX_SIDE, width * max(1, -(-MIN_SIDE // width)))
    parts = ["<table>"]
    for i, row in enumerate(shown):
        cells = []
        for j, image in enumerate(row):
            same = smaller[i][j] is image
            data = encode(i, j) if same else png_bytes(smaller[i][j], None)
            score = float(scores[i, j])
            told = f"<br>{score:.3f}" if math.isfinite(score) else ""
            cells.append(
                '<td style="text-align:center"><img style="image-rendering:pixelated" '
                f'width="{zoomed}" alt="" src="data:image/png;base64,{_base64(data)}">{told}</td>'
            )
        caption = html.escape(_cut(captions[i]))
        parts.append(
            '<tr><td style="text-align:left;max-width:14em;overflow-wrap:anywhere">'
            f"{caption}</td>{''.join(cells)}</tr>"
        )
    parts.append("</table>")
    left_out = _left_out(captions, images)
    return "\n".join([*parts, f"<p>{left_out}</p>"] if left_out else parts)


def png_sheet(captions: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> bytes:
    """A contact sheet of the same images as a PNG."""
    shown = _fitting([list(row[:MAX_IMAGES]) for row in images[:MAX_CAPTIONS]])
    return png_bytes(contact_sheet(shown, [_cut(text) for text in captions[:MAX_CAPTIONS]]), None)


def _fitting(rows: list[list[Image.Image]]) -> list[list[Image.Image]]:
    """The images themselves, or smaller copies of all where they would be too much."""
    count = sum(map(len, rows))
    if not count:
        return rows
    width, height = rows[0][0].size
    most = min(MAX_SIDE**2, MAX_PIXELS // count)
    if width * height <= most:
        return rows
    scale = math.sqrt(most / (width * height))
    size = max(1, int(width * scale)), max(1, int(height * scale))
    return [[image.resize(size, Image.Resampling.LANCZOS) for image in row] for row in rows]


def _left_out(captions: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> str:
    """What a sheet does not show, in words."""
    parts = []
    if len(captions) > MAX_CAPTIONS:
        parts.append(f"{len(captions) - MAX_CAPTIONS} more captions")
    longest = max(map(len, images), default=0)
    if longest > MAX_IMAGES:
        parts.append(f"{longest - MAX_IMAGES} more images of a caption")
    return f"Not shown: {' and '.join(parts)}; <code>save</code> writes all." if parts else ""


def _cut(caption: str) -> str:
    return caption if len(caption) <= MAX_LETTERS else caption[:MAX_LETTERS] + " ..."


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


class PreviewCell:
    """The output of a notebook's cell that shows the images as they are drawn.

    It has the first PREVIEW_IMAGES candidates of each batch, and the PREVIEW_CAPTIONS captions that
    were drawn last. What is not drawn yet is gray.
    """

    def __init__(self, display: Callable[..., Any], height: int) -> None:
        """
        Args:
            display: IPython's.
            height: of a full image in pixels.
        """
        self._display, self._height = display, height
        self._handle: Any = None
        self._rows: dict[str, list[Image.Image]] = {}

    def update(self, preview: Preview) -> None:
        """Shows the newest rows of a caption's candidates in place of those before."""
        self._rows.pop(preview.caption, None)  # the newest comes last
        self._rows[preview.caption] = [
            unfinished_image(image, self._height) for image in preview.images[:PREVIEW_IMAGES]
        ]
        for caption in list(self._rows)[:-PREVIEW_CAPTIONS]:
            del self._rows[caption]
        self._show({"image/png": _base64(png_sheet(list(self._rows), list(self._rows.values())))})

    def finish(self, page: str, sheet: bytes | None) -> None:
        """Shows the result, as HTML and as a PNG, in place of the last preview."""
        self._show({"text/html": page, **({"image/png": _base64(sheet)} if sheet else {})})

    def _show(self, content: dict[str, str]) -> None:
        content = {"text/plain": "images of dalle1.sample", **content}
        if self._handle is None:
            self._handle = self._display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def open_preview_cell(height: int) -> PreviewCell | None:
    """A cell for previews in the notebook that runs this; None outside of notebooks, with a line on
    stderr.

    height: of a full image in pixels.
    """
    # A notebook's kernel has IPython imported; a terminal's IPython has no kernel.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if getattr(shell, "kernel", None) is None:
        print(
            "preview: expected a notebook, got a plain Python; drawing without it (on_step gets "
            "previews anywhere)",
            file=sys.stderr,
        )
        return None
    from IPython.display import display

    return PreviewCell(display, height)

"""`dalle1.sample` and `dalle1.rank`: a caption in, the best images out (paper section 2.6).

Dimensions: b candidates, m image positions, r c rows and columns of the token grid, H W image
height and width.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dalle1 import models
from dalle1.common.arguments import as_captions, as_int
from dalle1.common.image_inputs import ImageLike
from dalle1.common.progress import progress_bar
from dalle1.common.weights import dtype_name
from dalle1.generation.batches import CaptionImages, CaptionParts, Part, draw_parts
from dalle1.generation.defaults import OWN, SamplingDefaults
from dalle1.generation.notebook import PREVIEW_IMAGES, open_preview_cell
from dalle1.generation.previews import Preview as Preview
from dalle1.generation.previews import Previews
from dalle1.generation.ranking import BestImages, best_images
from dalle1.generation.requests import DrawRequest, image_pixels
from dalle1.generation.result import Result as Result
from dalle1.model import Model, load
from dalle1.protocols import Ranker, cuts_told_once
from dvae.calls import isolated

MODEL_VARIABLE = "DALLE1_MODEL"


@isolated()
def sample(
    captions: str | Iterable[str],
    model: Model | str | Path | None = None,
    candidates: int = 512,
    keep: int = 8,
    temperature: float | Literal["own"] = OWN,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float | Literal["own"] = OWN,
    image: ImageLike | None = None,
    rows: int = 0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    on_step: Callable[[Preview], None] | None = None,
    preview_rows: int = 4,
    window: int | None = None,
    first_candidate: int = 0,
    preview: bool = False,
) -> Result:
    """Draws candidates for each caption and returns the best by the ranker (section 2.6).

    Ctrl-C returns what is complete: the captions that are done, and the caption in progress if at
    least `keep` of its candidates are done. `settings["drawn"]` says how many each has. With
    nothing complete, a KeyboardInterrupt is raised.

    What the caller has set in torch (autocast, the default type or device, inference mode) changes
    neither images nor scores. Numbers may be NumPy's, and captions an array or a column of a table.

    Args:
        captions: one or a list.
        model: a Model, its folder, or its name (`dalle1.models`); None: what the environment
            variable DALLE1_MODEL names, or else the model that comes with the library.
        candidates: drawn for each caption.
        keep: returned for each caption. A model without a ranker needs keep = candidates, and
            returns them with scores of NaN.
        temperature, guidance: see `SamplingOptions`; "own": as the model's folder says, or else the
            paper's 1 (`Model.sampling`).
        top_k, top_p: see `SamplingOptions`.
        image: an image to complete: PIL's, a file, or pixels (see `rank`).
        rows: token rows of `image` that every candidate begins with.
        seed: candidate i depends on (seed, caption, i) alone.
        batch_size: candidates drawn at once; None: as many as memory allows, halved when memory
            runs out all the same.
        progress: whether a progress bar is shown.
        on_step: called with a `Preview` whenever another `preview_rows` token rows of a batch are
            drawn.
        preview_rows: token rows between two previews, of `on_step` and of `preview`.
        window: see `SamplingOptions`; it changes the time alone.
        first_candidate: number of the first candidate that is drawn; those of other calls are
            drawn again, or go on, by their numbers (`Result.candidate_numbers`).
        preview: whether the cell of a notebook shows the first candidates of each batch while they
            are drawn, and then the result. Outside of notebooks a line on stderr says that there
            is none.

    Raises:
        ValueError: an argument does not fit. It is raised before anything is drawn.
    """
    captions, _ = as_captions(captions)
    asked = (temperature, top_k, top_p, guidance, window)
    request = DrawRequest(
        tuple(captions),
        as_int(candidates, "candidates"),
        as_int(keep, "keep"),
        SamplingDefaults().options(*asked),  # wrong ones are told of before a model is opened
        as_int(seed, "seed"),
        as_int(rows, "rows"),
        first=as_int(first_candidate, "first_candidate"),
    )
    batch_size = None if batch_size is None else as_int(batch_size, "batch_size")
    preview_rows = as_int(preview_rows, "preview_rows")
    model = resolve(model)
    model.check_finite()
    request = replace(request, options=model.sampling.options(*asked))
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step: expected a function, got {type(on_step).__name__}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1 or None, got {batch_size}")
    if preview_rows < 1:
        raise ValueError(f"preview_rows: expected at least 1, got {preview_rows}")
    with cuts_told_once():
        request = replace(request, pixels=image_pixels(image))
        request.check(model, ranked=model.ranker is not None)
        cell = open_preview_cell(model.image_size) if preview else None
        listeners = [*([on_step] if on_step else []), *([cell.update] if cell else [])]
        limit = None if on_step else PREVIEW_IMAGES
        previews = Previews(model, captions, preview_rows, listeners, limit) if listeners else None
        kept = _draw(model, request, batch_size, progress, previews)
    result = make_result(model, request, kept)
    if cell:
        cell.finish(result._repr_html_(), result._repr_png_())
    return result


def _draw(
    model: Model,
    request: DrawRequest,
    batch_size: int | None,
    progress: bool,
    previews: Previews | None,
) -> list[BestImages]:
    """The best images of each complete caption; of all captions, unless Ctrl-C was pressed."""
    kept: list[BestImages] = []
    captions = request.captions
    unfinished = CaptionParts(model)  # of the caption in progress
    rows, columns = model.prior.grid
    total = len(captions) * request.candidates
    stopped = False
    with progress_bar(total=total, unit="image", desc="drawing", disable=not progress) as bar:

        def on_row(part: Part, done: int) -> None:
            # In images: the parts before this one, and the share of this one's positions.
            first = part.candidates.start - request.first
            before = part.captions.start * request.candidates + first
            share = done * len(part.captions) * len(part.candidates) // (rows * columns)
            bar.update(before + share - bar.n)
            if previews:
                previews.show(part, done // columns)

        def keep_best(drawn: CaptionImages) -> None:
            caption = captions[len(kept)]
            kept.append(best_images(model, model.ranker, caption, drawn, request))

        try:
            for drawn in _complete(model, request, batch_size, unfinished, on_row):
                keep_best(drawn)
        except KeyboardInterrupt:
            stopped = True
            if len(unfinished) >= request.keep:
                with suppress(KeyboardInterrupt):  # pressed again while these are ranked
                    keep_best(unfinished.take())
    if stopped:
        if not kept:
            raise KeyboardInterrupt
        print(
            f"stopped: {sum(k.drawn for k in kept)} of {total} candidates are complete",
            file=sys.stderr,
        )
    return kept


def _complete(
    model: Model,
    request: DrawRequest,
    batch_size: int | None,
    unfinished: CaptionParts,
    on_row: Callable[[Part, int], None],
) -> Iterator[CaptionImages]:
    """Captions whose candidates are all drawn, in order.

    unfinished: holds the candidates so far of the caption in progress.
    """
    stop = request.first + request.candidates
    for part in draw_parts(
        model,
        request.captions,
        stop,
        request.seed,
        batch_size,
        request.options,
        request.prefix(model),
        on_row,
        request.first,
    ):
        yield from unfinished.add(part, stop)


def make_result(model: Model, request: DrawRequest, kept: Sequence[BestImages]) -> Result:
    """The result of a request's captions that are done: the first ones, in order."""
    settings = {
        "candidates": request.candidates,
        "first_candidate": request.first,
        "drawn": [k.drawn for k in kept],
        "keep": request.keep,
        **asdict(request.options),
        "rows": request.rows,
        "seed": request.seed,
        "dtype": dtype_name(model.prior),
        "model": model.fingerprint(),
    }
    return Result(
        list(request.captions[: len(kept)]),
        [k.images for k in kept],
        torch.stack([k.tokens for k in kept]),
        torch.stack([k.scores for k in kept]),
        settings,
        torch.stack([k.numbers for k in kept]),
        [
            make_result(model, replace(request, captions=(caption,)), [k.of_fewer])
            for caption, k in zip(request.captions, kept, strict=False)
            if k.of_fewer is not None
        ],
    )


@isolated()
def rank(
    captions: str | Iterable[str],
    images: ImageLike | Iterable[ImageLike],
    model: Model | str | Path | None = None,
) -> Tensor:
    """The ranker's scores of images; the higher, the better an image fits its caption.

    Args:
        captions: one or a list.
        images: one or a list of: PIL images of any size and mode, image files, NumPy arrays
            [H, W, 3] of uint8 or of floats in [0, 1], tensors [3, H, W] of floats in [0, 1]. A
            batch in an array [b, H, W, 3] or a tensor [b, 3, H, W] will do, and gray pixels, too.
        model: as for `sample`.

    Returns:
        float32 [images] for one caption, [captions, images] for a list.

    Raises:
        ValueError: the model has no ranker, or captions or images do not fit.
    """
    model = resolve(model)
    model.check_finite()
    return model.rank(captions, images)


def resolve(model: Model | str | Path | None, ranker: Ranker | str | Path | None = None) -> Model:
    """The Model that `sample` and `rank` are given: itself, its folder or name, or None.

    None stands for what DALLE1_MODEL names, or else for the model that comes with the library. That
    one is told in a line on stderr, so that nobody takes it for a model of another kind.

    ranker: in place of the folder's own; see `dalle1.load`.

    Raises:
        ValueError: it cannot be loaded; or none is given, and none comes with this installation.
    """
    if isinstance(model, Model):
        return model
    if model is not None and not isinstance(model, str | os.PathLike):
        raise ValueError(f"model: expected a Model or its folder, got {type(model).__name__}")
    if model is None:
        model = os.environ.get(MODEL_VARIABLE) or models.default()
    return load(model, ranker)

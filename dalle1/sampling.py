"""`dalle1.sample` and `dalle1.rank`: a caption in, the best pictures out (paper section 2.6).

Dimensions: b candidates, r c rows and columns of the token grid, H W picture.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dalle1.clip.ranker import score
from dalle1.common.files import write_text
from dalle1.common.images import contact_sheet, to_rgb
from dalle1.generation.batches import Part, draw_parts, pictures_at_once
from dalle1.generation.options import Options
from dalle1.model import Model, load

MODEL_VARIABLE = "DALLE1_MODEL"


@dataclass
class Result:
    """What `sample` returns, for each caption the best `keep`, best first."""

    captions: list[str]
    images: list[list[Image.Image]]  # [captions][keep]
    tokens: Tensor  # int64 [captions, keep, rows, columns]
    scores: Tensor  # float32 [captions, keep], cosine similarity; NaN without a CLIP
    settings: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Writes a PNG for each picture, `sheet.png` and `result.json`; returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        entries = []
        for i, (caption, images) in enumerate(zip(self.captions, self.images, strict=True)):
            slug = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60] or "caption"
            names = [f"{i:03d}-{slug}-{j:02d}.png" for j in range(len(images))]
            for name, image in zip(names, images, strict=True):
                image.save(folder / name)
            scores = [None if s != s else round(s, 6) for s in self.scores[i].tolist()]
            entries.append({"caption": caption, "files": names, "scores": scores})
        contact_sheet(self.images, self.captions).save(folder / "sheet.png")
        content = {"settings": self.settings, "results": entries}
        write_text(folder / "result.json", json.dumps(content, indent=2) + "\n")
        return folder


@dataclass
class Preview:
    """What is drawn so far of one batch of candidates."""

    caption: str
    first: int  # candidate number of images[0]
    rows: int  # token rows that are drawn
    images: Tensor  # float32 [b, 3, rows x stride, W] in [0, 1]: the pictures' upper parts


def sample(
    captions: str | Sequence[str],
    model: Model | str | Path | None = None,
    candidates: int = 512,
    keep: int = 8,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    image: Image.Image | None = None,
    rows: int = 0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    on_step: Callable[[Preview], None] | None = None,
    preview_rows: int = 4,
) -> Result:
    """Draws candidates for each caption and returns the best by CLIP (section 2.6).

    captions: one or a list. model: a Model or its folder; left out, the folder that the
    environment's DALLE1_MODEL names. candidates: drawn for each caption; keep: returned for each.
    temperature, top_k, top_p, guidance: see `dalle1.decoding.Options`. image, rows: completion,
    every candidate begins with this image's first `rows` token rows. seed: candidate i depends on
    (seed, caption, i) alone. batch_size: candidates drawn at once; None, as many as memory allows,
    halved when memory runs out all the same. on_step: called with a `Preview` whenever another
    `preview_rows` token rows of a batch are drawn.

    Ctrl-C returns what is complete: the captions that are done and, if at least `keep` of its
    candidates are, the one in work; `settings["drawn"]` says how many each has. With nothing
    complete it is a KeyboardInterrupt.

    Raises ValueError before anything is drawn when an argument does not fit; a model without CLIP
    can only be asked for keep = candidates, and returns them unranked with scores of NaN.
    """
    captions = [captions] if isinstance(captions, str) else list(captions)
    model = resolve(model)
    model.check_finite()
    options = Options(temperature, top_k, top_p, guidance)
    if not captions:
        raise ValueError("captions: expected at least one")
    if candidates < 1:
        raise ValueError(f"candidates: expected at least 1, got {candidates}")
    if not 1 <= keep <= candidates:
        raise ValueError(f"keep: expected 1 to candidates = {candidates}, got {keep}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1 or None, got {batch_size}")
    if model.clip is None and keep < candidates:
        raise ValueError(
            f"the model has no CLIP to rank with: ask for keep = candidates = {candidates}, or "
            "train configs/shapes/clip.yaml and export again"
        )
    if preview_rows < 1:
        raise ValueError(f"preview_rows: expected at least 1, got {preview_rows}")
    for caption in captions:
        model.tokenizer.encode(caption)  # an empty caption is a mistake
    prefix = _prefix(model, image, rows)
    grid = model.transformer.config.grid

    kept: list[_Kept] = []
    parts: list[Tensor] = []  # of the caption in work
    total = len(captions) * candidates
    stopped = False
    with tqdm(total=total, unit="picture", desc="drawing", disable=not progress) as bar:

        def on_row(part: Part, done: int) -> None:
            share = done * len(part.captions) * len(part.candidates) // grid**2
            bar.update(part.captions.start * candidates + part.candidates.start + share - bar.n)
            if on_step and (done // grid % preview_rows == 0 or done == grid**2):
                _preview(model, captions, part, done // grid, on_step)

        def rank_caption() -> None:
            tokens = torch.cat(parts)
            best = _best(model, captions[len(kept)], tokens, keep)
            parts.clear()  # first: what Ctrl-C finds here must not be ranked as the next caption
            kept.append(best)

        try:
            for part in draw_parts(
                model, captions, candidates, seed, batch_size, options, prefix, on_row
            ):
                for tokens in part.tokens:
                    parts.append(tokens)
                    if part.candidates.stop == candidates:
                        rank_caption()
        except KeyboardInterrupt:
            stopped = True
            if sum(map(len, parts)) >= keep:
                with suppress(KeyboardInterrupt):  # a second one, while ranking
                    rank_caption()
    if stopped:
        if not kept:
            raise KeyboardInterrupt
        print(
            f"stopped: {sum(k.drawn for k in kept)} of {total} candidates are complete",
            file=sys.stderr,
        )
    settings = {
        "candidates": candidates,
        "drawn": [k.drawn for k in kept],
        "keep": keep,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "guidance": guidance,
        "rows": rows,
        "seed": seed,
    }
    return Result(
        captions[: len(kept)],
        [k.images for k in kept],
        torch.stack([k.tokens for k in kept]),
        torch.stack([k.scores for k in kept]),
        settings,
    )


@dataclass
class _Kept:
    """The best of one caption's candidates, and of how many."""

    drawn: int
    tokens: Tensor  # int64 [keep, rows, columns]
    scores: Tensor  # float32 [keep]
    images: list[Image.Image]


def _best(model: Model, caption: str, tokens: Tensor, keep: int) -> _Kept:
    """The best of candidates [b, rows x columns] by CLIP, or the first where there is none."""
    images = decode(model, tokens)
    scores = torch.full((len(tokens),), float("nan"))
    order = torch.arange(keep)
    if model.clip is not None:
        scores = score(model.clip, clip_ids(model, caption), images)
        order = scores.argsort(descending=True, stable=True)[:keep]
    folded = rearrange(tokens[order], "b (r c) -> b r c", r=model.transformer.config.grid)
    return _Kept(len(tokens), folded, scores[order], [to_pil(picture) for picture in images[order]])


def _preview(
    model: Model,
    captions: Sequence[str],
    part: Part,
    rows: int,
    on_step: Callable[[Preview], None],
) -> None:
    """Hands over the first rows of a part's pictures, caption by caption."""
    done = rows * model.transformer.config.grid
    for i, tokens in zip(part.captions, part.tokens, strict=True):
        images = decode(model, tokens[:, :done])
        on_step(Preview(captions[i], part.candidates.start, rows, images))


def rank(
    caption: str,
    images: Sequence[Image.Image] | Tensor,
    model: Model | str | Path | None = None,
) -> Tensor:
    """CLIP's cosine similarity of a caption with each picture: float32 [len(images)].

    images: PIL pictures of any size and mode, or floats [n, 3, H, W] in [0, 1].
    """
    model = resolve(model)
    model.check_finite()
    if model.clip is None:
        raise ValueError("the model has no CLIP to rank with; its folder lacks clip.safetensors")
    text = clip_ids(model, caption)
    if len(images) == 0:
        raise ValueError("images: expected at least one")
    if isinstance(images, Tensor):
        return score(model.clip, text, images)
    # One at a time, because pictures may differ in size.
    parts = [score(model.clip, text, to_tensor(picture)[None]) for picture in images]
    return torch.cat(parts)


def resolve(model: Model | str | Path | None) -> Model:
    """A Model of what `sample` and `rank` accept; ValueError when none is named."""
    if isinstance(model, Model):
        return model
    if model is None:
        model = os.environ.get(MODEL_VARIABLE)
        if not model:
            raise ValueError(
                f"model: give a Model or its folder, or set {MODEL_VARIABLE} to a folder"
            )
    return load(model)


@torch.inference_mode()
def decode(model: Model, tokens: Tensor) -> Tensor:
    """Pictures of tokens [b, rows x columns]: float32 [b, 3, H, W] in [0, 1], on the CPU.

    Fewer rows than the grid's give the pictures' upper parts. A few pictures at a time.
    """
    grid = model.transformer.config.grid
    device = next(model.dvae.parameters()).device
    folded = rearrange(tokens, "b (r c) -> b r c", c=grid)
    parts = folded.split(pictures_at_once(model))
    return torch.cat([model.dvae.decode(part.to(device)).float().cpu() for part in parts])


def clip_ids(model: Model, caption: str) -> Tensor:
    """The caption as the model's CLIP reads it: int64 [1, t]."""
    assert model.clip is not None
    return model.clip.ids(caption)


def to_pil(picture: Tensor) -> Image.Image:
    """Pixels [3, H, W] in [0, 1] as an 8-bit RGB picture."""
    pixels = (picture * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy())


def to_tensor(picture: Image.Image) -> Tensor:
    """A picture of any mode (see `to_rgb`) as float32 pixels [3, H, W] in [0, 1]."""
    pixels = torch.from_numpy(np.array(to_rgb(picture)))
    return rearrange(pixels, "h w c -> c h w").float() / 255


def _prefix(model: Model, image: Image.Image | None, rows: int) -> Tensor | None:
    """The tokens of the first rows of the image to complete: int64 [rows x columns]."""
    grid, side = model.transformer.config.grid, model.image_size
    if image is None:
        if rows:
            raise ValueError(f"rows: {rows} rows of which image? Give image too")
        return None
    if not 0 < rows < grid:
        raise ValueError(f"rows: expected 1 to {grid - 1} of the {grid} token rows, got {rows}")
    if not isinstance(image, Image.Image):
        raise ValueError(f"image: expected a PIL image, got {type(image).__name__}")
    if image.size != (side, side):
        raise ValueError(
            f"image: expected {side}x{side} pixels, got {image.size[0]}x{image.size[1]}"
        )
    device = next(model.dvae.parameters()).device
    tokens = model.dvae.encode(to_tensor(image)[None].to(device))
    return tokens[0, :rows].flatten().cpu()

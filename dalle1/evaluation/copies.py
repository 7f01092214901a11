"""What a codec's copies of true images still show: PSNR, and the judge's word on each.

Dimensions: b images, h w rows and columns of tokens, H W image height and width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from dalle1 import registry
from dalle1.common.files import check_writable
from dalle1.common.images import contact_sheet, to_pil
from dalle1.common.progress import progress_bar
from dalle1.common.weights import device_of, in_32_bits
from dalle1.evaluation.config import CopySettings
from dalle1.evaluation.judged import JudgedData, Prompt, open_judged
from dalle1.evaluation.metrics import BATCH, Point, interval
from dalle1.evaluation.tables import by_group_and_kind, judged_shares, save_results, spread
from dalle1.generation.images import decode
from dvae.codec import Codec

RESULT, SHEET = "copies.json", "copies.png"


def run_copies(settings: CopySettings, device: str = "cpu", progress: bool = True) -> Path:
    """Copies the true images of all captions and reports what is left of them.

    Returns:
        The file of the results, beside which the contact sheet lies.

    Raises:
        ValueError: the data have no judge, or the codec cannot be opened or takes no such images.
    """
    check_writable(settings.run, "run")
    data = open_judged(settings)
    if data is None:
        raise ValueError("judge: expected data that are judged, such as judge=emoji, got none")
    codec: Codec = in_32_bits(registry.load("codec", settings.codec))
    if isinstance(codec, torch.nn.Module):
        codec.to(device).eval()
    prompts = data.prompts()
    shown = spread(prompts, settings.sheet_captions)
    rows: dict[Prompt, tuple[Tensor, Tensor]] = {}
    errors, checks, true_checks = [], [], []
    bar = progress_bar(total=len(prompts), unit="image", desc="copying", disable=not progress)
    for prompt, true, copy in _copies(codec, data, prompts, settings.image_size or data.side):
        errors.append(float((copy - true).square().mean()))
        checks.append(data.check(copy, prompt.caption))
        true_checks.append(data.check(true, prompt.caption))
        if prompt in shown:
            rows[prompt] = true, copy
        bar.update()
    bar.close()

    def figures(numbers: Sequence[int]) -> dict[str, Any]:
        return {
            "images": len(numbers),
            "psnr": psnr([errors[i] for i in numbers], settings.bootstrap),
            **{
                name: judged_shares([of[i] for i in numbers], data.attributes, settings.bootstrap)
                for name, of in (("copies", checks), ("true images", true_checks))
            },
        }

    results = {
        "settings": settings.model_dump(),
        "notes": data.notes(),
        "groups": by_group_and_kind(prompts, figures),
    }
    folder = Path(settings.run)
    save_results(settings, results, folder / RESULT)
    pairs = [[to_pil(image) for image in rows[prompt]] for prompt in shown]
    contact_sheet(pairs, [p.caption for p in shown], ("true", "copy")).save(folder / SHEET)
    return folder / RESULT


def psnr(errors: Sequence[float], resamples: int) -> Point | None:
    """The peak signal-to-noise ratio in dB, of the mean squared error over all images, with its
    95 % interval; None where there is no error.

    errors: mean squared errors of images in [0, 1].
    """
    low, high = interval(errors, resamples)
    if low <= 0:
        return None
    mean = sum(errors) / len(errors)
    return {"mean": _decibels(mean), "interval": [_decibels(high), _decibels(low)]}


def _decibels(error: float) -> float:
    return -10 * math.log10(error)


def _copies(
    codec: Codec, data: JudgedData, prompts: Sequence[Prompt], side: int
) -> Iterator[tuple[Prompt, Tensor, Tensor]]:
    """Each prompt, its true image and the copy: float32 [3, H, W] in [0, 1] of the copy's size."""
    for first in range(0, len(prompts), BATCH):
        part = prompts[first : first + BATCH]
        images = torch.stack([data.image(prompt, side) for prompt in part])
        with torch.no_grad():
            tokens = codec.encode(images.to(device_of(codec)))  # [b, h, w]
        grid = (tokens.shape[1], tokens.shape[2])
        copies = decode(codec, rearrange(tokens, "b h w -> b (h w)"), grid)
        size = copies.shape[2]
        for prompt, image, copy in zip(part, images, copies, strict=True):
            yield prompt, image if size == side else data.image(prompt, size), copy

"""What a codec in training does with images: a contact sheet, and the error of its copies."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from dalle1.common.images import contact_sheet, to_pil
from dalle1.training.stages.base import SHEET_COLUMNS


def reconstruction_sheet(images: Tensor, decoded: Tensor) -> tuple[Image.Image, dict[str, float]]:
    """Images above their copies, and the copies' PSNR in dB, a mean over the images.

    Both [b, 3, H, W] in [0, 1].
    """
    error = (decoded - images).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    psnr = float(-10 * torch.log10(error).mean())
    rows = [[to_pil(p.cpu()) for p in side[:SHEET_COLUMNS]] for side in (images, decoded)]
    return contact_sheet(rows, ["image", "encoded and decoded"]), {"psnr": psnr}

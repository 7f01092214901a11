"""CLIP's scores."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle1.clip.model import CLIP


@torch.inference_mode()
def score(clip: CLIP, text: Tensor, images: Tensor, batch_size: int = 256) -> Tensor:
    """Cosine similarity of one caption with each picture: float32 [n].

    text: ids as CLIP reads them, int64 [1, t]; images: floats [n, 3, H, W] in [0, 1].
    """
    device = clip.logit_scale.device
    caption = clip.encode_text(text.to(device))
    parts = [clip.encode_image(part.to(device)) @ caption[0] for part in images.split(batch_size)]
    return torch.cat(parts).float().cpu()

"""LPIPS: how far apart two images are in the features of a VGG16 (Zhang et al., 2018).

Dimensions: b images, c channels of features, H W height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.pickles import read_tensors
from dvae.weights import check_fits

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]
BLOCKS = (2, 2, 3, 3, 3)  # convolutions of VGG16 between two poolings
WIDTHS = (64, 128, 256, 512, 512)  # channels of each block
TINY = 1e-10


class LPIPS(nn.Module):
    """A frozen VGG16 up to its last convolution, and a weight for each channel of its five blocks.

    The weights are the user's: see `load`. Names are torchvision's (`features.0.weight` ...) and
    those of the LPIPS authors (`lin0.model.1.weight` ...). Their dropout in front of `lin` is left
    out, as in evaluation: it would make the loss random.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        """widths: channels of each block; smaller ones are for tests."""
        super().__init__()
        features: list[nn.Module] = []
        self._ends = []  # places of the last ReLU of each block
        n_in = 3
        for count, width in zip(BLOCKS, widths, strict=True):
            if features:
                features.append(nn.MaxPool2d(2))
            for _ in range(count):
                features += [nn.Conv2d(n_in, width, 3, padding=1), nn.ReLU()]
                n_in = width
            self._ends.append(len(features) - 1)
        self.features = nn.ModuleList(features)
        for i, width in enumerate(widths):
            # In a sequence, whose first module is their dropout, for the names.
            model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{i}", nn.ModuleDict({"model": model}))
        self.requires_grad_(False)

    def directions(self, x: Tensor) -> list[Tensor]:
        """The features behind each block of images [b, 3, H, W] in [-1, 1], float32 [b, c, h, w],
        each position's of length 1."""
        shift, scale = (torch.tensor(v, device=x.device)[:, None, None] for v in (SHIFT, SCALE))
        x = (x - shift) / scale
        found = []
        for i, module in enumerate(self.features):
            x = module(x)
            if i in self._ends:
                y = x.float()
                # Not the root of a sum, whose gradient is NaN where all features are 0.
                found.append(y / (torch.linalg.vector_norm(y, dim=1, keepdim=True) + TINY))
        return found

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """The distance of each image to the other, float32 [b]; both [b, 3, H, W] in [-1, 1].

        Gradients reach `images` alone.
        """
        with torch.no_grad():
            targets = self.directions(others)
        total = torch.zeros(len(images), device=images.device)
        for i, (one, other) in enumerate(zip(self.directions(images), targets, strict=True)):
            weight: Tensor = self.get_submodule(f"lin{i}.model.1").weight  # type: ignore[assignment]
            with torch.autocast(images.device.type, enabled=False):  # the features alone are narrow
                each = F.conv2d((one - other).square(), weight.float())
            total = total + each.mean(dim=(1, 2, 3))
        return total


def load(vgg: str | Path, lin: str | Path) -> LPIPS:
    """LPIPS with weights that the user has; nothing in the files is executed.

    Args:
        vgg: torchvision's VGG16 (vgg16-397923af.pth), or its `features.*` in safetensors.
        lin: the LPIPS authors' weights of the channels (vgg.pth of their version 0.1), or the same
            in safetensors.

    Raises:
        ValueError: a file is missing, cut short or not safe, or a weight is missing, has another
            shape or is not finite.
    """
    with torch.device("meta"):
        lpips = LPIPS()
    expected = lpips.state_dict()
    weights: dict[str, Tensor] = {}
    for path, begin, what in (
        (vgg, "features.", "VGG16 as torchvision has it"),
        (lin, "lin", "LPIPS' weights of VGG16's channels"),
    ):
        mine = {name: tensor for name, tensor in expected.items() if name.startswith(begin)}
        weights |= _selected(read_tensors(path)[0], mine, path, what)
    lpips.load_state_dict(weights, assign=True)
    return lpips.requires_grad_(False).eval()


def _selected(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | Path, what: str
) -> dict[str, Tensor]:
    """The expected tensors in 32 bits; the others of the file, such as VGG16's classifier, are let
    go."""
    weights = {name: found[name].float() for name in expected if name in found}
    check_fits(expected, weights, path, what)
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{path}: the weight {name} is not finite")
    return weights

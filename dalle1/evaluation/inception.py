"""The Inception network that FID and Inception Score are defined with (Heusel et al. 2017).

It is Inception v3 (Szegedy et al. 2015) as TensorFlow's file of 5 December 2015 has it, with 1,008
classes. The weights are a user's file in the layout of pytorch-fid and torch-fidelity,
`pt_inception-2015-12-05-6726825d.pth`: a state dictionary with torchvision's names. Three pools
differ from torchvision's network: means leave the padding out, and the last block takes a maximum.

Dimensions: n images, H W image height and width, c channels, h w of a feature map, k classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.calls import isolated
from dvae.loading import fill
from dvae.pickles import read_tensors
from dvae.weights import check_fits, unwrapped

FILE = "pt_inception-2015-12-05-6726825d.pth"
SIDE = 299  # pixels of an image, whatever size it had
FEATURES, CLASSES = 2048, 1008
_WHAT = "FID's Inception network"


class _Step(NamedTuple):
    """A convolution of a branch. A kernel of 3 or more is padded unless the stride is 2."""

    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class _Branch(NamedTuple):
    """A branch of a block: a pool, then steps one after the other, then ends side by side."""

    steps: tuple[_Step, ...] = ()
    pool: str = ""  # of POOLS
    ends: tuple[_Step, ...] = ()


_Table = dict[str, _Branch]
POOLS = {
    "mean": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halve": lambda x: F.max_pool2d(x, 3, stride=2),
}


def _chain(*steps: tuple[int, int | tuple[int, int]], last_stride: int = 1) -> tuple[_Step, ...]:
    """Steps of (width, kernel)."""
    made = [_Step(w, k if isinstance(k, tuple) else (k, k)) for w, k in steps]
    return (*made[:-1], made[-1]._replace(stride=last_stride))


def _grid_35(pooled: int) -> _Table:
    """A block on 35 x 35 positions."""
    return {
        "branch1x1": _Branch(_chain((64, 1))),
        "branch5x5": _Branch(_chain((48, 1), (64, 5))),
        "branch3x3dbl": _Branch(_chain((64, 1), (96, 3), (96, 3))),
        "branch_pool": _Branch(_chain((pooled, 1)), "mean"),
    }


def _grid_17(width: int) -> _Table:
    """A block on 17 x 17 positions; width: of what lies between long kernels."""
    across, down = (1, 7), (7, 1)
    return {
        "branch1x1": _Branch(_chain((192, 1))),
        "branch7x7": _Branch(_chain((width, 1), (width, across), (192, down))),
        "branch7x7dbl": _Branch(
            _chain((width, 1), (width, down), (width, across), (width, down), (192, across))
        ),
        "branch_pool": _Branch(_chain((192, 1)), "mean"),
    }


def _grid_8(pool: str) -> _Table:
    """A block on 8 x 8 positions."""
    ends = _chain((384, (1, 3)), (384, (3, 1)))
    return {
        "branch1x1": _Branch(_chain((320, 1))),
        "branch3x3": _Branch(_chain((384, 1)), ends=ends),
        "branch3x3dbl": _Branch(_chain((448, 1), (384, 3)), ends=ends),
        "branch_pool": _Branch(_chain((192, 1)), pool),
    }


BLOCKS: dict[str, _Table] = {
    "Mixed_5b": _grid_35(32),
    "Mixed_5c": _grid_35(64),
    "Mixed_5d": _grid_35(64),
    "Mixed_6a": {
        "branch3x3": _Branch(_chain((384, 3), last_stride=2)),
        "branch3x3dbl": _Branch(_chain((64, 1), (96, 3), (96, 3), last_stride=2)),
        "pool": _Branch(pool="halve"),
    },
    "Mixed_6b": _grid_17(128),
    "Mixed_6c": _grid_17(160),
    "Mixed_6d": _grid_17(160),
    "Mixed_6e": _grid_17(192),
    "Mixed_7a": {
        "branch3x3": _Branch(_chain((192, 1), (320, 3), last_stride=2)),
        "branch7x7x3": _Branch(
            _chain((192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3), last_stride=2)
        ),
        "pool": _Branch(pool="halve"),
    },
    "Mixed_7b": _grid_8("mean"),
    "Mixed_7c": _grid_8("max"),
}


class _BatchNorm(nn.Module):
    """Batch norm as it is in use: by the figures of training, without a count of its steps."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3
        )


class _Convolution(nn.Module):
    """Convolution without a bias, batch norm, ReLU."""

    def __init__(self, channels: int, step: _Step, padding: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels, step.width, step.kernel, step.stride, padding=padding, bias=False
        )
        self.bn = _BatchNorm(step.width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.relu(self.bn(self.conv(x)), inplace=True)
        return y


def _made(channels: int, step: _Step) -> _Convolution:
    """Keeps the size of the map, or at stride 2 halves it without padding."""
    h, w = step.kernel
    return _Convolution(channels, step, (h // 2, w // 2) if step.stride == 1 else (0, 0))


class _Block(nn.Module):
    """Branches side by side, [n, c, h, w] -> the channels of all, one branch after the other."""

    def __init__(self, channels: int, table: _Table) -> None:
        super().__init__()
        self.plan: list[tuple[str, list[str], list[str]]] = []  # pool, steps and ends by name
        self.width = 0
        for name, branch in table.items():
            width, steps = channels, []
            for i, step in enumerate(branch.steps, 1):
                alone = len(branch.steps) == 1 and not branch.ends
                steps.append(name if alone else f"{name}_{i}")
                self.add_module(steps[-1], _made(width, step))
                width = step.width
            ends = [f"{name}_{len(steps) + 1}{letter}" for letter in "ab"[: len(branch.ends)]]
            for end, step in zip(ends, branch.ends, strict=True):
                self.add_module(end, _made(width, step))
            self.plan.append((branch.pool, steps, ends))
            self.width += sum(step.width for step in branch.ends) or width

    def forward(self, x: Tensor) -> Tensor:
        results = []
        for pool, steps, ends in self.plan:
            y = POOLS[pool](x) if pool else x
            for name in steps:
                y = self.get_submodule(name)(y)
            results += [self.get_submodule(name)(y) for name in ends] or [y]
        return torch.cat(results, 1)


class InceptionV3(nn.Module):
    """Images -> features and class logits; see the module."""

    def __init__(self) -> None:
        super().__init__()
        square = (3, 3)
        self.Conv2d_1a_3x3 = _Convolution(3, _Step(32, square, 2), (0, 0))
        self.Conv2d_2a_3x3 = _Convolution(32, _Step(32, square), (0, 0))
        self.Conv2d_2b_3x3 = _Convolution(32, _Step(64, square), (1, 1))
        self.Conv2d_3b_1x1 = _Convolution(64, _Step(80), (0, 0))
        self.Conv2d_4a_3x3 = _Convolution(80, _Step(192, square), (0, 0))
        width = 192
        for name, table in BLOCKS.items():
            block = _Block(width, table)
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, 2048] and logits [n, 1008] of images, float [n, 3, H, W] in [0, 1].

        The logits have no bias, as in the Inception Score's own code (Salimans et al. 2016).
        """
        x = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))  # 147 x 147
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOLS["halve"](x)))  # 71 x 71
        x = POOLS["halve"](x)  # 35 x 35
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
        features = x.mean(dim=(2, 3))  # of 8 x 8
        return features, features @ self.fc.weight.T


@isolated()
def load_inception(path: str | Path) -> InceptionV3:
    """The network with the weights of a file, in eval mode; nothing in the file is executed.

    Raises:
        ValueError: the file is missing, cut short, foreign, or another Inception network.
    """
    tensors, _ = read_tensors(path)
    # Updates that batch norm has counted, of later versions; training's side head of torchvision's.
    weights = {
        key: value
        for key, value in unwrapped(tensors, path).items()
        if not key.endswith(".num_batches_tracked") and not key.startswith("AuxLogits.")
    }
    classes = weights.get("fc.weight")
    if classes is not None and classes.shape[:1] != (CLASSES,):
        raise ValueError(
            f"inception: expected {_WHAT} of {CLASSES} classes, got {list(classes.shape)} as "
            f"fc.weight of {path}; torchvision's own weights give other figures, take {FILE}"
        )
    with torch.device("meta"):
        expected = InceptionV3().state_dict()
    check_fits(expected, weights, path, _WHAT)
    for key, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{path}: weight {key!r} of {_WHAT} is not finite; fetch {FILE} again")
    network: InceptionV3 = fill(InceptionV3, weights, Path(path), _WHAT)
    return network.eval().requires_grad_(False).float()

"""Finds emoji in an image: every picture of every style, tried at every place of a scene.

A piece of a scene is c + (1 - a) b: its color c, multiplied by its opacity a, over the background
b. Against the image I, less its background, the squared error over the piece's window is

    |I - b|² - 2 <I - b, c - a b> + |c - a b|²,

so that all pictures are compared by one matrix product of windows and pictures. A first pass does
that on images reduced to blocks, for all places; a second at full size, for the few best of the
first, one pixel to each side too, and blurred as copies of codecs are: a sharp picture would lose
to another one that is less detailed.

Legend: n are the pictures of a catalog, p places of one side, k the best of them, s a side in
pixels, m the margin that a blur reaches, f = 4 g² the numbers of a picture in g x g blocks (three
colors and opacity), d the directions that are kept of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from dalle1.data.emoji.pictures import LARGEST_PICTURE

WORKING_SIDE = 48  # pixels of an image; pieces of all scenes are whole pixels there
SHORTLIST = 32  # pictures that the second pass compares
DIRECTIONS = 128  # of a reduced picture
NEARBY = 1  # pixels that a piece may lie beside a place of the data set
BLURS = (0.0, 1.0, 1.5)  # standard deviations in pixels
MARGIN = 3  # pixels beyond a piece that its blur reaches
_CHUNK = 1024  # pictures that are reduced at a time

Place = tuple[int, int]  # of the upper left corner in pixels of WORKING_SIDE: x, y


@dataclass(frozen=True)
class Candidates:
    """Pictures that a part of an image may show, the likeliest first.

    Attributes:
        pictures: int64 [k], their numbers in the catalog.
        places: int64 [k, 3]: x and y of the upper left corner, and the side, in pixels.
    """

    pictures: Tensor
    places: Tensor

    def __getitem__(self, some: slice) -> Candidates:
        return Candidates(self.pictures[some], self.places[some])


@dataclass(frozen=True)
class Matches:
    """What a part of an image shows: k pictures, the best first.

    Attributes:
        pictures: int64 [k], their numbers in the catalog.
        errors: float32 [k], what each leaves unexplained: the squared error less that of the bare
            background, summed over pixels and colors. Those of separate parts can be added.
        places: int64 [k, 3], as of `Candidates`.
    """

    pictures: Tensor
    errors: Tensor
    places: Tensor


class Pictures:
    """All pictures of a catalog, reduced to what the first pass needs.

    Args:
        images: RGBA, square.
        blocks: for each side in pixels that is searched for, the pixels of a block's side.
    """

    def __init__(self, images: Sequence[Image.Image], blocks: Mapping[int, int]) -> None:
        self.full = torch.empty(len(images), 4, LARGEST_PICTURE, LARGEST_PICTURE, dtype=torch.uint8)
        for i, image in enumerate(images):
            sized = image.resize((LARGEST_PICTURE, LARGEST_PICTURE), Image.Resampling.LANCZOS)
            self.full[i] = torch.from_numpy(rearrange(np.array(sized), "h w c -> c h w"))
        self._reduced = {side: _Reduced.of(self, side, block) for side, block in blocks.items()}

    def __len__(self) -> int:
        return len(self.full)

    def sized(self, pictures: Tensor | slice, side: int) -> Tensor:
        """Pictures as the data set draws them: float32 [k, 4, side, side] in [0, 1], the colors
        multiplied by the opacity."""
        shrink = _resampling(side)
        small = shrink @ _premultiplied(self.full[pictures]) @ shrink.T
        small[:, 3:].clamp_(0, 1)
        small[:, :3] = torch.minimum(small[:, :3].clamp_min(0), small[:, 3:])
        return small

    def distances(self, picture: int, side: int) -> Tensor:
        """About the squared distances of all pictures from one of them, in blocks: float32 [n]."""
        features = self._reduced[side].features
        return (features - features[:, [picture]]).square().sum(0)

    def search(
        self,
        image: Tensor,
        background: Tensor,
        places: Mapping[int, Sequence[Place]],
        shortlist: int = SHORTLIST,
    ) -> Candidates:
        """The first pass: the pictures that seem to explain an image best.

        Args:
            image: float [3, 48, 48] in [0, 1].
            background: float [3].
            places: for each side, one of `blocks`, where a picture may lie.
            shortlist: how many are kept.
        """
        light = image - background[:, None, None]
        gains, at = [], []
        for side, corners in places.items():
            explained = self._reduced[side].gains(_windows(light, corners, side), background)
            best, where = explained.max(0)  # of p, [n]
            gains.append(best)
            at.append(F.pad(torch.tensor(corners)[where], (0, 1), value=side))
        top = torch.cat(gains).topk(min(shortlist, len(self))).indices
        return Candidates(top % len(self), torch.cat(at)[top])

    def compare(
        self, image: Tensor, background: Tensor, candidates: Candidates, periodic: bool = False
    ) -> Matches:
        """The second pass: candidates at full size, at their places and around them.

        periodic: the image is one cell of a pattern, which a picture fills. What a blur carries
        over an edge then comes in again at the other one.
        """
        margin = 0 if periodic else MARGIN
        light = image - background[:, None, None]
        mode = "circular" if periodic else "constant"
        padded = F.pad(light[None], (NEARBY + margin,) * 4, mode)[0]
        steps = range(-NEARBY, NEARBY + 1)
        shifts = torch.tensor([(x, y, 0) for y in steps for x in steps])
        errors = torch.empty(len(candidates.pictures), len(shifts))
        for side in candidates.places[:, 2].unique().tolist():
            mine = (candidates.places[:, 2] == side).nonzero()[:, 0]
            corners = candidates.places[mine]
            drawn = self._drawn(candidates.pictures[mine], background, side, periodic)
            energy = drawn.square().sum(2, keepdim=True)
            for corner in corners.unique(dim=0):
                here = (corners == corner).all(1)
                around = (corner + NEARBY + shifts)[:, :2].tolist()
                windows = _windows(padded, around, side + 2 * margin).flatten(1)
                left = energy[here] - 2 * drawn[here] @ windows.T  # [k, blurs, shifts]
                errors[mine[here]] = left.amin(1)
        best, shift = errors.min(1)
        order = best.argsort()
        found = candidates.places + shifts[shift]
        return Matches(candidates.pictures[order], best[order], found[order])

    def _drawn(self, pictures: Tensor, background: Tensor, side: int, periodic: bool) -> Tensor:
        """Pictures on a background, less the background, in each blur: float32 [k, blurs, 3 (s +
        2m)²], with margins; or [k, blurs, 3 s²], where the margins come in at the other side."""
        sized = self.sized(pictures, side)
        drawn = sized[:, None, :3] - background[:, None, None] * sized[:, None, 3:]
        blur = torch.stack([_blurring(side, deviation) for deviation in BLURS])[:, None]
        if periodic:
            rows = (torch.arange(side + 2 * MARGIN) - MARGIN) % side
            blur = torch.zeros(len(BLURS), 1, side, side).index_add_(2, rows, blur)
        return (blur @ drawn @ blur.mT).flatten(2)


@dataclass(frozen=True)
class _Reduced:
    """Pictures of one side in blocks, in the directions in which they differ most.

    Attributes:
        block: pixels of a block's side.
        directions: float32 [f, d].
        features: float32 [d, n].
        terms: float32 [5, n], of the energy |c - a b|²: c², a² and a c of each color.
    """

    block: int
    directions: Tensor
    features: Tensor
    terms: Tensor

    @staticmethod
    def of(pictures: Pictures, side: int, block: int) -> _Reduced:
        """Reduces all pictures."""
        features, terms = [], []
        for start in range(0, len(pictures), _CHUNK):
            sized = F.avg_pool2d(pictures.sized(slice(start, start + _CHUNK), side), block)
            colors, opacity = sized[:, :3], sized[:, 3:]
            features.append(sized.flatten(1))
            squares = [colors.square().sum((1, 2, 3)), opacity.square().sum((1, 2, 3))]
            crossed = (colors * opacity).sum((2, 3))
            terms.append(torch.cat([torch.stack(squares, 1), crossed], 1))
        matrix = torch.cat(features)  # [n, f]
        directions = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -DIRECTIONS:].contiguous()
        reduced = (matrix @ directions).T.contiguous()
        return _Reduced(block, directions, reduced, torch.cat(terms).T.contiguous() * block**2)

    def gains(self, windows: Tensor, background: Tensor) -> Tensor:
        """How much of each window [p, 3, s, s] each picture explains: [p, n]."""
        blocks = F.avg_pool2d(windows, self.block)
        behind = -torch.einsum("pchw,c->phw", blocks, background)[:, None]
        along = torch.cat([blocks, behind], 1).flatten(1) @ self.directions
        weights = torch.cat([torch.tensor([1.0, float(background @ background)]), -2 * background])
        return torch.addmm(-(weights @ self.terms), along, self.features, alpha=2 * self.block**2)


def alike(pictures: Pictures, groups: Sequence[str], levels: float) -> list[int]:
    """Numbers of classes: the same for pictures of a group that hardly differ.

    Two belong together whose root mean square difference, over pixels, opacity, and colors
    multiplied by the opacity, is at most so many levels of 255; and so do those that a chain of
    such two joins.

    Args:
        groups: of each picture; those of different groups are never in one class.
    """
    numbers = list(range(len(pictures)))
    limit = (levels / 255) ** 2
    for group in dict.fromkeys(groups):
        members = torch.tensor([i for i, g in enumerate(groups) if g == group])
        # Means over blocks never differ by more than what they are means of.
        rough = [F.avg_pool2d(_premultiplied(pictures.full[m]), 4) for m in members.split(_CHUNK)]
        flat = torch.cat(rough).flatten(1)
        squares = flat.square().sum(1)
        for start in range(0, len(flat), _CHUNK):
            rows = slice(start, start + _CHUNK)
            distances = squares[rows, None] + squares - 2 * flat[rows] @ flat.T
            # Differences of large sums: the slack is for their rounding.
            near = (distances / flat.shape[1] <= limit + 1e-6).nonzero() + torch.tensor([start, 0])
            for i, j in members[near[near[:, 0] < near[:, 1]]].tolist():
                one, other = _premultiplied(pictures.full[[i, j]])
                if numbers[i] != numbers[j] and float((one - other).square().mean()) <= limit:
                    old, new = sorted((numbers[i], numbers[j]), reverse=True)
                    numbers = [new if n == old else n for n in numbers]
    return numbers


def _premultiplied(full: Tensor) -> Tensor:
    """Pictures, uint8 [k, 4, h, w], as float32 in [0, 1], the colors times the opacity."""
    scaled = full.float().div_(255)
    scaled[:, :3] *= scaled[:, 3:]
    return scaled


def _windows(image: Tensor, places: Sequence[Place], side: int) -> Tensor:
    """Parts of an image [3, h, w]: [p, 3, side, side]."""
    return torch.stack([image[:, y : y + side, x : x + side] for x, y in places])


@lru_cache(maxsize=16)
def _resampling(side: int) -> Tensor:
    """How Pillow's Lanczos filter shrinks a row of 64 pixels: float32 [side, 64]."""
    rows = Image.fromarray(np.eye(LARGEST_PICTURE, dtype=np.float32))
    return torch.from_numpy(
        np.array(rows.resize((LARGEST_PICTURE, side), Image.Resampling.LANCZOS, reducing_gap=None))
    )


@lru_cache(maxsize=32)
def _blurring(side: int, deviation: float) -> Tensor:
    """A Gaussian blur along one axis, with margins: float32 [side + 2m, side]."""
    apart = torch.arange(side + 2 * MARGIN)[:, None] - MARGIN - torch.arange(side)
    if deviation == 0:
        return (apart == 0).float()
    reached = (apart.abs() <= MARGIN) * torch.exp(-((apart / deviation) ** 2) / 2)
    ends = torch.exp(-((torch.arange(-MARGIN, MARGIN + 1) / deviation) ** 2) / 2)
    return reached / ends.sum()

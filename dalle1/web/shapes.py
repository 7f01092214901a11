"""What the page has to know of a model: sizes, and whether it ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

from dalle1.generation.defaults import SamplingDefaults
from dalle1.generation.images import image_size
from dalle1.model import Model


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model's images and tokens.

    Attributes:
        grid: rows and columns of tokens.
        read_size: width and height of the images that its codec reads, in pixels.
        drawn_size: width and height of the images that it draws.
        ranked: whether it has a ranker; without one the first candidates are shown.
        fingerprint: see `Model.fingerprint`; PNGs name it.
        sampling: what the form begins with.
    """

    grid: tuple[int, int]
    read_size: tuple[int, int]
    drawn_size: tuple[int, int]
    ranked: bool
    fingerprint: str
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)


def shape_of(model: Model) -> ModelShape:
    """The shape of a model."""
    (rows, columns), stride = model.prior.grid, model.codec.stride
    height, width = image_size(model.codec, model.prior.grid)
    return ModelShape(
        grid=(rows, columns),
        read_size=(columns * stride, rows * stride),
        drawn_size=(width, height),
        ranked=model.ranker is not None,
        fingerprint=model.fingerprint(),
        sampling=model.sampling,
    )

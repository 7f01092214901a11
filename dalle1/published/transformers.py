"""Weights of the published models that are our transformer in other names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dalle1.published.parts import LazyWeight
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.model import Transformer


@dataclass(frozen=True)
class Source:
    """Of what a weight is made: some of a file's weights, one after the other.

    Attributes:
        names: in the file; several are put together along their first dimension.
        rows: of the whole that are taken; None: all.
    """

    names: tuple[str, ...]
    rows: slice | None = None

    def made_of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight, in the file's type; no copy where there is nothing to put together."""
        parts = [tensors[name] for name in self.names]
        made = parts[0] if len(parts) == 1 else torch.cat(parts)
        return made if self.rows is None else made[self.rows]


def check_layers(path: Path, tensors: Mapping[str, Tensor], layers: int, what: str) -> None:
    """Raises ValueError for more layers than the file has weights, before names of all of them are
    made: a name or a config may claim any number."""
    if layers > len(tensors):
        raise ValueError(
            f"{path}: expected weights of {layers:,} layers of {what}, got {len(tensors):,} weights"
        )


def published_weights(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: TransformerConfig,
    sources: Mapping[str, Source],
    what: str,
) -> dict[str, LazyWeight]:
    """The weights of a transformer of this config, each made when it is asked for.

    Args:
        path: of the file, for messages.
        tensors: of the file, without what are no weights.
        sources: of each weight, by our names.
        what: the model is called, for messages.

    Raises:
        ValueError: a weight is missing, not known, or of another shape or type.
    """
    try:
        with torch.device("meta"):
            expected = Transformer(config).state_dict()
    except (OverflowError, RuntimeError, TypeError) as error:  # sizes whose product no number holds
        raise ValueError(f"{path}: its sizes are of no {what} that could be built") from error
    read = {name for source in sources.values() for name in source.names}
    for name in sorted(read ^ tensors.keys()):
        state = "has no" if name in read else "has an unexpected"
        raise ValueError(f"{path}: {state} weight {name!r} of {what}")
    for ours, weight in expected.items():
        _check(path, tensors, sources[ours], weight, what)
    return {ours: _lazily(sources[ours], tensors) for ours in expected}


def _check(
    path: Path, tensors: Mapping[str, Tensor], source: Source, expected: Tensor, what: str
) -> None:
    """Raises ValueError where what a source is made of is not in the shape of the weight."""
    count = len(source.names)
    for name in source.names:
        found, shape = tensors[name], list(expected.shape)
        if source.rows is not None and found.ndim:  # of the rows that are taken
            found = found[source.rows]
        shape[0] //= count
        if list(found.shape) != shape:
            rows = "" if source.rows is None else f" in the rows {source.rows.start or 0} and on"
            raise ValueError(
                f"{path}: weight {name!r} has shape {list(found.shape)}{rows}, expected {shape} of "
                f"{what}"
            )
        if not found.is_floating_point():
            raise ValueError(
                f"{path}: weight {name!r} has type {found.dtype}, expected a floating point"
            )


def _lazily(source: Source, tensors: Mapping[str, Tensor]) -> LazyWeight:
    return lambda: source.made_of(tensors)

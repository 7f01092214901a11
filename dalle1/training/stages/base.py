"""What a stage of training is to the trainer: a model, its loss, its sheet, its export."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from dalle1.data.shards.index import Index
from dalle1.data.shards.loader import Batch
from dalle1.data.transforms import Augmentation
from dalle1.training.config import RunConfig
from dalle1.transformer.gradient_scale import GradientScale

Metrics = dict[str, Tensor]
Weights = Mapping[str, Tensor]


class Sharding(Protocol):
    """How weights are spread over the ranks from the beginning (ZeRO 3)."""

    def building(self) -> AbstractContextManager[object]:
        """Modules made in this context hold their shard of each weight alone."""

    def whole(self, parameter: nn.Parameter) -> AbstractContextManager[object]:
        """The weight is whole in this context; all ranks set it to the same."""


@dataclass(frozen=True)
class Phase:
    """Updates [first, last) with one course of the step size."""

    first: int
    last: int
    learning_rate: float


class Stage(nn.Module):
    """A model in training. `forward` is one pass's loss, so that DeepSpeed wraps all of it.

    What is drawn and exported is not `model`, whose weights may be sharded over the ranks, but a
    copy with the averaged weights, see `copy_with`.
    """

    model: nn.Module  # what is averaged and exported

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.settings = config
        self.gradient_scales: list[GradientScale] = []  # of each residual block in float16

    @property
    @abstractmethod
    def augmentation(self) -> Augmentation:
        """The paper's listing: what is done to each training picture."""

    def check_data(self, index: Index) -> None:
        """ValueError where the data are not the model's; token shards are stage two's alone."""

    @abstractmethod
    def forward(self, part: Any, step: int) -> tuple[Tensor, Metrics]:
        """The loss of one of `parts` at update `step`, and values for the log (scalars, detached).

        Its mean over the parts of all ranks is the loss of the whole batch.
        """

    @abstractmethod
    def blank(self) -> nn.Module:
        """A model like `model` without weights, on the meta device."""

    @abstractmethod
    def sheet(self, model: nn.Module, batch: Batch) -> tuple[Image.Image, dict[str, float]] | None:
        """A picture of what a (whole) model does with a batch, and values for the log."""

    @abstractmethod
    def export(self, model: nn.Module, folder: Path) -> None:
        """Writes a (whole) model for use."""

    def parts(self, batch: Batch, size: int) -> Sequence[object]:
        """This rank's batch in passes of `size` samples. Every rank calls it for every update."""
        return batch.split(size)

    def sharded_apart(self) -> Sequence[nn.Module]:
        """Modules whose weights ZeRO 3 gathers one after the other; all others stand through the
        whole pass."""
        return ()

    def copy_with(self, weights: Weights) -> nn.Module:
        """A whole model in eval mode with these weights (names of `model`), which it shares."""
        model = self.blank()
        model.load_state_dict(dict(weights), assign=True)
        return model.eval()

    def phase(self, step: int) -> Phase:
        """The phase that an update belongs to; one for the whole run unless a stage has more."""
        return Phase(0, self.settings.steps, self.settings.optimizer.learning_rate)

    def placed(self) -> None:
        """Called once the engine has put whole weights on their device."""

    def parameter_groups(self) -> list[list[str]]:
        """Names of the parameters that share a step size; see `rate_factors`."""
        return [[name for name, _ in self.named_parameters()]]

    def rate_factors(self, step: int) -> list[float]:
        """What each group's step size is multiplied with at update `step`."""
        return [1.0]

    def sets_weights(self, step: int) -> bool:
        """Whether `new_weights` takes the place of training's before update `step`."""
        return False

    def new_weights(self, weights: Weights, read: Callable[[int], Tensor]) -> dict[str, Tensor]:
        """Weights to go on from, of the present ones (whole, names of the stage).

        read(n) gives n training pictures, uint8 [n, 3, R, R], the same on all ranks.
        """
        raise NotImplementedError  # only called where `sets_weights` says so

    def counts(self) -> dict[str, float]:
        """Values gathered since the last call; every rank calls it."""
        return {}


SHEET_COLUMNS = 8


def pixels_of(batch: Batch, device: torch.device) -> Tensor:
    assert batch.images is not None  # see Stage.check_data
    return batch.images.to(device).float() / 255


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Products in bfloat16 where the run asks for it; parameters and losses stay in 32 bits."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.parallel.precision == "bf16")


def zero_of(*modules: Any) -> Tensor:
    """0, with a gradient of 0 for the modules' weights: those that a loss does not read would keep
    their last gradient under ZeRO 3, and it would count in the norm."""
    return 0.0 * torch.stack([p.sum() for m in modules for p in m.parameters()]).sum()


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device

"""What the trainer needs of a stage: a model, its loss, its contact sheet, its export."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
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
    """Builds a model whose weights are sharded over the ranks from the beginning (ZeRO 3)."""

    def init_context(self) -> AbstractContextManager[object]:
        """A module that is made in this context holds only this rank's shard of each weight."""

    def unsharded(self, parameter: nn.Parameter) -> AbstractContextManager[object]:
        """In this context the weight has all its numbers, and all ranks set it to the same."""


@dataclass(frozen=True)
class Phase:
    """Updates [first, last) with one schedule of the learning rate."""

    first: int
    last: int
    learning_rate: float  # at its peak


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the optimizer treats alike."""

    names: list[str]  # frozen ones too
    decayed: bool = True  # by optimizer.weight_decay
    maximum: float | None = None  # that they are clamped to after each update
    part: str = ""  # gradients of the groups of one part are clipped by their common norm


class Stage(nn.Module):
    """A model in training. `forward` is the loss of a micro-batch, so that DeepSpeed wraps it all.

    Contact sheets and exports do not use `model`, whose weights may be sharded over the ranks, but
    an unsharded copy with the averaged weights (`model_with`).
    """

    model: nn.Module  # what is averaged and exported

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.settings = config
        self.gradient_scales: list[GradientScale] = []  # of each residual block in float16

    def freeze_the_rest(self) -> None:
        """Leaves only what `train_only` names to be trained; called once `model` is there.

        Raises ValueError for a name that no module and no weight of the model has.
        """
        freeze_all_but(self.model, self.settings.train_only)

    @property
    @abstractmethod
    def augmentation(self) -> Augmentation:
        """What is done to each training image, by the paper's listing 1 or 2."""

    def check_data(self, index: Index) -> None:
        """Raises ValueError where the model cannot be trained on the data.

        Only stage two is ever given token shards.
        """

    def fingerprints(self) -> dict[str, str]:
        """Of each part that is read and not trained, by the name of its setting.

        A run that resumes with another part under the same path would train on other tokens.
        """
        return {}

    @abstractmethod
    def forward(self, micro_batch: Any, step: int) -> tuple[Tensor, Metrics]:
        """The loss of one of `micro_batches` at update `step`, and scalars for the log, detached.

        The mean over the micro-batches of all ranks is the loss of the global batch.
        """

    @abstractmethod
    def empty_model(self) -> nn.Module:
        """A model like `model` on the meta device, which has shapes and no numbers."""

    @abstractmethod
    def draw_contact_sheet(
        self, model: nn.Module, batch: Batch
    ) -> tuple[Image.Image, dict[str, float]] | None:
        """An image of what an unsharded model does with a batch, and values for the log.

        None where there is nothing to see yet.
        """

    @abstractmethod
    def export(self, model: nn.Module, folder: Path) -> None:
        """Writes an unsharded model for use."""

    def micro_batches(self, batch: Batch, size: int) -> Sequence[object]:
        """This rank's batch in parts of `size` samples; all ranks call it for each update."""
        return batch.split(size)

    def modules_gathered_in_turn(self) -> Sequence[nn.Module]:
        """Modules whose weights ZeRO 3 gathers one module after the other.

        All other weights stay gathered for a full pass.
        """
        return ()

    def model_with(self, weights: Weights) -> nn.Module:
        """An unsharded model in eval mode that shares these tensors, by the names of `model`."""
        model = self.empty_model()
        model.load_state_dict(dict(weights), assign=True)
        return model.eval()

    def phase(self, step: int) -> Phase:
        """The phase that an update belongs to; there is one unless a stage has more."""
        return Phase(0, self.settings.steps, self.settings.optimizer.learning_rate)

    def changes_loss(self, step: int) -> bool:
        """Whether the loss of update `step` cannot be compared with those before it."""
        return step == self.phase(step).first

    def after_move_to_device(self) -> None:
        """Called once the engine has put unsharded weights on their device."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """All parameters in groups, those of one group alike; see `learning_rate_factors`."""
        return [ParameterGroup([name for name, _ in self.named_parameters()])]

    def maxima(self, prefix: str) -> dict[str, float]:
        """Bounds of the parameters that have one, by name without the prefix."""
        return {
            name.removeprefix(prefix): group.maximum
            for group in self.parameter_groups()
            for name in group.names
            if group.maximum is not None
        }

    def learning_rate_factors(self, step: int) -> list[float]:
        """What the learning rate of each parameter group is multiplied by at update `step`."""
        return [1.0]

    def replaces_weights(self, step: int) -> bool:
        """Whether `replacement_weights` replace all weights before update `step`."""
        return False

    def replacement_weights(
        self, weights: Weights, read: Callable[[int], Tensor]
    ) -> dict[str, Tensor]:
        """Weights to train on with, made of the present ones.

        Args:
            weights: unsharded, by the names of this stage's parameters; so is the result.
            read: read(n) gives n training images, uint8 [n, 3, R, R], the same on all ranks.
        """
        raise NotImplementedError  # only called where `replaces_weights` says so

    def after_update(self, step: int, done: bool, read: Callable[[str], Tensor]) -> Weights:
        """Weights that the stage itself sets after update `step`; all ranks call it.

        Args:
            step: number of the update.
            done: whether it was done, not skipped. A skipped one changes nothing.
            read: read(name) gives a present weight unsharded; all ranks call it alike.

        Returns:
            Unsharded weights by the names of this stage's parameters, the same on all ranks.
        """
        return {}

    def pop_metrics(self) -> dict[str, float]:
        """Values for the log that were collected since the last call; all ranks call it."""
        return {}


def freeze_all_but(model: nn.Module, names: Sequence[str] | None) -> None:
    """Leaves only what `train_only` names to be trained, or all where it is None.

    Raises ValueError for a name that no module and no weight of the model has.
    """
    if names is None:
        return
    weights = dict(model.named_parameters())
    modules = [name for name, _ in model.named_modules() if name]
    chosen = {found for name in names for found in _named(name, modules, weights)}
    for name, weight in weights.items():
        weight.requires_grad_(
            name in chosen or any(name.startswith(f"{module}.") for module in chosen)
        )


def _named(name: str, modules: Sequence[str], weights: Iterable[str]) -> list[str]:
    """The modules and weights that a name of `train_only` stands for.

    It is their full name, or a pattern of it, or else the end of it: `norm` is the model's own
    module of that name, `*.norm` are all below, and `attention` are the attention of all layers.
    """
    known = [*modules, *weights]
    if name in known:
        return [name]
    if set(name) & set("*?["):
        found = [full for full in known if fnmatchcase(full, name)]
    else:
        found = [full for full in known if full.endswith(f".{name}")]
    if not found:
        ends = sorted({full.rpartition(".")[2] for full in modules})
        near = get_close_matches(name, [*modules, *ends], 5) or modules[:12]
        raise ValueError(
            f"train_only: the model has no module {name!r}; it has {', '.join(near)} ..."
        )
    return found


SHEET_COLUMNS = 8


def pixels_of(batch: Batch, device: torch.device) -> Tensor:
    """Images of a batch on a device: float32 [b, 3, R, R] in [0, 1]."""
    assert batch.images is not None  # see Stage.check_data
    return batch.images.to(device).float() / 255


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Matrix products in bfloat16 where the run asks for it; weights and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.parallel.precision == "bf16")


def zero_loss_of(*modules: Any) -> Tensor:
    """0, with gradients of 0 for all weights of the modules.

    It is added to a loss that does not read these weights. Under ZeRO 3 they would otherwise keep
    their last gradient, which would count in the norm.
    """
    return 0.0 * torch.stack([p.sum() for m in modules for p in m.parameters()]).sum()


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter lies."""
    return next(module.parameters()).device

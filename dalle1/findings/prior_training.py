"""Trains a prior on tokens in memory, by the optimizer and the schedules of `dalle1 train`.

It is for arms that no setting of a run describes, such as a transformer with other attention, and
for runs of seconds, which would spend as long on starting. The updates are those of the stage
`dalle` on one process in 32 bits, without an average of the weights.

Dimensions: b samples, t text positions, m image positions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from dalle1.common.config import Section
from dalle1.generation.generator import Generator
from dalle1.generation.options import candidate_uniforms
from dalle1.training.config import OptimizerSettings
from dalle1.training.optimizer import TrainingOptimizer
from dalle1.training.schedules import cosine, linear_warmup
from dalle1.transformer.model import Transformer

DRAWN_AT_ONCE = 256
MEASURED_AT_ONCE = 64


class Recipe(Section):
    """How a prior is trained; the learning rate falls along a cosine."""

    steps: int = Field(ge=1, description="updates")
    batch_size: int = Field(ge=1, description="samples of an update")
    optimizer: OptimizerSettings = Field(description="AdamW; its schedule must be cosine")


@dataclass(frozen=True)
class Pairs:
    """Captions and images as tokens: int64 [b, t], as a tokenizer pads them, and [b, m]."""

    text: Tensor
    image: Tensor

    def __len__(self) -> int:
        return len(self.text)


def train_prior(
    prior: Transformer,
    pairs: Pairs,
    recipe: Recipe,
    seed: int,
    after: Callable[[int], None] = lambda step: None,
    at: Collection[int] = (),
) -> None:
    """Trains in place; the prior is in eval mode at the end.

    Args:
        prior: with its initial weights.
        pairs: the training samples, drawn with replacement.
        recipe: how.
        seed: of the order of the samples, which is the same whatever the prior is.
        after: called with the number of updates done, in eval mode, for those in `at`.
        at: numbers of updates.

    Raises:
        ValueError: another schedule than cosine; another optimizer than AdamW; a loss that is not
            finite.
    """
    o = recipe.optimizer
    if o.schedule != "cosine":
        raise ValueError(f"optimizer.schedule: expected cosine, got {o.schedule!r}; change it")
    if o.kind != "adamw":
        raise ValueError(f"optimizer.kind: expected adamw, got {o.kind!r}; change it")
    weights = list(prior.parameters())
    optimizer = TrainingOptimizer([{"params": weights}], o)
    order = torch.Generator().manual_seed(seed)
    for step in range(recipe.steps):
        prior.train()
        chosen = torch.randint(len(pairs), (recipe.batch_size,), generator=order)
        rate = cosine(step, o.learning_rate, o.cosine_end, o.cosine_steps or recipe.steps)
        optimizer.param_groups[0]["lr"] = rate * linear_warmup(step, o.warmup_steps)
        loss = prior.loss(pairs.text[chosen], pairs.image[chosen]).loss
        if not torch.isfinite(loss):
            raise ValueError(
                f"loss: expected a finite number, got {loss.item()} at update {step + 1}; lower "
                "optimizer.learning_rate"
            )
        optimizer.zero_grad()
        loss.backward()
        if o.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(weights, o.clip_norm)
        optimizer.step()
        prior.eval()
        if step + 1 in at:
            after(step + 1)


@torch.no_grad()
def image_loss(prior: Transformer, pairs: Pairs) -> float:
    """Cross-entropy of the image tokens, given captions and the tokens before: nats a token."""
    total = sum(
        float(prior.token_log_probs(text, image).sum())
        for text, image in zip(
            pairs.text.split(MEASURED_AT_ONCE), pairs.image.split(MEASURED_AT_ONCE), strict=True
        )
    )
    return -total / pairs.image.numel()


@torch.no_grad()
def text_loss(prior: Transformer, pairs: Pairs) -> float:
    """Cross-entropy of the captions' tokens and their ends: nats a token."""
    total, count = 0.0, 0
    for text, image in zip(
        pairs.text.split(MEASURED_AT_ONCE), pairs.image.split(MEASURED_AT_ONCE), strict=True
    ):
        tokens = prior.count_text_targets(text)
        total, count = total + tokens * float(prior.loss(text, image).text), count + tokens
    return total / count


def draw_one_each(prior: Transformer, text: Tensor, seed: int) -> Tensor:
    """One image for each caption, at temperature 1: int64 [b, t] -> int64 [b, m]."""
    length = prior.config.grid**2
    uniforms = torch.stack(
        [candidate_uniforms(seed, str(row), 0, 1, length) for row in range(len(text))]
    )
    drawn = []
    for rows, numbers in zip(text.split(DRAWN_AT_ONCE), uniforms.split(DRAWN_AT_ONCE), strict=True):
        drawn.append(Generator(prior, len(rows)).draw(rows, numbers)[:, 0])
    return torch.cat(drawn)

"""Training of priors on tokens in memory, and what is measured of them."""

from __future__ import annotations

import pytest
import torch

from dalle1.findings.prior_training import (
    Pairs,
    Recipe,
    draw_one_each,
    image_loss,
    text_loss,
    train_prior,
)
from dalle1.training.config import OptimizerSettings
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.model import Transformer

SHAPE = TransformerConfig(
    width=16,
    layers=2,
    heads=2,
    head_size=8,
    text_vocab=5,
    text_length=3,
    image_vocab=6,
    grid=2,
    init_std=0.25,
)


def recipe(steps: int, schedule: str = "cosine", rate: float = 1e-2) -> Recipe:
    settings = OptimizerSettings.model_validate(
        {"learning_rate": rate, "warmup_steps": 5, "schedule": schedule, "clip_norm": 1.0}
    )
    return Recipe(steps=steps, batch_size=16, optimizer=settings)


def pairs() -> Pairs:
    """Captions of a word each, which say which token the whole image is of."""
    words = torch.arange(1, 5)
    text = torch.stack([words, torch.full((4,), 6), torch.full((4,), 7)], dim=1)
    return Pairs(text, words[:, None].expand(4, 4).contiguous())


def test_a_prior_learns_its_pairs() -> None:
    """A loop that updates nothing, or that pairs captions with images of others."""
    prior, data = Transformer(SHAPE, seed=0), pairs()
    assert image_loss(prior, data) > 1
    seen: list[int] = []
    train_prior(prior, data, recipe(150), 0, seen.append, (1, 75, 150))
    assert seen == [1, 75, 150] and not prior.training
    assert image_loss(prior, data) < 0.05
    drawn = draw_one_each(prior, data.text, 0)
    assert (drawn == data.image).float().mean() > 0.9


def test_the_order_of_samples_depends_on_the_seed_alone() -> None:
    """Arms that read other samples, whose differences then are not paired."""

    class Recorder(Transformer):
        def loss(self, text, image, text_count=None):  # type: ignore[no-untyped-def]
            read.append(text[:, 0].tolist())
            return super().loss(text, image, text_count)

    orders = []
    for seed, layers in ((0, 1), (0, 2), (1, 1)):
        read: list[list[int]] = []
        prior = Recorder(SHAPE.model_copy(update={"layers": layers}), seed=3)
        train_prior(prior, pairs(), recipe(4), seed)
        orders.append(read)
    assert orders[0] == orders[1] != orders[2]


def test_losses_are_means_over_tokens() -> None:
    """Means over batches of different sizes, or over paddings."""
    prior, few = Transformer(SHAPE, seed=1).eval(), pairs()
    many = Pairs(few.text.repeat(20, 1)[:70], few.image.repeat(20, 1)[:70])  # two batches
    logits = prior.image_logits(many.text, many.image).log_softmax(-1)
    wanted = -logits.gather(-1, many.image[..., None]).mean()
    assert image_loss(prior, many) == pytest.approx(float(wanted), rel=1e-5)
    text = prior(many.text, many.image)[0].log_softmax(-1)
    words = -text[:, 0].gather(-1, many.text[:, :1])[:, 0]
    wanted = torch.cat([words, -text[:, 1, 0]]).mean()  # a word and the end of the caption each
    assert text_loss(prior, many) == pytest.approx(float(wanted), rel=1e-5)


def test_draws_follow_the_seed_and_not_the_batch() -> None:
    """Arms whose draws differ by chance; candidates that depend on how many are drawn."""
    prior, data = Transformer(SHAPE, seed=2).eval(), pairs()
    first = draw_one_each(prior, data.text, 0)
    torch.testing.assert_close(draw_one_each(prior, data.text[:2], 0), first[:2])
    assert not torch.equal(draw_one_each(prior, data.text, 1), first)
    same = draw_one_each(prior, data.text[:1].repeat(8, 1), 0)
    assert len(same.unique(dim=0)) > 1  # a caption that comes twice is drawn twice


def test_what_cannot_be_trained_is_refused() -> None:
    """A schedule that the loop does not know and would run as another one."""
    with pytest.raises(ValueError, match="expected cosine, got 'plateau'"):
        train_prior(Transformer(SHAPE, seed=0), pairs(), recipe(2, "plateau"), 0)
    prior = Transformer(SHAPE, seed=0)
    with torch.no_grad():
        prior.image_head.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"loss: expected a finite number.*update 1"):
        train_prior(prior, pairs(), recipe(2), 0)

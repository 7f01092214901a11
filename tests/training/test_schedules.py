"""Schedules and the iterate average."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dalle1.training.ema import EMA, assign_owners
from dalle1.training.schedules import PlateauHalving, cosine, linear_warmup


@pytest.mark.parametrize(
    ("start", "end", "steps"),
    [(0.0, 6.6, 5000), (1.0, 1 / 16, 150_000), (1e-4, 1.25e-6, 1_200_000)],
)
def test_cosine_ends(start: float, end: float, steps: int) -> None:
    """The paper's three schedules missing their end points, or changing after them."""
    assert cosine(0, start, end, steps) == pytest.approx(start)
    assert cosine(steps // 2, start, end, steps) == pytest.approx((start + end) / 2)
    assert cosine(steps, start, end, steps) == end
    assert cosine(10 * steps, start, end, steps) == end


def test_cosine_is_a_cosine() -> None:
    """A linear or compounding decay in its place."""
    assert cosine(25, 1.0, 0.0, 100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_linear_warmup() -> None:
    """A first update with a learning rate of 0, or a warmup that overshoots."""
    assert [linear_warmup(i, 4) for i in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert linear_warmup(0, 0) == 1


def test_plateau_halves_at_most_five_times_and_only_on_plateaus() -> None:
    """Halvings while the loss falls, or without end."""
    falling = PlateauHalving(patience=3)
    for i in range(60):
        falling.update(10 * 0.9**i)
    assert falling.factor == 1
    flat = PlateauHalving(patience=3)
    for _ in range(60):
        flat.update(2.0)
    assert flat.factor == 0.5**5


def test_plateau_state_round_trip() -> None:
    """A resumed run that halves at another update than the uninterrupted one."""
    whole, first = PlateauHalving(4), PlateauHalving(4)
    losses = [3.0, 2.5, 2.4, 2.4, 2.4, 2.4, 2.4, 2.4, 2.4, 2.4, 2.4, 2.4, 2.4]
    for loss in losses:
        whole.update(loss)
    for loss in losses[:6]:
        first.update(loss)
    second = PlateauHalving(4)
    second.load_state_dict(first.state_dict())
    for loss in losses[6:]:
        second.update(loss)
    assert second.state_dict() == whole.state_dict()


def test_ema_against_the_sum() -> None:
    """A decay applied the wrong way round, or an average that aliases the weights."""
    layer = nn.Linear(1, 1, bias=False)
    values = [1.0, 2.0, 4.0, 8.0]
    layer.weight.data.fill_(values[0])
    ema = EMA(layer.named_parameters(), ["weight"], decay=0.9)
    expected = values[0]
    for value in values[1:]:
        layer.weight.data.fill_(value)
        ema.update(layer.named_parameters())
        expected = 0.9 * expected + 0.1 * value
    assert ema.average["weight"].item() == pytest.approx(expected)


def test_ema_every() -> None:
    """Averaging at each update where every 25th is meant."""
    ema = EMA([], [], decay=0.5, every=25)
    assert [step for step in range(60) if ema.due(step)] == [24, 49]


def test_ema_keeps_its_share() -> None:
    """The full model in every process' memory; a weight that nobody or two ranks keep."""
    sizes = {"large": 100, "a": 30, "b": 40, "c": 35}
    owner = assign_owners(sizes, 2)
    assert owner.keys() == sizes.keys() and set(owner.values()) == {0, 1}
    load = [sum(n for name, n in sizes.items() if owner[name] == rank) for rank in (0, 1)]
    assert sorted(load) == [100, 105]
    weights = {name: torch.ones(n) for name, n in sizes.items()}
    ema = EMA(weights.items(), [name for name in sizes if owner[name] == 1], decay=0.5)
    ema.update((name, 3 * weight) for name, weight in weights.items())
    assert set(ema.average) == {name for name in sizes if owner[name] == 1}
    assert all(bool((value == 2).all()) for value in ema.average.values())

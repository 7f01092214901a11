"""Schedules and the iterate average."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dalle1.training.ema import EMA
from dalle1.training.schedules import PlateauHalving, cosine, warm_up


@pytest.mark.parametrize(
    ("start", "end", "steps"),
    [(0.0, 6.6, 5000), (1.0, 1 / 16, 150_000), (1e-4, 1.25e-6, 1_200_000)],
)
def test_cosine_ends(start: float, end: float, steps: int) -> None:
    """The paper's three schedules missing their end points, or going on behind them."""
    assert cosine(0, start, end, steps) == pytest.approx(start)
    assert cosine(steps // 2, start, end, steps) == pytest.approx((start + end) / 2)
    assert cosine(steps, start, end, steps) == end
    assert cosine(10 * steps, start, end, steps) == end


def test_cosine_is_a_cosine() -> None:
    """A linear or compounding decay in its place."""
    assert cosine(25, 1.0, 0.0, 100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_warm_up() -> None:
    """A first update of step size 0, or a warm-up that overshoots."""
    assert [warm_up(i, 4) for i in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warm_up(0, 0) == 1


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
    ema = EMA(layer, decay=0.9)
    expected = values[0]
    for step, value in enumerate(values[1:]):
        layer.weight.data.fill_(value)
        ema.update(layer, step)
        expected = 0.9 * expected + 0.1 * value
    assert ema.average["weight"].item() == pytest.approx(expected)


def test_ema_every() -> None:
    """Averaging at each update where every 25th is meant."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    ema = EMA(layer, decay=0.5, every=25)
    layer.weight.data.fill_(1.0)
    for step in range(50):
        ema.update(layer, step)
    assert ema.average["weight"].item() == 0.75


def test_ema_applied_puts_weights_back() -> None:
    """Training that goes on from the average after a sheet was drawn."""
    layer = nn.Linear(2, 2).train()
    ema = EMA(layer, decay=0.5)
    before = layer.weight.detach().clone()
    ema.average["weight"] = torch.zeros(2, 2)
    with pytest.raises(RuntimeError), ema.applied(layer):
        assert not layer.training and layer.weight.abs().sum() == 0
        raise RuntimeError
    assert layer.training and torch.equal(layer.weight, before)

"""Schedules and the iterate average."""

from __future__ import annotations

import math

import numpy as np
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


@pytest.mark.parametrize("unit", [1e-5, 1.0, 1e3])
@pytest.mark.parametrize("level", [-1.0, -2.27, -300.0, 0.0, 2.0])
def test_plateau_of_any_sign(level: float, unit: float) -> None:
    """A constant negative loss that counts as falling for ever, since it is below its product with
    a number less than 1; a loss that falls below zero, which counts as a plateau."""
    flat = PlateauHalving(patience=3)
    for _ in range(60):
        flat.update(unit * level)
    assert flat.halvings == 5
    falling, rising = PlateauHalving(patience=3), PlateauHalving(patience=3)
    for i in range(60):
        falling.update(unit * (level - 0.5 * i))
        rising.update(unit * (level + 0.5 * i))
    assert falling.halvings == 0 and rising.halvings == 5


def test_plateau_tolerance_is_of_the_size() -> None:
    """A rule that is another one for positive losses than it was, or than for negative ones."""
    for sign in (1.0, -1.0):
        for fall, halvings in ((0.9e-3, 1), (1.1e-3, 0)):
            plateau = PlateauHalving(patience=1)
            plateau.update(4 * sign)
            plateau.update(4 * sign - 4 * fall)
            assert plateau.halvings == halvings


def test_plateau_begins_anew_with_a_phase() -> None:
    """A window of two phases; a rate halved for the losses of a phase that is over."""
    plateau = PlateauHalving(patience=4)
    for loss in (0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1):
        plateau.update(loss)
    assert plateau.halvings == 1
    plateau.begin_phase()
    assert plateau.state_dict() == PlateauHalving(patience=4).state_dict()
    for i in range(40):
        plateau.update(10 * 0.9**i)
    assert plateau.factor == 1


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


@pytest.mark.parametrize(
    ("every", "skipped", "averaged"),
    [
        (1, [1, 2], [0, 3, 4, 5, 6, 7, 8, 9]),
        (4, [3], [4, 7]),
        (4, [3, 4, 5], [6, 7]),
        (4, [3, 4, 5, 6, 7, 8], [9]),
        (4, [0, 1, 5], [3, 7]),
    ],
)
def test_ema_takes_its_missed_turn(every: int, skipped: list[int], averaged: list[int]) -> None:
    """A turn lost when its update is skipped: at 20 % skips the average takes in a fifth less."""
    weight = torch.zeros(1)
    ema, times = EMA([("w", weight)], ["w"], decay=0.0, every=every), []
    for step in range(10):
        weight.fill_(step + 1.0)
        ema.after_update(step, step not in skipped, [("w", weight)])
        if ema.average["w"].item() == step + 1:
            times.append(step)
    assert times == averaged


def test_ema_turns_of_many_updates() -> None:
    """As many turns as are due, at any share of skips (3,166 of 4,000 before)."""
    random = np.random.default_rng(0)
    ema, turns = EMA([], [], decay=0.5, every=25), 0
    for step in range(100_000):
        done = bool(random.random() > 0.2)
        turns += done and (ema.missed or ema.due(step))
        ema.after_update(step, done, [])
    assert turns >= 3999


def test_ema_is_bounded() -> None:
    """An average above the bound of its weight, as an earlier release could leave it."""
    weights = {"scale": torch.ones(1), "other": torch.ones(1)}
    ema = EMA(weights.items(), list(weights), decay=0.9, maxima={"scale": 4.0})
    ema.average = {"scale": torch.full((1,), 9.0), "other": torch.full((1,), 9.0)}
    ema.update(weights.items())
    assert ema.average["scale"].item() == 4 and ema.average["other"].item() > 8


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

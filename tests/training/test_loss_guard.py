"""Bad numbers, signals, lost ranks: what a run does about them."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle1.training import loss_guard
from dalle1.training.config import FaultSettings, RunConfig
from dalle1.training.loss_guard import NOT_FINITE, OVERFLOW, LossGuard
from dalle1.training.metrics_logger import MetricsLogger, read_metrics
from dalle1.training.signals import StopSignals, means_lost_rank
from dalle1.training.trainer import Trainer, train
from dalle1.transformer import gradient_scale

from .conftest import tiny


def test_loss_that_is_no_number_stops() -> None:
    """Months of training on NaN."""
    guard = LossGuard(FaultSettings())
    for loss in (math.nan, math.inf):
        reason = guard.reason_to_skip(loss)
        assert reason is not None and str(loss) in reason
        with pytest.raises(ValueError, match=r"faults\.bad_update=skip"):
            guard.record(7, loss, reason)


def test_spike_is_measured_by_the_mean() -> None:
    """A spike among the first losses, which fall steeply; a mean that a spike itself lifts."""
    guard = LossGuard(FaultSettings(spike=2.0, bad_update="skip"))
    for step in range(loss_guard.MIN_UPDATES):
        assert guard.reason_to_skip(100.0) is None  # nothing is a spike yet
        guard.record(step, 3.0, None)
    assert guard.mean == pytest.approx(3.0)
    assert guard.reason_to_skip(5.9) is None
    reason = guard.reason_to_skip(6.1)
    assert reason is not None and "faults.spike" in reason
    guard.record(60, 6.1, reason)
    assert guard.mean == pytest.approx(3.0) and guard.skipped == 1
    again = LossGuard(guard.settings)
    again.load_state_dict(guard.state_dict())
    assert again.reason_to_skip(6.1) == reason


def fed(guard: LossGuard, losses: list[float]) -> list[bool]:
    """Which of the losses are spikes; the others count."""
    spikes = []
    for step, loss in enumerate(losses):
        reason = guard.reason_to_skip(loss)
        guard.record(step + 1, loss, reason)
        spikes.append(reason is not None)
    return spikes


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("mean", [-2.27, -40.0, 0.0, 0.02, 3.0])
def test_spike_is_a_matter_of_no_sign_and_no_unit(mean: float, unit: float) -> None:
    """A ratio to the mean: with a negative loss each update is a spike, with one near zero any, and
    with neither is a real spike told from the others."""
    noise = np.random.default_rng(0).normal(mean, 0.05, 400)
    for limit in (2.0, 3.0):
        guard = LossGuard(FaultSettings(spike=limit, bad_update="skip"))
        assert not any(fed(guard, (unit * noise).tolist()))
        high = guard.reason_to_skip(unit * (mean + 10))
        assert high is not None and "faults.spike" in high
        assert guard.reason_to_skip(unit * (mean - 10)) is None  # a fall is no spike


@pytest.mark.parametrize("loss", [-1.0, -2.27, -1e-3])
def test_constant_negative_loss_is_no_spike(loss: float) -> None:
    """Updates skipped since the running mean of equal losses is rounded."""
    guard = LossGuard(FaultSettings(spike=1.1, bad_update="skip"))
    assert not any(fed(guard, [loss] * 200))
    assert guard.reason_to_skip(-loss) is not None


def test_loss_falls_through_zero_without_spikes() -> None:
    """A dVAE's loss that becomes negative, all of whose updates are skipped from there on."""
    rng = np.random.default_rng(1)
    falling = [4 * 0.99**i - 2.27 + rng.normal(0, 0.03) for i in range(1000)]
    guard = LossGuard(FaultSettings(spike=2.0, bad_update="skip"))
    assert not any(fed(guard, falling))
    assert guard.reason_to_skip(0.5) is not None


def test_phase_has_its_own_mean(tmp_path: Path, shards: str, parts: Path) -> None:
    """The first updates of the ELB skipped as spikes, since they are measured by the warm start's
    squared errors; a plateau found between losses of two kinds."""
    guard = LossGuard(FaultSettings(spike=2.0, bad_update="skip"))
    fed(guard, [0.01] * 100)
    assert guard.reason_to_skip(1.5) is not None
    guard.begin_phase()
    assert not any(fed(guard, [1.5] * 100))
    optimizer = tiny("dvae", shards, tmp_path, parts).optimizer
    config = tiny(
        "dvae",
        shards,
        tmp_path / "run",
        parts,
        steps=6,
        optimizer=optimizer.model_copy(update={"schedule": "plateau", "plateau_patience": 3}),
    )
    assert config.dvae_training is not None and config.dvae_training.warm_start_steps == 4
    trainer = Trainer(config)
    trainer.run()
    elb = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line][4:]
    assert trainer.loss_guard.mean == pytest.approx(sum(elb) / 2)
    assert trainer.plateau.state_dict() == {
        "halvings": 0, "count": 2, "total": pytest.approx(sum(elb)), "former": None,
    }  # fmt: skip


@pytest.mark.parametrize("skipped", [0, 3])
def test_state_of_an_earlier_release(skipped: int) -> None:
    """A run that does not resume, or that takes a mean without its deviation for a noise of 0."""
    guard = LossGuard(FaultSettings(spike=2.0, bad_update="skip"))
    guard.load_state_dict({"mean": -2.27, "count": 900, "in_a_row": 2, "skipped": skipped})
    assert (guard.skipped, guard.in_a_row) == (skipped, 2)
    noise = np.random.default_rng(0).normal(-2.27, 0.3, 200)
    assert not any(fed(guard, noise.tolist()))
    assert guard.skipped == skipped and guard.reason_to_skip(5.0) is not None


def test_skipped_updates_are_counted_by_cause() -> None:
    """Overflows that nobody hears of; one number for three causes; a warning for each overflow,
    though now and then one is as it should be."""
    guard = LossGuard(FaultSettings(bad_update="skip", max_skipped=5))
    told = []
    for step in range(1, 41):
        guard.record(step, 1.0, OVERFLOW)  # more in a row than max_skipped: no bad updates
        told.append(guard.warning(step, OVERFLOW))
    assert [i + 1 for i, text in enumerate(told) if text] == [10, 20, 40]
    assert guard.nothing_done(40) and not guard.nothing_done(41)
    guard.record(41, 1.0, None)
    guard.record(42, 1.0, NOT_FINITE)
    guard.record(43, math.inf, guard.reason_to_skip(math.inf))
    guard.record(44, 1.0, OVERFLOW)
    assert guard.warning(44, OVERFLOW) is None
    assert guard.metrics() == {
        "updates_skipped": 43,
        "updates_skipped/overflow": 41,
        "updates_skipped/gradient": 1,
        "updates_skipped/loss": 1,
    }
    assert guard.summary(44) == (
        "43 of 44 updates were skipped (41 by overflow, 1 by gradient, 1 by loss)"
    )
    again = LossGuard(guard.settings)
    again.load_state_dict(guard.state_dict())
    assert again.metrics() == guard.metrics() and again.state_dict() == guard.state_dict()


def overflowing(
    monkeypatch: pytest.MonkeyPatch, config: RunConfig, lowest: float, first: float
) -> Trainer:
    """A run in float16 whose gradient scales are beyond all that float16 holds."""
    monkeypatch.setattr(gradient_scale, "LOWEST", lowest)
    monkeypatch.setattr(gradient_scale, "HIGHEST", 2.0**60)
    monkeypatch.setattr(gradient_scale, "FIRST", first)
    return Trainer(config)


def test_run_of_overflows_is_told(
    tmp_path: Path,
    shards: str,
    parts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run with an overflow in every update that ends as if all were well, and exports a model
    that has learned nothing."""
    run = tmp_path / "run"
    config = tiny("dalle", shards, run, parts, steps=20, parallel={"precision": "fp16"})
    trainer = overflowing(monkeypatch, config, 2.0**40, 2.0**50)
    before = {name: weight.clone() for name, weight in trainer.engine.weights()}
    trainer.run()
    assert trainer.engine.updates_done() == 0
    assert all(torch.equal(before[name], weight) for name, weight in trainer.engine.weights())
    line = [x for x in read_metrics(run) if "loss" in x][-1]
    assert line["updates_skipped"] == line["updates_skipped/overflow"] == 20
    told = capsys.readouterr().err
    assert "the last 10 updates, up to 10, were skipped" in told and "up to 20" in told
    assert "20 of 20 updates were skipped (20 by overflow)" in told
    assert "model not exported" in told and not (run / "model").exists()
    with pytest.raises(ValueError, match=r"^steps: .* 20 of 20 .* parallel\.precision"):
        train(config, resume=True)  # the command ends with exit status 2
    # In a precision that holds them the same run goes on, and knows what it has skipped.
    further = tiny("dalle", shards, run, parts, steps=24)
    Trainer(further, resume=True).run()
    assert (run / "model").is_dir()
    assert [x for x in read_metrics(run) if "loss" in x][-1]["updates_skipped"] == 20


def test_overflow_at_the_lowest_scale_stops(
    tmp_path: Path, shards: str, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that skips updates for ever, at a scale that can fall no more."""
    monkeypatch.setattr(gradient_scale, "PATIENCE", 3)
    run = tmp_path / "run"
    config = tiny("dalle", shards, run, parts, steps=100, parallel={"precision": "fp16"})
    trainer = overflowing(monkeypatch, config, 2.0**50, 2.0**51)
    with pytest.raises(ValueError, match=r"^parallel\.precision: .* lowest .*precision=bf16"):
        trainer.run()
    # Divisions at updates 1 and 4 lead from 2^51 to 2^50; the next one is due at update 7.
    assert trainer.step == 7 and trainer.engine.updates_done() == 0


def test_too_many_skipped_stop() -> None:
    """Skipping for ever; counting those long ago."""
    guard = LossGuard(FaultSettings(bad_update="skip", max_skipped=3))
    for reason in ("x", "x", None, "x", "x"):
        guard.record(1, 1.0, reason)
    with pytest.raises(ValueError, match=r"faults\.max_skipped 3"):
        guard.record(6, 1.0, "x")


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_skipped_update_changes_nothing(
    zero: int, tmp_path: Path, shards: str, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments or the average touched by an update that was skipped."""
    config = tiny(
        "clip",
        shards,
        tmp_path / "run",
        parts,
        steps=6,
        parallel={"zero_stage": zero},
        faults={"bad_update": "skip"},
    )
    trainer = Trainer(config)
    accept, seen = trainer.loss_guard.reason_to_skip, []

    def bad_third(loss: float) -> str | None:
        seen.append({name: w.clone() for name, w in trainer.engine.weights()})
        seen[-1] |= {name: m.clone() for name, m in trainer.engine.moments()}
        seen[-1] |= {f"average/{n}": a.clone() for n, a in trainer.ema.average.items()}
        return "a test says so" if len(seen) == 3 else accept(loss)

    monkeypatch.setattr(trainer.loss_guard, "reason_to_skip", bad_third)
    trainer.run()
    assert all(torch.equal(seen[2][name], seen[3][name]) for name in seen[2])
    assert not all(torch.equal(seen[1][name], seen[2][name]) for name in seen[1])
    assert trainer.engine.updates_done() == 5
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert lines[-1]["updates_skipped"] == 1


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_gradient_that_is_no_number_stops(
    zero: int, tmp_path: Path, shards: str, parts: Path
) -> None:
    """A finite loss with an infinite gradient, which spoils every weight by way of the clipping."""
    config = tiny("clip", shards, tmp_path / "run", parts, steps=6, parallel={"zero_stage": zero})
    trainer = Trainer(config)
    name = "model.text_projection"
    parameter = dict(trainer.stage.named_parameters())[name]
    parameter.register_hook(lambda gradient: gradient / 0)
    before = {name: weight.clone() for name, weight in trainer.engine.weights()}
    with pytest.raises(ValueError, match="a gradient is not finite"):
        trainer.run()
    assert all(torch.equal(before[name], weight) for name, weight in trainer.engine.weights())


def test_rank_without_a_launcher_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that trains on alone, on a machine whose launcher was killed."""
    with StopSignals(launched=True) as signals:
        assert signals.number == 0
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert signals.number == signal.SIGTERM
    with StopSignals() as signals:  # its terminal was closed: no matter
        monkeypatch.setattr(os, "getppid", lambda: 2)
        assert signals.number == 0


def test_lost_ranks_are_told_from_mistakes() -> None:
    """A defect of the code reported as a lost rank, or a lost rank as a traceback."""
    assert means_lost_rank(torch.distributed.DistBackendError("NCCL communicator was aborted"))
    assert means_lost_rank(
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    )
    assert not means_lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not means_lost_rank(ValueError("Timed out"))


def test_reports_on_a_full_disk(
    tmp_path: Path, shards: str, parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that ends since a line of its metrics could not be written."""
    trainer = Trainer(tiny("clip", shards, tmp_path / "run", parts, steps=4))
    before = trainer._make_logger

    def full() -> MetricsLogger:
        log = before()
        assert log is not None
        log._file = open("/dev/full", "a")  # noqa: SIM115
        return log

    trainer._make_logger = full  # type: ignore[method-assign]
    trainer.run()
    assert trainer.step == 4 and (tmp_path / "run" / "model").is_dir()
    assert capsys.readouterr().err.count("reports are missing") == 1

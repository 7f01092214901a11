"""Bad numbers, signals, lost ranks: what a run does about them."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
import torch

from dalle1.training import loss_guard
from dalle1.training.config import FaultSettings
from dalle1.training.loss_guard import LossGuard
from dalle1.training.metrics_logger import MetricsLogger, read_metrics
from dalle1.training.signals import StopSignals, means_lost_rank
from dalle1.training.trainer import Trainer

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

"""What AdamW does to which weights: decay, and the bound of CLIP's logit scale."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle1.clip.model import MAX_LOGIT_SCALE
from dalle1.training.config import RunConfig
from dalle1.training.metrics_logger import read_metrics
from dalle1.training.stages.base import ParameterGroup
from dalle1.training.trainer import Trainer

from .conftest import tiny
from .worker import finish, start

SCALE = "model.logit_scale"
ZERO_STAGES = pytest.mark.parametrize("zero", [0, 1, 2, 3])


def clip_run(
    run: Path, shards: str, parts: Path, zero: int = 0, steps: int = 3, **settings: object
) -> RunConfig:
    """A tiny run of CLIP that learns fast, without clipping or warmup."""
    optimizer = {"schedule": "constant", "warmup_steps": 0, "clip_norm": None, **settings}
    return tiny(
        "clip", shards, run, parts, steps=steps, parallel={"zero_stage": zero}, optimizer=optimizer
    )


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in trainer.engine.weights()}


@ZERO_STAGES
def test_clip_decays_neither_gains_nor_biases(
    zero: int, tmp_path: Path, shards: str, parts: Path
) -> None:
    """Gains, biases and the logit scale pulled to 0, which Radford et al. (2021, 2.5) except."""
    moved = {}
    for decay in (0.0, 1e3):
        config = clip_run(
            tmp_path / str(decay), shards, parts, zero, 1, learning_rate=1e-4, weight_decay=decay
        )
        trainer = Trainer(config)
        if not moved:
            # Else all biases are 0, and no decay would show.
            trainer.engine.load_weights({n: w + 0.5 for n, w in trainer.engine.weights()})
            before = weights_of(trainer)
        else:
            trainer.engine.load_weights(before)
        trainer.run()
        moved[decay] = weights_of(trainer)
    plain, decayed = moved[0.0], moved[1e3]
    same = {name for name in plain if torch.equal(plain[name], decayed[name])}
    # All gains and biases of 1 + 1 layers, the two norms beside them in the image's encoder, the
    # one in the text's, and the scale.
    kinds = ("bias", "ln_1.weight", "ln_2.weight", "ln_pre.weight", "ln_post.weight")
    assert same == {
        name for name in plain if name.endswith((*kinds, "ln_final.weight")) or name == SCALE
    }
    assert len(same) == 2 * (4 + 4) + 3 * 2 + 1
    for name in plain.keys() - same:  # learning rate x decay is 0.1
        expected = plain[name] - 0.1 * before[name]
        torch.testing.assert_close(decayed[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", ["dvae", "dalle"])
def test_other_stages_decay_all(stage: str, tmp_path: Path, shards: str, parts: Path) -> None:
    """An exception that the paper does not name, or a weight that is in no group or in two."""
    trainer = Trainer(tiny(stage, shards, tmp_path / "run", parts))
    groups = trainer.stage.parameter_groups()
    assert all(group == ParameterGroup(group.names) for group in groups)
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(name for name, _ in trainer.stage.named_parameters())
    assert {g["weight_decay"] for g in trainer.engine._optimizer.param_groups} == {4.5e-2}


@ZERO_STAGES
@pytest.mark.parametrize("first", [math.log(99.99), math.log(100), 7.0])
def test_logit_scale_is_clipped_after_each_update(
    zero: int, first: float, tmp_path: Path, shards: str, parts: Path
) -> None:
    """A scale above its bound whose gradient is 0, so that it stays there for ever; a bound that
    holds for a shard, the optimizer's copy or the average alone."""
    config = clip_run(tmp_path / "run", shards, parts, zero, steps=4, learning_rate=0.5)
    trainer = Trainer(config)
    trainer.engine.load_weights({SCALE: torch.tensor([first])})
    trainer.ema.reset(trainer.engine.weights("model."))
    # Gradients that push it up, then down.
    seen, sign = [], -1.0
    parameter = dict(trainer.stage.named_parameters())[SCALE]
    parameter.register_hook(lambda gradient: torch.full_like(gradient, sign))
    update = trainer._update

    def noted(batch: object) -> object:
        nonlocal sign
        sign = -1.0 if trainer.step < 2 else 1.0
        result = update(batch)  # type: ignore[arg-type]
        seen.append(weights_of(trainer)[SCALE].item())
        assert trainer.ema.average["logit_scale"].item() <= MAX_LOGIT_SCALE + 1e-6
        return result

    trainer._update = noted  # type: ignore[method-assign, assignment]
    trainer.run()
    assert seen[:2] == pytest.approx([MAX_LOGIT_SCALE] * 2, abs=1e-6)
    assert seen[3] < MAX_LOGIT_SCALE - 0.05  # it comes down again
    assert max(seen) <= MAX_LOGIT_SCALE + 1e-6
    shown = [line["logit_scale"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert max(shown) <= 100 + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_logit_scale_is_clipped_on_all_ranks(
    zero: int, tmp_path: Path, shards: str, parts: Path
) -> None:
    """A single number that ZeRO shards over two ranks: one clips it, and the other keeps it."""
    run = tmp_path / "run"
    Trainer(clip_run(run, shards, parts, steps=1, learning_rate=1e-3)).run()
    trainer = Trainer(clip_run(run, shards, parts, steps=2, learning_rate=1e-3), resume=True)
    trainer.engine.load_weights({SCALE: torch.tensor([7.0])})  # as a release before could leave it
    trainer.ema.average["logit_scale"].fill_(7.0)
    trainer.step = 2
    trainer._save()
    trainer._run_folder.release()  # for the ranks, which are other processes
    further = clip_run(run, shards, parts, zero, steps=4, learning_rate=1e-3)
    finish(start(further, 2, run, "--resume"), run)
    after = Trainer(clip_run(run, shards, parts, steps=5), resume=True)
    assert weights_of(after)[SCALE].item() == pytest.approx(MAX_LOGIT_SCALE, abs=0.01)
    assert after.ema.average["logit_scale"].item() <= MAX_LOGIT_SCALE + 1e-6

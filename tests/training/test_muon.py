"""Muon: which weights it updates, by how much, and that a run with it resumes.

Dimensions: m n rows and columns of a matrix.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from dalle1.training.config import OptimizerSettings, RunConfig
from dalle1.training.optimizer import TrainingOptimizer
from dalle1.training.trainer import Trainer

from .conftest import tiny
from .test_trainer import run_until, tensors

MUON = {"kind": "muon", "learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant"}


def muon_run(
    run: Path, shards: str, parts: Path, stage: str = "dalle", **settings: object
) -> RunConfig:
    optimizer = {**MUON, "clip_norm": None, "weight_decay": 0.0}
    return tiny(stage, shards, run, parts, optimizer=optimizer, **settings)


def optimizer_of(
    parameters: list[nn.Parameter], matrices: list[nn.Parameter], **settings: object
) -> TrainingOptimizer:
    found = OptimizerSettings(**{**MUON, **settings})  # type: ignore[arg-type]
    groups = [
        {"params": parameters, "weight_decay": found.weight_decay},
        {"params": matrices, "weight_decay": found.weight_decay, "matrices": True},
    ]
    made = TrainingOptimizer([group for group in groups if group["params"]], found)
    made.init_state([*parameters, *matrices])
    return made


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)])
def test_an_update_is_the_orthogonal_part_of_the_momentum(shape: tuple[int, int]) -> None:
    """An update along the gradient itself, a momentum that is left out, a size that depends on the
    gradient's, or a decay that is not decoupled. The reference is an SVD in float64."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(shape, generator=generator) for _ in range(4))
    weight = nn.Parameter(start.clone())
    optimizer = optimizer_of([], [weight], momentum=0.9, weight_decay=0.5)
    momentum = torch.zeros(shape, dtype=torch.float64)
    for gradient in gradients:
        before = weight.detach().double()
        weight.grad = 1e3 * gradient
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient.double()
        ahead = 0.1 * gradient.double() + 0.9 * momentum  # Nesterov's
        u, singular, v = torch.linalg.svd(ahead, full_matrices=False)
        singular = singular / singular.norm()
        for _ in range(5):  # of Newton and Schulz, whose polynomial acts on singular values alone
            singular = 3.4445 * singular - 4.775 * singular**3 + 2.0315 * singular**5
        size = 1e-2 * 0.2 * max(shape) ** 0.5
        expected = before * (1 - 1e-2 * 0.5) - size * u @ singular.diag() @ v
        torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=0.03 * size)
        assert singular.min() > 0.3 and singular.max() < 1.3


def test_all_else_is_adamw() -> None:
    """Weights outside of matrices that stand still, or that move otherwise than by AdamW."""
    generator = torch.Generator().manual_seed(0)
    first, gradient = (torch.randn(5, 3, generator=generator) for _ in range(2))
    mine, reference = nn.Parameter(first.clone()), nn.Parameter(first.clone())
    matrix = nn.Parameter(torch.randn(4, 4, generator=generator))
    optimizer = optimizer_of([mine], [matrix])
    adamw = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.96), weight_decay=4.5e-2)
    for scale in (1.0, -2.0, 0.5):
        mine.grad, reference.grad = scale * gradient, scale * gradient
        matrix.grad = torch.ones_like(matrix)
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(mine, reference)
    assert [group.get("matrices", False) for group in optimizer.param_groups] == [False, True]


def test_a_skipped_update_changes_nothing() -> None:
    """A matrix, its momentum or the count of updates that move in an update that is skipped."""
    matrix = nn.Parameter(torch.eye(3))
    optimizer = optimizer_of([], [matrix])
    matrix.grad = torch.ones(3, 3)
    optimizer.skip = True
    optimizer.step()
    assert torch.equal(matrix, torch.eye(3))
    assert all(not value.any() for value in optimizer.state[matrix].values())


def test_muon_takes_the_matrices_of_the_blocks(tmp_path: Path, shards: str, parts: Path) -> None:
    """Embeddings, heads, positions or biases under Muon, or matrices of the blocks under AdamW."""
    trainer = Trainer(muon_run(tmp_path / "run", shards, parts, steps=1))
    names = {id(p): name for name, p in trainer.stage.named_parameters()}
    found = {
        names[id(p)].removeprefix("model.")
        for group in trainer.engine._optimizer.param_groups
        if group["matrices"]
        for p in group["params"]
    }
    layers = len(trainer.stage.model.layers)  # type: ignore[union-attr, arg-type]
    assert found == {
        f"layers.{i}.{name}.weight"
        for i in range(layers)
        for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    }


def test_a_run_with_muon_resumes_to_the_bit(tmp_path: Path, shards: str, parts: Path) -> None:
    """A momentum or a count of updates that a checkpoint leaves out."""
    Trainer(muon_run(tmp_path / "whole", shards, parts)).run()
    config = muon_run(tmp_path / "parts", shards, parts)
    run_until(config, 7)
    Trainer(config, resume=True).run()
    whole, resumed = (tensors(tmp_path / run, 20) for run in ("whole", "parts"))
    assert set(whole) == set(resumed)
    assert any(key.endswith("qkv.weight/momentum_buffer") for key in whole)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_run_keeps_its_optimizer(tmp_path: Path, shards: str, parts: Path) -> None:
    """A run of AdamW that resumes with Muon and finds no momentum; a checkpoint from before the
    setting was there that cannot resume."""
    run_until(tiny("dalle", shards, tmp_path / "run", parts), 3)
    with pytest.raises(
        ValueError, match=r"optimizer.kind: .* with 'adamw', the config says 'muon'"
    ):
        Trainer(muon_run(tmp_path / "run", shards, parts), resume=True)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_muon_needs_whole_matrices(zero: int, tmp_path: Path, shards: str, parts: Path) -> None:
    """Shards of ZeRO, flat rows of numbers, that are taken for matrices."""
    with pytest.raises(ValidationError, match=rf"optimizer.kind: .*zero_stage {zero} shards them"):
        muon_run(tmp_path / "run", shards, parts, parallel={"zero_stage": zero})


def test_muon_needs_matrices(tmp_path: Path, shards: str, parts: Path) -> None:
    """A stage of convolutions that says Muon and is trained by AdamW."""
    with pytest.raises(ValueError, match=r"optimizer.kind: .* got none; set it to adamw"):
        Trainer(muon_run(tmp_path / "run", shards, parts, "dvae"))

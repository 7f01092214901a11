"""The one trainer over its three stages."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import dalle1
import dvae
from dalle1 import registry
from dalle1.training import checkpoints
from dalle1.training.config import load_config
from dalle1.training.metrics_logger import read_metrics
from dalle1.training.signals import Interrupted
from dalle1.training.trainer import Trainer, train
from dvae import storage

from .conftest import run_until, tiny

GOLDEN = Path(__file__).parent / "golden_losses.json"
STAGES = ("dvae", "vqgan", "clip", "dalle")
# The k-means of the dVAE's warm start, and a VQGAN's nearest codes, carry a difference in the last
# bit, as between two kinds of CPUs, into all that follows: their first updates are compared. Of the
# dVAE a hundred updates are, too, without the start.
GOLDEN_RUNS: dict[str, tuple[str, dict[str, object], slice]] = {
    "dvae": (
        "dvae",
        {
            "dvae_training": {
                "kl_weight": 0.5,
                "kl_steps": 10,
                "temperature_steps": 10,
                "grain": 0.02,
            },
            "optimizer": {
                "learning_rate": 2e-4,
                "warmup_steps": 5,
                "schedule": "cosine",
                "clip_norm": 1.0,
                "beta2": 0.98,
            },
            "steps": 100,
        },
        slice(9, None, 10),
    ),
    "dvae, warm start": ("dvae", {}, slice(6)),
    "vqgan": ("vqgan", {}, slice(8)),
    "clip": ("clip", {"steps": 100}, slice(9, None, 10)),
    "dalle": ("dalle", {"steps": 100}, slice(9, None, 10)),
}


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


def tensors(run: Path, step: int) -> checkpoints.Tensors:
    return checkpoints.load(run / "checkpoints" / f"step-{step:07d}").tensors


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_on_cpus(stage: str, tmp_path: Path, shards: str, parts: Path) -> None:
    """`precision: bf16` that a stage does not read on CPUs, that rounds the weights or moments, or
    that does not resume to the bit."""
    narrow: dict[str, Any] = {"parallel": {"precision": "bf16"}}
    Trainer(tiny(stage, shards, tmp_path / "fp32", parts)).run()
    Trainer(tiny(stage, shards, tmp_path / "bf16", parts, **narrow)).run()
    config = tiny(stage, shards, tmp_path / "parts", parts, **narrow)
    run_until(config, 10)
    Trainer(config, resume=True).run()
    full, half = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert full != half  # it is read
    assert max(abs(a - b) for a, b in zip(full[:6], half[:6], strict=True)) < 0.05
    assert losses(tmp_path / "parts") == half
    one, two = (tensors(tmp_path / run, 20) for run in ("bf16", "parts"))
    assert {x.dtype for x in one.values()} <= {torch.float32, torch.int64, torch.bool}
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("has", [True, False])
def test_precision_that_is_chosen(
    has: bool, tmp_path: Path, shards: str, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose settings do not tell what it computed in, or bfloat16 that is emulated."""
    monkeypatch.setattr("dalle1.training.trainer.has_bfloat16", lambda _: has)
    name = "bf16" if has else "fp32"
    for precision in ("auto", name):
        parallel = {"precision": precision}
        config = tiny("clip", shards, tmp_path / precision, parts, steps=3, parallel=parallel)
        Trainer(config).run()
    assert losses(tmp_path / "auto") == losses(tmp_path / name)
    written = load_config(tmp_path / "auto" / "config.yaml")
    assert written.parallel.precision == name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("at", [3, 10])
def test_resume_is_the_same_run(
    stage: str, at: int, tmp_path: Path, shards: str, parts: Path
) -> None:
    """Order of data, noise, moments, average or schedules lost between stop and --resume.

    Update 3 is inside the dVAE's warm start, update 10 behind it.
    """
    Trainer(tiny(stage, shards, tmp_path / "whole", parts)).run()
    config = tiny(stage, shards, tmp_path / "parts", parts)
    run_until(config, at)
    Trainer(config, resume=True).run()
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    whole, resumed = (tensors(tmp_path / run, 20) for run in ("whole", "parts"))
    assert set(whole) == set(resumed)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def golden_losses(name: str, run: Path, shards: str, parts: Path) -> list[float]:
    """The losses of a run of GOLDEN_RUNS that golden_losses.json keeps."""
    stage, settings, kept = GOLDEN_RUNS[name]
    Trainer(tiny(stage, shards, run, parts, **settings)).run()
    return losses(run)[kept]


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_updates_keep_their_losses(name: str, tmp_path: Path, shards: str, parts: Path) -> None:
    """A change of a loss, an initialization, a schedule or the data that nobody meant.

    After a change that is meant, write the new losses: python -m tests.training.golden
    """
    found = golden_losses(name, tmp_path / "run", shards, parts)
    assert found == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=0.02, abs=0.005)
    assert sum(found[-3:]) < sum(found[:3]) or name in (
        "dvae",  # whose temperature falls
        "vqgan",  # whose adversary learns
    )


def test_running_variance_is_clipped(tmp_path: Path, shards: str, parts: Path) -> None:
    """A bound on AdamW's second moment (appendix B.2) that is never applied."""
    tops = {}
    for bound in (None, 1e-9):
        config = tiny("clip", shards, tmp_path / str(bound), parts)
        settings = config.optimizer.model_copy(update={"clip_variance": bound})
        run = tmp_path / str(bound)
        Trainer(config.model_copy(update={"optimizer": settings, "run": str(run)})).run()
        moments = tensors(run, 20).under("moments/")
        tops[bound] = max(float(x.max()) for name, x in moments.items() if "exp_avg_sq" in name)
    assert tops[1e-9] <= 1.0001e-9 < tops[None]


def test_run_folder(tmp_path: Path, shards: str, parts: Path) -> None:
    """A run that cannot be sampled from, or that leaves no trace of its settings."""
    run = tmp_path / "run"
    Trainer(tiny("dalle", shards, run, parts, steps=4, contact_sheet_every=2, save_every=2)).run()
    assert {p.name for p in (run / "sheets").iterdir()} == {
        "step-0000002.png",
        "step-0000004.png",
    }
    assert (run / "config.yaml").is_file() and list((run / "tensorboard").iterdir())
    line = read_metrics(run)[0]
    assert {"step", "loss", "text", "image", "learning_rate", "images_per_second"} <= line.keys()
    result = dalle1.sample(
        "a red circle", model=run / "model", candidates=3, keep=2, progress=False
    )
    assert result.tokens.shape == (1, 2, 4, 4)


def test_exported_weights_are_the_average(tmp_path: Path, shards: str, parts: Path) -> None:
    """Exporting the last weights in place of the iterate average."""
    run = tmp_path / "run"
    Trainer(tiny("dvae", shards, run, parts, steps=8)).run()
    average = tensors(run, 8).under("average/model.")
    exported = dvae.load(run / "model").state_dict()
    assert all(torch.equal(exported[key], average[key]) for key in exported)


def test_exported_model_is_on_the_disk(
    tmp_path: Path, shards: str, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model folder that a crash after the end of the run leaves empty or without its newest
    files."""
    flushed: set[str] = set()
    real = os.fsync

    def fsync(number: int) -> None:
        flushed.add(os.readlink(f"/proc/self/fd/{number}").removesuffix(".tmp"))
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    for stage in STAGES:
        run = tmp_path / stage
        Trainer(tiny(stage, shards, run, parts, steps=5)).run()
        files = {str(path) for path in (run / "model").iterdir()}
        written = {str(run / name) for name in ("config.yaml", "data.json", "model")}
        assert files | written | {str(run), str(tmp_path)} <= flushed


def damage(run: Path, step: int) -> None:
    path = run / "checkpoints" / f"step-{step:07d}" / "rank-00000-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_past_damaged_checkpoints_trains_to_its_end(
    keep: int, tmp_path: Path, shards: str, parts: Path
) -> None:
    """A run that removes the checkpoint just written in favor of damaged ones with higher numbers,
    and dies as it exports the model of it."""
    run = tmp_path / "run"
    settings = {"save_every": 2, "keep_checkpoints": 3}
    Trainer(tiny("clip", shards, run, parts, steps=8, **settings)).run()
    for step in (6, 8):
        damage(run, step)
    config = tiny("clip", shards, run, parts, steps=5, save_every=9, keep_checkpoints=keep)
    Trainer(config, resume=True).run()
    newest = checkpoints.newest(run / "checkpoints")
    assert newest is not None and newest.name == "step-0000005"
    average = tensors(run, 5).under("average/model.")
    exported = registry.load("ranker", run / "model").state_dict()
    assert all(torch.equal(exported[key], average[key]) for key in exported)


def test_checkpoint_that_cannot_be_read_back(
    tmp_path: Path,
    shards: str,
    parts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that ends in the middle, since the export met a disk that fails."""
    real = checkpoints.load

    def failing(path: Path) -> checkpoints.Checkpoint:
        if path.name == "step-0000002":
            raise ValueError(f"checkpoint {path} cannot be read: Input/output error")
        return real(path)

    monkeypatch.setattr(checkpoints, "load", failing)
    config = tiny("clip", shards, tmp_path / "run", parts, steps=4, save_every=2)
    Trainer(config).run()
    assert "model not exported" in capsys.readouterr().err
    assert registry.load("ranker", tmp_path / "run" / "model") is not None


@pytest.mark.parametrize("failing", ["checkpoint", "model"])
def test_end_that_cannot_be_written(
    failing: str,
    tmp_path: Path,
    shards: str,
    parts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run whose last save met a full disk: it counts as done, so that a script goes on without
    the model, and no --resume exports it."""
    run, real = tmp_path / "run", checkpoints.save_file

    def full(content: object, path: Path, *rest: object) -> None:
        if failing == "model" or "step-0000004" in str(path):
            raise OSError(28, "No space left on device")
        real(content, path, *rest)  # type: ignore[arg-type]

    module, writer = checkpoints, "save_file"
    if failing == "model":
        module, writer = storage, "write_safetensors"
    config = tiny("clip", shards, run, parts, steps=4, save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, writer, full)
        with pytest.raises(OSError, match=rf"^run: the last {failing} .* --resume"):
            train(config)
    assert "No space left" in capsys.readouterr().err
    train(config, resume=True)
    average = tensors(run, 4).under("average/model.")
    exported = registry.load("ranker", run / "model").state_dict()
    assert all(torch.equal(exported[key], average[key]) for key in exported)


def test_stop_that_cannot_be_saved(
    tmp_path: Path, shards: str, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who is told that a checkpoint is saved, and whose updates are lost."""

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    trainer = Trainer(tiny("clip", shards, tmp_path / "run", parts, steps=4))
    before = trainer.stage.replaces_weights
    monkeypatch.setattr(
        trainer.stage,
        "replaces_weights",
        lambda step: os.kill(os.getpid(), signal.SIGTERM) or before(step),
    )
    with pytest.raises(Interrupted, match="after update 1; it could not be saved"):
        trainer.run()


def test_refuses_to_overwrite_a_run(tmp_path: Path, shards: str, parts: Path) -> None:
    """Losing a trained run by typing the same command again."""
    config = tiny("clip", shards, tmp_path / "run", parts, steps=2)
    Trainer(config).run()
    with pytest.raises(ValueError, match="--resume"):
        Trainer(config)


def test_refuses_to_resume_another_model(tmp_path: Path, shards: str, parts: Path) -> None:
    """Resuming with another batch size or shape as if nothing had happened."""
    Trainer(tiny("clip", shards, tmp_path / "run", parts, steps=2)).run()
    with pytest.raises(ValueError, match="batch_size"):
        Trainer(tiny("clip", shards, tmp_path / "run", parts, steps=4, batch_size=4), resume=True)


@pytest.mark.parametrize(
    ("stage", "settings", "words"),
    [
        ("dvae", {"data": "nowhere/{0..3}.tar"}, "nowhere/0.tar"),
        ("dvae", {"reader": {"image_size": 18}}, "must be a multiple of 4"),
        (
            "dvae",
            {"dvae_training": {"warm_start_steps": 4, "warm_start_images": 1}},
            r"dvae_training\.warm_start_images: expected 2 to .* 32 codes with 16 .*got 1;",
        ),
        ("clip", {"reader": {"image_size": 8}}, "clip.image_size"),
        ("dalle", {"reader": {"image_size": 32}}, "reader.image_size"),
        ("dalle", {"codec": "nowhere"}, "nowhere"),
        ("dalle", {"ranker": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_before_the_first_update(
    stage: str, settings: dict[str, object], words: str, tmp_path: Path, shards: str, parts: Path
) -> None:
    """A wrong setting that costs the time until it is first used."""
    with pytest.raises(ValueError, match=words):
        Trainer(tiny(stage, shards, tmp_path / "run", parts, **{"data": shards} | settings))


def test_parts_of_different_sizes(tmp_path: Path, shards: str, parts: Path) -> None:
    """A transformer that trains on tokens which its dVAE cannot decode."""
    config = tiny("dalle", shards, tmp_path / "run", parts)
    assert config.transformer is not None
    other = config.transformer.model_copy(update={"image_vocab": 64})
    with pytest.raises(ValueError, match=r"vocabulary is 32, .* image_vocab is 64"):
        Trainer(config.model_copy(update={"transformer": other}))


def test_validation_is_the_same_batches_without_dropout(
    tmp_path: Path, shards: str, parts: Path
) -> None:
    """Held-out losses of other batches each time, with captions emptied, or that train."""
    settings = tiny("dalle", shards, tmp_path / "run", parts).optimizer
    config = tiny(
        "dalle",
        shards,
        tmp_path / "run",
        parts,
        steps=6,
        caption_dropout=0.9,
        optimizer=settings.model_copy(update={"learning_rate": 1e-12}),
        validation={"data": shards, "every": 2, "batches": 2},
    )
    trainer = Trainer(config)
    batch = next(trainer.data.held_out_batches())
    trainer.stage.eval()
    with_captions = trainer.stage.micro_batches(batch, 8)
    trainer.stage.train()
    without = trainer.stage.micro_batches(batch, 8)
    padding = 300  # text_vocab
    assert bool((with_captions[0].text[:, 0] < padding).all())
    assert not bool((without[0].text[:, 0] < padding).all())
    trainer.run()
    lines = [x for x in read_metrics(tmp_path / "run") if "validation/loss" in x]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert {"validation/text", "validation/image"} <= lines[0].keys()
    found = [line["validation/loss"] for line in lines]
    assert found == pytest.approx([found[0]] * 3, abs=1e-6)
    again = tiny("dalle", shards, tmp_path / "again", parts, steps=6, caption_dropout=0.9)
    Trainer(again.model_copy(update={"optimizer": config.optimizer})).run()
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


def test_what_a_run_reports(tmp_path: Path, shards: str, parts: Path) -> None:
    """Curves that are promised and not written; scales that are not there for each block."""
    optimizer = tiny("dalle", shards, tmp_path, parts).optimizer
    config = tiny(
        "dalle",
        shards,
        tmp_path / "run",
        parts,
        steps=6,
        parallel={"precision": "fp16"},
        optimizer=optimizer.model_copy(update={"schedule": "plateau", "plateau_patience": 2}),
    )
    Trainer(config).run()
    line = [x for x in read_metrics(tmp_path / "run") if "loss" in x][-1]
    assert {
        "text", "image", "gradient_norm", "learning_rate", "plateau_factor", "images_per_second",
        "tokens_per_second", "seconds_per_update", "data_wait", "memory_gb",
    } <= line.keys()  # fmt: skip
    assert line["tokens_per_second"] == pytest.approx(64 * line["images_per_second"])
    assert 0 <= line["data_wait"] <= 1 and 0.05 < line["memory_gb"] < 24
    scales = [line[f"gradient_scale/{block:03d}"] for block in range(6)]
    assert scales == pytest.approx([2**13 * 2 ** (6 / 1000)] * 6)


def test_wandb_is_asked_for_and_told(
    tmp_path: Path, shards: str, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that is used unasked; a run that begins without the package that it needs."""
    config = tiny("clip", shards, tmp_path / "run", parts, steps=2, wandb="shapes")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        Trainer(config).run()
    told: list[dict[str, float]] = []
    fake = ModuleType("wandb")
    run = SimpleNamespace(log=lambda values, step: told.append(values), finish=lambda: None)
    fake.init = lambda **settings: told.append(settings) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    Trainer(config).run()
    assert told[0]["project"] == "shapes" and "loss" in told[1]
    told.clear()
    Trainer(config.model_copy(update={"wandb": None, "run": str(tmp_path / "quiet")})).run()
    assert not told


@pytest.mark.parametrize("stage", STAGES)
def test_updates_read_no_image_values(
    stage: str, shards: str, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check of the images' range in every update, for which the host waits for the device."""

    def read(*_: object) -> None:
        raise AssertionError("the images' values were read")

    config = tiny(stage, shards, tmp_path, parts, steps=2)
    if config.dvae_training is not None:  # the end of a warm start may read them, once
        plain = config.dvae_training.model_copy(update={"warm_start_steps": 0})
        config = config.model_copy(update={"dvae_training": plain})
    trainer = Trainer(config)
    monkeypatch.setattr(torch.Tensor, "aminmax", read)
    trainer.run()
    assert len(losses(tmp_path)) == 2

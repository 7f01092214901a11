"""Tiny configs of the three stages over a folder of tiny shards."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dalle1.data import shapes
from dalle1.training.config import RunConfig
from dalle1.training.signals import Interrupted
from dalle1.training.trainer import Trainer

Configs = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums in a fixed order, so that runs can be compared bit by bit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two shards of 16x16 shapes."""
    folder = tmp_path_factory.mktemp("shards")
    shapes.write_shards(folder, "train", 96, side=16, samples_per_shard=48)
    return str(folder / "train-{00000..00001}.tar")


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Path:
    """Folders `dvae` and `clip` of models trained for a few updates, for stage two."""
    folder = tmp_path_factory.mktemp("parts")
    for stage in ("dvae", "clip"):
        Trainer(tiny(stage, shards, folder / stage, folder, steps=6)).run()
    return folder


def tiny(stage: str, shards: str, run: Path, parts: Path, **settings: object) -> RunConfig:
    """A config of a stage small enough for a few hundred updates in seconds."""
    optimizer = {
        "learning_rate": 1e-3,
        "warmup_steps": 5,
        "schedule": "cosine",
        "clip_norm": 1.0,
        "beta2": 0.98,
    }
    common: dict[str, object] = {
        "stage": stage,
        "run": str(run),
        "data": shards,
        "steps": 20,
        "batch_size": 8,
        "log_every": 1,
        "contact_sheet_every": None,
        "reader": {"image_size": 16, "shuffle_buffer": 20},
        "optimizer": optimizer,
        "ema": {"decay": 0.9, "every": 1},
    }
    own: dict[str, dict[str, object]] = {
        "dvae": {
            "dvae": {
                "width": 8,
                "bottleneck": 16,
                "groups": 3,
                "blocks_per_group": 1,
                "codebook_size": 32,
            },
            "dvae_training": {
                "kl_weight": 0.5,
                "kl_steps": 10,
                "temperature_steps": 10,
                "grain": 0.02,
                "warm_start_steps": 4,
                "warm_start_images": 32,
            },
        },
        "vqgan": {
            "vqgan": {
                "width": 8,
                "multipliers": [1, 1, 2],
                "blocks_per_level": 1,
                "attention_levels": [],
                "latent_channels": 8,
                "embedding_dim": 4,
                "codebook_size": 32,
                "norm_groups": 4,
            },
            "vqgan_training": {
                "codebook": {"revive_every": 6},
                "discriminator": {"start": 4, "layers": 2, "width": 8, "weight": 0.8},
            },
        },
        "clip": {
            "clip": {
                "embedding": 16,
                "image_size": 16,
                "patch_size": 8,
                "vision_width": 16,
                "vision_layers": 1,
                "vision_heads": 2,
                "text_vocab": 302,
                "text_length": 48,
                "text_width": 16,
                "text_layers": 1,
                "text_heads": 2,
            },
            "tokenizer": {"captions": 96},
        },
        "dalle": {
            "transformer": {
                "width": 32,
                "layers": 3,
                "heads": 2,
                "head_size": 16,
                "text_vocab": 300,
                "text_length": 48,
                "image_vocab": 32,
                "grid": 4,
            },
            "codec": str(parts / "dvae" / "model"),
            "ranker": str(parts / "clip" / "model"),
            "tokenizer": str(parts / "clip"),
            "caption_dropout": 0.1,
        },
    }
    return RunConfig(**(common | own[stage] | settings))


def run_until(config: RunConfig, step: int, resume: bool = False) -> Trainer:
    """Trains until `step` updates are done, then stops as Ctrl-C does."""
    trainer = Trainer(config, resume)
    before = trainer.stage.replaces_weights

    def stop_at(now: int) -> bool:
        if now == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return before(now)

    trainer.stage.replaces_weights = stop_at  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="--resume"):
        trainer.run()
    return trainer

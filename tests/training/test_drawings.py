"""CLIP against the drawings of a model: what it sees, what it learns, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dalle1
from dalle1.clip.model import CLIP
from dalle1.generation.options import SamplingOptions
from dalle1.training.clip_config import DrawingsSettings
from dalle1.training.config import RunConfig
from dalle1.training.stages.drawings import Drawings
from dalle1.training.trainer import Trainer
from tests.training.conftest import run_until, tiny

CAPTIONS = ["a red circle", "two blue squares above a green ring", "a ring"]
SEEDS = [7, 2**31, 8]


@pytest.fixture(scope="module")
def drawer(tmp_path_factory: pytest.TempPathFactory, shards: str, parts: Path) -> str:
    """Folder of a model that draws, trained for a few updates."""
    folder = tmp_path_factory.mktemp("drawer")
    Trainer(tiny("dalle", shards, folder / "run", parts, steps=6)).run()
    return str(folder / "run" / "model")


def config(
    drawer: str, shards: str, run: Path, drawings: dict[str, object] | None = None, **more: object
) -> RunConfig:
    """A run of CLIP against the drawings of a model."""
    settings = {"model": drawer, "candidates": 2, **(drawings or {})}
    return tiny("clip", shards, run, run, drawings=settings, **more)


def weights(folder: Path) -> dict[str, Tensor]:
    clip = dalle1.registry.load("ranker", folder / "model")
    assert isinstance(clip, CLIP)
    return clip.state_dict()


def test_drawings_are_the_models_own(drawer: str) -> None:
    """Drawings of another temperature, of wrong random numbers, or in another order."""
    drawn = Drawings(DrawingsSettings(model=drawer, candidates=3, temperature=0.7)).draw(
        CAPTIONS, SEEDS
    )
    assert drawn.shape == (9, 3, 16, 16) and drawn.dtype == torch.float32
    model = dalle1.load(drawer)
    for i, (caption, seed) in enumerate(zip(CAPTIONS, SEEDS, strict=True)):
        uniforms = torch.from_numpy(np.random.default_rng(seed).random((3, 16)))
        tokens = _one_by_one(model, caption, uniforms, SamplingOptions(temperature=0.7))
        images = model.codec.decode(tokens.view(3, 4, 4)).clamp(0, 1)
        torch.testing.assert_close(drawn[3 * i : 3 * i + 3], images)


def _one_by_one(
    model: dalle1.Model, caption: str, uniforms: Tensor, options: SamplingOptions
) -> Tensor:
    """Tokens [k, m], each from the logits of a full pass over all positions."""
    text = model.tokenizer.encode(caption).expand(len(uniforms), -1)
    tokens = torch.zeros(uniforms.shape, dtype=torch.int64)
    with torch.no_grad():
        for position in range(uniforms.shape[1]):
            logits = model.prior.image_logits(text, tokens)[:, position]  # type: ignore[attr-defined]
            tokens[:, position] = dalle1.generation.options.sample_token(
                logits, uniforms[:, position], options
            )
    return tokens


def test_drawings_of_a_caption_do_not_depend_on_the_batch(drawer: str) -> None:
    """A drawing that changes with the ranks that share a batch."""
    drawings = Drawings(DrawingsSettings(model=drawer, candidates=2))
    together = drawings.draw(CAPTIONS, SEEDS)
    alone = torch.cat([drawings.draw([c], [s]) for c, s in zip(CAPTIONS, SEEDS, strict=True)])
    torch.testing.assert_close(together, alone)


def test_copies_are_the_codecs(drawer: str) -> None:
    """True images that are told from drawings by what a codec does to every image."""
    images = torch.rand(3, 3, 16, 16)
    codec = dalle1.load(drawer).codec
    expected = codec.decode(codec.encode(images)).clamp(0, 1)
    copies = Drawings(DrawingsSettings(model=drawer)).copies(images)
    torch.testing.assert_close(copies, expected)
    larger = Drawings(DrawingsSettings(model=drawer)).copies(torch.rand(2, 3, 40, 40))
    assert larger.shape == (2, 3, 16, 16)


def test_clip_learns_to_prefer_true_images_to_drawings(
    tmp_path: Path, shards: str, drawer: str
) -> None:
    """Drawings that are not in the loss, or that count as right: CLIP would not tell them apart."""
    settings = config(
        drawer,
        shards,
        tmp_path / "run",
        steps=150,
        batch_size=16,
        optimizer={"learning_rate": 3e-3, "warmup_steps": 10, "clip_norm": 1.0},
    )
    trainer = Trainer(settings)
    batch = next(trainer.data.batches())
    assert batch.images is not None
    drawings = Drawings(DrawingsSettings(model=drawer, candidates=1))
    true = drawings.copies(batch.images / 255)
    drawn = drawings.draw(batch.captions, [seed + 1 for seed in batch.seeds])

    def preferred(clip: CLIP) -> float:
        """Share of the captions whose true image has a better score than the drawing."""
        own = clip.score(batch.captions, true).diagonal()
        return float((own > clip.score(batch.captions, drawn).diagonal()).float().mean())

    before = trainer.stage.model
    assert isinstance(before, CLIP)
    before.tokenizer = trainer.stage.tokenizer  # type: ignore[assignment]
    assert preferred(before) < 0.8
    trainer.run()
    after = dalle1.registry.load("ranker", tmp_path / "run" / "model")
    assert isinstance(after, CLIP)
    assert preferred(after) > 0.9


def test_run_resumes_to_the_bit(tmp_path: Path, shards: str, drawer: str) -> None:
    """Other drawings behind a checkpoint than in a run that was never stopped."""
    Trainer(config(drawer, shards, tmp_path / "whole", steps=6)).run()
    stopped = config(drawer, shards, tmp_path / "stopped", steps=6)
    run_until(stopped, 3)
    Trainer(stopped, resume=True).run()
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_drawer_is_noticed_on_resume(
    tmp_path: Path, shards: str, drawer: str, parts: Path
) -> None:
    """A run that goes on against other drawings under the same path."""
    other = tmp_path / "drawer"
    dalle1.load(drawer).save(other)
    run = config(str(other), shards, tmp_path / "run", steps=6)
    run_until(run, 3)
    Trainer(tiny("dalle", shards, tmp_path / "prior", parts, steps=4, seed=1)).run()
    dalle1.load(tmp_path / "prior" / "model").save(other)
    with pytest.raises(ValueError, match=r"^drawings.model: expected what the run began with"):
        Trainer(run, resume=True)


@pytest.mark.parametrize(
    ("stage", "drawings", "message"),
    [
        ("dvae", {"model": "x"}, "drawings is not read by stage 'dvae': take it out"),
        ("clip", {"model": "nowhere"}, r"drawings.model: .*nowhere"),
        ("clip", {"model": "x", "candidates": 0}, "candidates"),
        ("clip", {"model": "x", "temperature": 0}, "temperature"),
    ],
)
def test_wrong_settings_are_refused(
    stage: str, drawings: dict[str, Any], message: str, tmp_path: Path, shards: str
) -> None:
    """A run that fails at its first update, or that draws nothing."""
    with pytest.raises(ValueError, match=message):
        Trainer(tiny(stage, shards, tmp_path / "run", tmp_path, drawings=drawings))


def test_folder_of_a_ranker_alone_is_refused(tmp_path: Path, shards: str, parts: Path) -> None:
    """A CLIP's folder in place of a model's, whose error does not say which setting it is."""
    with pytest.raises(ValueError, match=r"^drawings.model: .*has no 'prior' section"):
        Trainer(config(str(parts / "clip" / "model"), shards, tmp_path / "run"))

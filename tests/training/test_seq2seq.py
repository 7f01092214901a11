"""Stage two with an encoder-decoder in the transformer's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dalle1
from dalle1.seq2seq.model import Seq2Seq
from dalle1.training.config import RunConfig
from dalle1.training.initialization import with_initial_parts
from dalle1.training.planning.network import ClusterSettings
from dalle1.training.planning.plan import plan
from dalle1.training.trainer import Trainer

from .conftest import run_until, tiny
from .test_trainer import losses, tensors

SHAPE = {
    "width": 32, "heads": 2, "encoder_layers": 2, "decoder_layers": 2, "ffn_width": 48,
    "text_vocab": 300, "text_length": 48, "padding": None, "empty_caption": [0],
    "image_vocab": 32, "grid": 4,
}  # fmt: skip


def small(shards: str, run: Path, parts: Path, **settings: Any) -> RunConfig:
    config = tiny("dalle", shards, run, parts).model_dump()
    config["transformer"] = None
    return RunConfig(**{**config, "seq2seq": SHAPE, **settings})


def test_loss_falls_and_the_folder_opens(shards: str, parts: Path, tmp_path: Path) -> None:
    """A loss of the text too, an export of another kind, captions emptied to padding alone."""
    config = small(shards, tmp_path / "run", parts, steps=60, caption_dropout=0.3)
    Trainer(config).run()
    found = losses(tmp_path / "run")
    assert sum(found[-10:]) < sum(found[:10]) - 3
    model = dalle1.load(tmp_path / "run" / "model")
    assert isinstance(model.prior, Seq2Seq) and model.prior.config == config.seq2seq
    assert (tmp_path / "run" / "model" / "seq2seq.safetensors").is_file()
    result = dalle1.sample("a red circle", model, candidates=3, keep=2, guidance=2, progress=False)
    assert result.tokens.shape == (1, 2, 4, 4)
    assert float(model.log_prob("a red circle", result.tokens[0, 0])) < 0
    with pytest.raises(ValueError, match="Seq2Seq models images, not captions"):
        model.complete_caption("a red")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_resumes_to_the_bit(precision: str, shards: str, parts: Path, tmp_path: Path) -> None:
    """Scales, moments or the data's order that begin anew."""
    settings = {"steps": 12, "parallel": {"precision": precision}}
    Trainer(small(shards, tmp_path / "full", parts, **settings)).run()
    config = small(shards, tmp_path / "parts", parts, **settings)
    run_until(config, 5)
    Trainer(config, resume=True).run()
    full, resumed = (tensors(tmp_path / run, 12) for run in ("full", "parts"))
    assert set(full) == set(resumed)
    assert all(torch.equal(full[name], resumed[name]) for name in full)


@pytest.mark.parametrize(
    "settings",
    [
        {"parallel": {"zero_stage": 1}},
        {"parallel": {"zero_stage": 3}},
        {"parallel": {"micro_batch": 4}},
        {"execution": {"checkpointing": True}},
    ],
)
def test_how_it_is_run_changes_no_loss(
    settings: dict[str, Any], shards: str, parts: Path, tmp_path: Path
) -> None:
    """Sharded weights that begin elsewhere, or a micro-batch that counts as a full one."""
    for name, more in (("plain", {}), ("other", settings)):
        Trainer(small(shards, tmp_path / name, parts, steps=5, **more)).run()
    plain, other = (losses(tmp_path / name) for name in ("plain", "other"))
    assert other == pytest.approx(plain, abs=2e-5)


def test_a_run_begins_with_a_model(shards: str, parts: Path, tmp_path: Path) -> None:
    """A folder's encoder-decoder that is drawn anew, or taken for a transformer."""
    Trainer(small(shards, tmp_path / "first", parts, steps=3)).run()
    folder = tmp_path / "first" / "model"
    settings: dict[str, Any] = {"init": str(folder), "train_only": ["decoder.layers.1"]}
    left_out = {"seq2seq": None, "codec": None, "ranker": None, "tokenizer": None}
    config = small(shards, tmp_path / "second", parts, steps=3, **settings, **left_out)
    assert with_initial_parts(config).seq2seq == small(shards, tmp_path, parts).seq2seq
    Trainer(config).run()
    before = load_file(folder / "seq2seq.safetensors")
    after = tensors(tmp_path / "second", 3).under("weights/model.")
    for name, weight in before.items():
        assert torch.equal(after[name], weight) != name.startswith("decoder.layers.1."), name
    transformer = tiny("dalle", shards, tmp_path / "third", parts).model_copy(
        update={"init": str(folder)}
    )
    with pytest.raises(ValueError, match=r"'seq2seq', and stage 'dalle' .* 'sparse_transformer'"):
        with_initial_parts(transformer)
    shape = {**SHAPE, "ffn_width": 40}
    other = small(shards, tmp_path / "third", parts, init=str(folder), seq2seq=shape)
    with pytest.raises(ValueError, match=r"seq2seq\.ffn_width is 48 there and 40 here"):
        with_initial_parts(other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq2seq": None}, "transformer is needed by stage 'dalle', or seq2seq"),
        ({"transformer": {"width": 62, "heads": 1, "head_size": 62}}, "transformer .* seq2seq"),
        ({"execution": {"attention": "dense"}}, "execution.attention 'dense' is not read"),
    ],
)
def test_settings_that_do_not_go_together(
    settings: dict[str, Any], message: str, shards: str, parts: Path, tmp_path: Path
) -> None:
    """Two priors of which one is trained, or a setting that nothing reads."""
    with pytest.raises(ValueError, match=message):
        small(shards, tmp_path, parts, **settings)


def test_it_is_no_section_of_other_stages(shards: str, parts: Path, tmp_path: Path) -> None:
    """A section that nothing reads."""
    config = tiny("dvae", shards, tmp_path, parts).model_dump()
    with pytest.raises(ValueError, match="seq2seq is not read by stage 'dvae': take it out"):
        RunConfig(**{**config, "seq2seq": SHAPE})


def test_plan_of_mini(shards: str, parts: Path, tmp_path: Path) -> None:
    """Memory or parts of another model than the one that is trained."""
    shape = {"image_vocab": 16384, "text_vocab": 50264}
    settings = {"parallel": {"precision": "bf16", "zero_stage": 3}, "seq2seq": shape}
    found = plan(small(shards, tmp_path, parts, **settings), ClusterSettings(gpus=8))
    assert found.parameters == {"encoder": 202_591_224, "decoder": 235_242_488}
    assert found.tokens == 8 * (64 + 256)
    assert found.memory.moments == pytest.approx(8 * 437_833_712 / 8, rel=1e-6)
    # Layers are gathered in turn, at most 1e9 weights of them, and all else for the whole pass.
    assert found.memory.gathered == 4 * 437_833_712

"""New runs from a model's weights, and training of a part of them (docs/finetuning.md)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dalle1
from dalle1 import registry
from dalle1.common.weights import fingerprint
from dalle1.data import shapes
from dalle1.generation.defaults import SamplingDefaults, read_sampling, write_sampling
from dalle1.training import checkpoints
from dalle1.training.config import RunConfig
from dalle1.training.initialization import sampling_passed_on, with_initial_parts
from dalle1.training.trainer import Trainer

from .conftest import run_until, tiny
from .test_trainer import losses, tensors

FILES = {"dvae": "dvae", "vqgan": "vqgan", "clip": "clip", "dalle": "transformer"}
SECTIONS = {"dvae": "dvae", "vqgan": "vqgan", "clip": "clip", "dalle": "transformer"}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, shards: str, parts: Path) -> Path:
    """Folders `dvae`, `vqgan`, `clip` and `dalle` of runs whose models are begun from."""
    folder = tmp_path_factory.mktemp("models")
    for stage in ("dvae", "clip"):
        shutil.copytree(parts / stage, folder / stage)
    Trainer(tiny("vqgan", shards, folder / "vqgan", parts, steps=6)).run()
    Trainer(tiny("dalle", shards, folder / "dalle", parts, steps=30)).run()
    return folder


def from_model(stage: str, shards: str, run: Path, models: Path, **settings: Any) -> RunConfig:
    """A config that leaves all that it can to `init`."""
    config = tiny(stage, shards, run, models).model_dump()
    for name in (SECTIONS[stage], "codec", "ranker", "tokenizer"):
        config.pop(name)
    if stage == "dvae":
        config["dvae_training"] |= {"warm_start_steps": 0}
    init = str(models / stage / "model")
    return RunConfig(**{**config, "init": init, "steps": 6, **settings})


def weights_at_start(config: RunConfig) -> dict[str, Tensor]:
    trainer = Trainer(config)
    return {name: w.clone() for name, w in trainer.engine.weights("model.")}


@pytest.mark.parametrize("stage", SECTIONS)
def test_a_run_begins_with_the_models_weights(
    stage: str, shards: str, models: Path, tmp_path: Path
) -> None:
    """Weights drawn anew without a word, an average that begins elsewhere, moments of the former
    run, a shape or a tokenizer that is not the model's."""
    config = from_model(stage, shards, tmp_path / "run", models)
    trainer = Trainer(config)
    expected = load_file(models / stage / "model" / f"{FILES[stage]}.safetensors")
    for held in (dict(trainer.engine.weights("model.")), trainer.ema.average):
        assert held.keys() == expected.keys()
        assert all(torch.equal(held[name], w) for name, w in expected.items())
    assert all(not bool(value.any()) for _, value in trainer.engine.moments())
    assert trainer.step == 0 and trainer.engine.updates_done() == 0
    trainer.run()
    assert len(losses(tmp_path / "run")) == 6
    if stage == "dalle":
        (image,) = dalle1.sample(
            "a red circle", model=tmp_path / "run" / "model", candidates=2, keep=1, progress=False
        ).images
        assert image[0].size == (16, 16)


def test_a_fine_tuned_model_is_drawn_as_the_former_one(
    shards: str, models: Path, tmp_path: Path
) -> None:
    """A model that draws worse after fine-tuning, at a temperature that it was not meant for."""
    folder = tmp_path / "former"
    shutil.copytree(models / "dalle" / "model", folder)
    write_sampling(folder, SamplingDefaults(temperature=0.5))
    config = from_model("dalle", shards, tmp_path / "run", models, init=str(folder))
    exported = tmp_path / "run" / "model"
    Trainer(config).run()
    assert read_sampling(exported).temperature == 0.5
    write_sampling(exported, SamplingDefaults(temperature=0.7))  # its owner has tried others
    shutil.rmtree(folder)
    assert sampling_passed_on(config, exported).temperature == 0.7
    said = config.model_copy(update={"sampling": SamplingDefaults(guidance=2)})
    assert sampling_passed_on(said, exported) == SamplingDefaults(guidance=2)


def test_a_run_begins_with_a_model_that_comes_along(
    shards: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is taken for a path: the model that everyone has could not be trained further."""
    monkeypatch.setattr(dalle1.models, "folder", lambda: models / "dalle")
    config = from_model("dalle", shards, tmp_path / "run", models, init="model", codec="model")
    expected = load_file(models / "dalle" / "model" / "transformer.safetensors")
    held = weights_at_start(config)
    assert all(torch.equal(held[name], weight) for name, weight in expected.items())
    codec = registry.load("codec", "model")
    assert fingerprint(codec) == fingerprint(registry.load("codec", models / "dalle" / "model"))
    assert isinstance(registry.open_ranker("model"), torch.nn.Module)


@pytest.mark.parametrize("stage", ["dvae", "vqgan", "dalle"])
def test_a_fine_tuned_run_resumes_to_the_bit(
    stage: str, shards: str, models: Path, tmp_path: Path
) -> None:
    """A resumed run that begins with the model's weights again."""
    only = {"dvae": ["decoder"], "vqgan": ["decoder"], "dalle": ["layers.1", "image_head"]}[stage]
    settings: dict[str, Any] = {"steps": 12, "train_only": only}
    Trainer(from_model(stage, shards, tmp_path / "full", models, **settings)).run()
    config = from_model(stage, shards, tmp_path / "parts", models, **settings)
    run_until(config, 5)
    Trainer(config, resume=True).run()
    assert losses(tmp_path / "full") == losses(tmp_path / "parts")
    full, resumed = (tensors(tmp_path / run, 12) for run in ("full", "parts"))
    assert set(full) == set(resumed)
    assert all(torch.equal(full[name], resumed[name]) for name in full)


# Names that stand for more than one module.
MEANT = {
    "attention": r"layers\.\d\.attention",
    "*.up.bias": r"layers\.\d\.mlp\.up\.bias",
    "layers.[12].mlp.down": r"layers\.[12]\.mlp\.down",
}


@pytest.mark.parametrize(
    ("stage", "names", "parallel"),
    [
        ("dvae", ["decoder.blocks.output", "encoder.blocks.input.b"], {}),
        ("vqgan", ["decoder", "post_quant_conv.bias"], {}),
        ("vqgan", ["decoder.conv_out", "quantize"], {"zero_stage": 2}),
        ("clip", ["visual", "logit_scale"], {}),
        ("dalle", ["layers.2.mlp", "norm", "text_position"], {}),
        ("dalle", ["image_head"], {"zero_stage": 1}),
        ("dalle", ["attention", "*.up.bias", "layers.[12].mlp.down"], {}),
        ("dalle", ["layers.0", "image_head.bias"], {"zero_stage": 3}),
    ],
)
def test_only_what_is_named_is_trained(
    stage: str, names: list[str], parallel: dict[str, Any], shards: str, models: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Frozen weights that decay, or move through moments or the average; named ones that stay."""
    settings = {"train_only": names, "parallel": parallel}
    config = from_model(stage, shards, tmp_path / "run", models, **settings)
    Trainer(config).run()
    saved = tensors(tmp_path / "run", 6)
    before = load_file(models / stage / "model" / f"{FILES[stage]}.safetensors")
    for name, weight in before.items():
        chosen = any(re.match(f"({MEANT.get(n, re.escape(n))})(\\.|$)", name) for n in names)
        for kind in ("weights", "average"):
            after = saved[f"{kind}/model.{name}"]
            assert torch.equal(after, weight) != chosen or not bool(weight.any()), name
        assert (f"moments/model.{name}/exp_avg" in saved) == chosen


def test_names_that_the_model_lacks(shards: str, models: Path, tmp_path: Path) -> None:
    """A misspelled module, and so a run that trains nothing or everything."""
    for name, near in {
        "layers.9": r"layers\.\d",
        "atention": ".*attention",
        "*.x": "layers",
    }.items():
        config = from_model("dalle", shards, tmp_path / "run", models, train_only=["norm", name])
        message = f"train_only: .*no module '{re.escape(name)}'; it has .*{near}"
        with pytest.raises(ValueError, match=message):
            Trainer(config)


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("dalle", {"init": "nowhere"}, r"init: .*nowhere.model: config\.json is missing"),
        ("dalle", {"init": "clip"}, "clip.model holds no prior, and stage 'dalle' trains a prior"),
        ("clip", {"init": "dvae"}, "holds no ranker"),
        ("dvae", {"dvae_training": {"warm_start_steps": 4}}, "warm_start_steps 4: .*set it to 0"),
        (
            "vqgan",
            {"vqgan_training": {"codebook": {"warm_start_steps": 4}}},
            r"vqgan_training\.codebook\.warm_start_steps 4: .*set it to 0",
        ),
        ("dalle", {"tokenizer": {"dropout": 0.1}}, "tokenizer: a new one would give the tokens"),
    ],
)
def test_what_does_not_fit_the_model(
    stage: str, settings: dict[str, Any], message: str, shards: str, models: Path, tmp_path: Path
) -> None:
    """A traceback, or a run on tokens that mean other things."""
    if "init" in settings:
        settings = {"init": str(models / settings["init"] / "model")}
    config = from_model(stage, shards, tmp_path / "run", models, **settings)
    with pytest.raises(ValueError, match=message):
        with_initial_parts(config)


def test_settings_that_differ_are_all_named(shards: str, models: Path, tmp_path: Path) -> None:
    """One mistake told after the other; a setting that no shape shows, such as heads."""
    own = tiny("dalle", shards, tmp_path / "run", models).transformer
    assert own is not None
    other = own.model_copy(update={"heads": 4, "head_size": 8, "layers": 5, "init_std": 0.5})
    config = from_model("dalle", shards, tmp_path / "run", models, transformer=other)
    with pytest.raises(ValueError) as raised:
        with_initial_parts(config)
    for words in ("heads is 2 there and 4 here", "head_size is 16", "layers is 3 there and 5 here"):
        assert words in str(raised.value)
    assert "init_std" not in str(raised.value)  # trained weights do not depend on it
    same = from_model("dalle", shards, tmp_path / "run", models, transformer=own)
    assert with_initial_parts(same).transformer == own


def test_another_codec_is_told(shards: str, models: Path, tmp_path: Path) -> None:
    """Tokens of another codec that are taken for the former's without a word."""
    folder = tmp_path / "codec"
    shutil.copytree(models / "dvae" / "model", folder)
    path = folder / "dvae.safetensors"
    save_file({k: v + 0.1 for k, v in load_file(path).items()}, path)
    config = from_model("dalle", shards, tmp_path / "run", models, codec=str(folder))
    with pytest.warns(UserWarning, match="codec is not the codec of init"):
        assert with_initial_parts(config).codec == str(folder)


def test_weights_that_are_not_finite(shards: str, models: Path, tmp_path: Path) -> None:
    """A diverged model that a new run begins with."""
    folder = tmp_path / "model"
    shutil.copytree(models / "dvae" / "model", folder)
    weights = load_file(folder / "dvae.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, folder / "dvae.safetensors")
    with pytest.raises(ValueError, match=r"init: the weight \S+ of .* is not finite"):
        Trainer(from_model("dvae", shards, tmp_path / "run", models, init=str(folder)))


def test_other_colors_are_learned_faster_than_anew(
    shards: str, models: Path, parts: Path, tmp_path: Path
) -> None:
    """An `init` that starts so badly that a fresh run is as good: below it at every logged step."""
    shapes.write_shards(tmp_path / "earth", "train", 96, side=16, palette="earth")
    data = str(tmp_path / "earth")
    Trainer(from_model("dalle", data, tmp_path / "tuned", models, steps=20)).run()
    Trainer(tiny("dalle", data, tmp_path / "fresh", parts, steps=20)).run()
    tuned, fresh = losses(tmp_path / "tuned"), losses(tmp_path / "fresh")
    assert all(a < b for a, b in zip(tuned, fresh, strict=True))


def test_the_run_keeps_what_it_was_filled_with(shards: str, models: Path, tmp_path: Path) -> None:
    """A run's folder that does not say of which shape its model is."""
    Trainer(from_model("dalle", shards, tmp_path / "run", models, steps=1)).run()
    newest = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    state = json.loads((newest / "state.json").read_text())
    assert state["config"]["transformer"]["layers"] == 3
    assert state["config"]["codec"] == state["config"]["init"] == str(models / "dalle" / "model")


@pytest.mark.parametrize("stage", SECTIONS)
@pytest.mark.parametrize("form", ["module.", "_orig_mod.", "module._orig_mod.", "inside", "shards"])
def test_weights_that_others_saved(
    stage: str, form: str, shards: str, models: Path, tmp_path: Path
) -> None:
    """Names that the stage does not know, so that it trains from random weights without a word."""
    folder = tmp_path / "model"
    shutil.copytree(models / stage / "model", folder)
    path = folder / f"{FILES[stage]}.safetensors"
    weights = load_file(path)
    path.unlink()
    if form == "shards":
        files = {name: f"{FILES[stage]}-{i % 2}.safetensors" for i, name in enumerate(weights)}
        for file in set(files.values()):
            part = {name: weights[name] for name in weights if files[name] == file}
            save_file(part, folder / file)
        index = json.dumps({"weight_map": files})
        (folder / f"{path.name}.index.json").write_text(index)
    else:
        cut = {name: name.rpartition(".") for name in weights}
        names = {
            name: f"{head}{dot}_orig_mod.{tail}" if form == "inside" else form + name
            for name, (head, dot, tail) in cut.items()
        }
        save_file({names[name]: weight for name, weight in weights.items()}, path)
    config = from_model(stage, shards, tmp_path / "run", models, init=str(folder))
    held = weights_at_start(with_initial_parts(config))
    assert held.keys() == weights.keys()
    assert all(torch.equal(held[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("stage", SECTIONS)
@pytest.mark.parametrize("wrong", ["name", "shape", "config"])
def test_weights_of_another_model(
    stage: str, wrong: str, shards: str, models: Path, tmp_path: Path
) -> None:
    """A weight that is passed over, or one number that becomes a whole matrix; a model built as
    large as its folder claims before its weights are looked at."""
    folder = tmp_path / "model"
    shutil.copytree(models / stage / "model", folder)
    path = folder / f"{FILES[stage]}.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    if wrong == "config":
        role, setting = {
            "dvae": ("codec", "blocks_per_group"),
            "vqgan": ("codec", "blocks_per_level"),
            "clip": ("ranker", "text_layers"),
            "dalle": ("prior", "layers"),
        }[stage]
        settings = json.loads((folder / "config.json").read_text())
        settings[role][setting] = 10**11
        (folder / "config.json").write_text(json.dumps(settings))
    else:
        weight = weights.pop(name)
        save_file({**weights, **({"x": weight} if wrong == "name" else {name: weight[:1]})}, path)
    config = from_model(stage, shards, tmp_path / "run", models, init=str(folder))
    with pytest.raises(ValueError, match=r"init: .*\.safetensors: ") as raised:
        with_initial_parts(config)
    assert "\n" not in str(raised.value)

"""A ranker's scores with the model's log-likelihood added, against the two of them apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dalle1
from dalle1 import CLIP, Model, registry
from dalle1.clip.config import CLIPConfig
from dalle1.clip.from_open_clip import OpenCLIPConfig
from dalle1.clip.from_transformers import HuggingFaceConfig
from dalle1.clip.ruclip import RuCLIPConfig
from dalle1.commands import rank as rank_command
from dalle1.common.images import to_pil
from dalle1.common.weights import fingerprint
from dalle1.evaluation import retrieval
from dalle1.evaluation.benchmark import network_names
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.run import prepare, run
from dvae.storage import CONFIG
from tests.conftest import ModelMaker
from tests.fakes import BrightnessRanker

CAPTION = "a red cat"
WEIGHT = 0.25
SETTINGS: dict[str, Any] = {"candidates": 24, "keep": 24, "progress": False}


def weighted(model: Model, weight: float = WEIGHT) -> Model:
    """The model, whose CLIP adds its likelihood from now on."""
    assert isinstance(model.ranker, CLIP)
    config = model.ranker.config
    model.ranker.config = config.model_copy(update={"likelihood_weight": weight})
    return model


@pytest.fixture
def model(make_model: ModelMaker) -> Model:
    """A model of its own, whose ranker may be changed."""
    return make_model()


def test_candidates_are_ranked_by_the_sum(model: Model) -> None:
    """A weight that nothing reads, that multiplies the cosine, or that counts tokens' mean."""
    plain = dalle1.sample(CAPTION, model, seed=3, **SETTINGS)
    cosines = dict(zip(plain.candidate_numbers[0].tolist(), plain.scores[0], strict=True))
    result = dalle1.sample(CAPTION, weighted(model), seed=3, **SETTINGS)
    assert result.candidate_numbers[0].tolist() != plain.candidate_numbers[0].tolist()
    found = zip(
        result.candidate_numbers[0].tolist(), result.tokens[0], result.scores[0], strict=True
    )
    for number, tokens, score in found:
        expected = cosines[number] + WEIGHT * model.log_prob(CAPTION, tokens)
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)
    assert result.scores[0].tolist() == sorted(result.scores[0].tolist(), reverse=True)


def test_images_of_files_are_encoded(model: Model) -> None:
    """An image that a model drew, scored otherwise once it lies in a file; a ranker alone, which
    has no likelihood, that needs one."""
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    captions = [CAPTION, "one small mat"]
    with torch.no_grad():
        tokens = model.codec.encode(images)
    cosines = dalle1.rank(captions, images, model)
    expected = torch.stack([model.log_prob(c, tokens) for c in captions]) * WEIGHT + cosines
    torch.testing.assert_close(
        dalle1.rank(captions, images, weighted(model)), expected, rtol=1e-4, atol=1e-4
    )
    assert model.ranker is not None
    assert torch.equal(model.ranker.score(captions, images), cosines)


def test_a_weight_is_kept_and_none_leaves_no_trace(model: Model, tmp_path: Path) -> None:
    """A weight that is lost in a folder; a folder, or a fingerprint by which draws are kept, that
    changes where no likelihood is added."""
    before = fingerprint(model.ranker)
    model.save(tmp_path / "plain")
    assert (
        "likelihood_weight" not in json.loads((tmp_path / "plain" / CONFIG).read_text())["ranker"]
    )
    weighted(model).save(tmp_path / "sum")
    again = dalle1.load(tmp_path / "sum").ranker
    assert isinstance(again, CLIP) and again.config.likelihood_weight == WEIGHT
    assert fingerprint(again) != before == fingerprint(weighted(model, 0.0).ranker)


def test_a_name_sets_the_weight(model: Model, tmp_path: Path) -> None:
    """A plus in a folder's name that is read as a sum; a weight that is added to the folder's own;
    a 0 that does not take it away."""
    folder = tmp_path / "a+b"
    weighted(model).save(folder)
    weights = {"": WEIGHT, "+0.002*likelihood": 0.002, "+2e+1*likelihood": 20, "+0*likelihood": 0}
    for text, weight in weights.items():
        opened = registry.open_ranker(f"{folder}{text}")
        assert type(opened) is CLIP and opened.config.likelihood_weight == weight
        result = dalle1.sample(CAPTION, dalle1.load(folder, ranker=f"{folder}{text}"), **SETTINGS)
        own = dalle1.load(folder)
        own.ranker = opened
        assert torch.equal(result.scores, dalle1.sample(CAPTION, own, **SETTINGS).scores)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{}+-1*likelihood",
            r"expected RANKER\+WEIGHT\*likelihood with a weight of at least 0, got",
        ),
        ("hf:much/too+large*likelihood", "with a weight of at least 0"),  # nothing is downloaded
        ("{}+*likelihood", "with a weight of at least 0"),
        ("{}+nan*likelihood", "with a weight of at least 0"),
        ("{} + 1 * likelihood", "with a weight of at least 0"),
        ("{}+1*likelihood+1*likelihood", "with a weight of at least 0"),
        ("likelihood+1*likelihood", "to LikelihoodRanker, whose config has no likelihood_weight"),
        ("nowhere+1*likelihood", r"expected a folder, .* one of these with \+WEIGHT"),
    ],
)
def test_names_that_are_refused(model: Model, tmp_path: Path, text: str, message: str) -> None:
    """A weight that turns the order around; a traceback of float's."""
    model.save(tmp_path)
    with pytest.raises(ValueError, match=message):
        registry.open_ranker(text.format(tmp_path))


def test_a_sum_needs_a_model(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A weight that the user asks for, and figures without the likelihood."""
    model.save(tmp_path / "model")
    to_pil(torch.rand(3, 8, 8)).save(tmp_path / "a.png")
    name = f"{tmp_path / 'model'}+1*likelihood"
    assert rank_command.main([CAPTION, str(tmp_path / "a.png"), "--ranker", name]) == 2
    assert "adds a model's likelihood; name the model, too" in capsys.readouterr().err
    asked = [CAPTION, str(tmp_path / "a.png"), "--ranker", name, "--device", "cpu"]
    assert rank_command.main([*asked, "--model", str(tmp_path / "model")]) == 0
    with pytest.raises(ValueError, match="expected one that scores images alone"):
        retrieval._open(name)


def test_every_dual_encoder_has_the_weight() -> None:
    """A ranker of another family that cannot be combined."""
    configs = (
        CLIPConfig(likelihood_weight=1),
        RuCLIPConfig(likelihood_weight=1),
        OpenCLIPConfig(model="ViT-B-32", likelihood_weight=1),
        HuggingFaceConfig(name="here", likelihood_weight=1),
    )
    for config in configs:
        assert config.model_dump()["likelihood_weight"] == 1
        plain = config.model_copy(update={"likelihood_weight": 0.0})
        assert type(config)(**plain.model_dump()) == plain
    named = registry.NAMED_RANKERS["hf"][0]
    # What the Hub's refusal tells a user to give.
    assert registry.ranker_name(named, configs[-1]) == "hf:here+1.0*likelihood"


def test_rankers_without_the_setting_are_used_alone(model: Model) -> None:
    """A ranker of somebody else's that must have a config of ours."""
    ranker = BrightnessRanker()
    model.ranker = ranker
    result = dalle1.sample(CAPTION, model, **SETTINGS)
    with torch.no_grad():
        images = model.codec.decode(result.tokens[0])
    expected = ranker.score([CAPTION], images)[0]
    torch.testing.assert_close(result.scores[0], expected, rtol=1e-3, atol=1e-3)


def test_a_benchmark_ranks_by_the_sum(model: Model, tmp_path: Path) -> None:
    """Kept scores, or those of its images at a blur radius, that leave the likelihood out; a sum
    that is called a CLIP score."""
    weighted(model).save(tmp_path / "model")
    (tmp_path / "captions.txt").write_text(CAPTION + "\n")
    settings = RankSettings(
        model=str(tmp_path / "model"),
        run=str(tmp_path / "run"),
        data=str(tmp_path / "captions.txt"),
        candidates=6,
        blur=[0],
        bootstrap=10,
    )
    prepared = prepare(settings)
    run(prepared, settings)
    (draws,) = (load_file(f) for f in (tmp_path / "run" / "draws").glob("*.safetensors"))
    tokens = draws["tokens"].long().view(6, 4, 4)
    with torch.no_grad():
        images = model.codec.decode(tokens)
    assert model.ranker is not None
    cosines = model.ranker.score([CAPTION], images)[0]
    expected = cosines + WEIGHT * model.log_prob(CAPTION, tokens)
    torch.testing.assert_close(draws["scores"], expected, rtol=1e-3, atol=1e-3)
    (chosen,) = (
        load_file(f)
        for f in (tmp_path / "run" / "features").rglob("*.safetensors")
        if "scores" in load_file(f)
    )
    of_six = images[expected.argmax()][None]
    torch.testing.assert_close(
        chosen["scores"][0, -1], dalle1.rank(CAPTION, of_six, model)[0], rtol=1e-3, atol=1e-3
    )
    assert network_names(prepared.model, settings)["clip_score"] == "ranker's score"
    assert network_names(weighted(model, 0.0), settings)["clip_score"] == "CLIP score"

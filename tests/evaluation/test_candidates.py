"""Candidates on disk: complete, never drawn twice, never those of another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dalle1 import Model, load
from dalle1.clip.tokenizer import CLIP_TOKENIZER
from dalle1.common.images import to_tensor
from dalle1.data import shapes
from dalle1.evaluation.candidates import (
    CaptionCandidates,
    draw_candidates,
    model_fingerprint,
    path_of,
    read_candidates,
    write_or_check_settings,
)
from dalle1.evaluation.judged import NOT_CLAIMED
from dalle1.evaluation.prompts import read_prompts
from dalle1.evaluation.shapes_data import ATTRIBUTES, check_image
from dalle1.generation.generator import Generator, draw
from dalle1.generation.images import decode
from dalle1.generation.options import candidate_uniforms
from dalle1.tokenizer import TOKENIZER
from tests.conftest import reads_otherwise
from tests.evaluation.conftest import SettingsMaker


def count_draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes the candidates that each draw makes."""
    plain, drawn = Generator.draw, []

    def noted(self: Generator, text: Tensor, uniforms: Tensor, *rest: Any) -> Tensor:
        drawn.append(uniforms.shape[0] * uniforms.shape[1])
        return plain(self, text, uniforms, *rest)

    monkeypatch.setattr(Generator, "draw", noted)
    return drawn


def test_candidates_are_those_of_draw(model: Model, make_settings: SettingsMaker) -> None:
    """Tokens or scores of another caption, or in another order."""
    settings = make_settings(seed=5)
    prompts = read_prompts(settings)
    draw_candidates(model, prompts, settings, progress=False)
    assert model.ranker is not None
    for prompt, candidates in zip(prompts, read_candidates(prompts, settings), strict=True):
        text = model.tokenizer.encode(prompt.caption)[0]
        uniforms = candidate_uniforms(5, prompt.caption, 0, 4, 16)
        assert torch.equal(candidates.tokens, draw(model.transformer, text, uniforms))
        images = decode(model.codec, candidates.tokens, (4, 4))
        scores = model.ranker.score([prompt.caption], images)[0]
        torch.testing.assert_close(candidates.scores, scores)
        assert candidates.checks.shape == (4, 0) and bool(candidates.correct.all())


def test_nothing_is_drawn_twice(
    model: Model, make_settings: SettingsMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run that begins anew, or more candidates that are not those after the first."""
    full = make_settings(candidates=6, run=make_settings().run + "-full")
    prompts = read_prompts(full)
    draw_candidates(model, prompts, full, progress=False)
    drawn = count_draws(monkeypatch)
    few = make_settings(candidates=2)
    draw_candidates(model, prompts[:3], few, progress=False)
    assert sum(drawn) == 6
    draw_candidates(model, prompts[:3], few, progress=False)
    assert sum(drawn) == 6
    more = make_settings(candidates=6)
    draw_candidates(model, prompts, more, progress=False)
    assert sum(drawn) == 30
    for a, b in zip(read_candidates(prompts, more), read_candidates(prompts, full), strict=True):
        assert torch.equal(a.tokens, b.tokens)
        torch.testing.assert_close(a.scores, b.scores)
    fewer = list(read_candidates(prompts, make_settings(candidates=3)))
    assert all(len(c.tokens) == len(c.scores) == len(c.checks) == 3 for c in fewer)


def test_ctrl_c_keeps_what_is_complete(
    model: Model, make_settings: SettingsMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions that were done, lost with the one in work."""
    settings = make_settings(batch_size=4)
    prompts = read_prompts(settings)
    plain, calls = Generator.draw, []

    def interrupted(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(Generator, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_candidates(model, prompts, settings, progress=False)
    with pytest.raises(ValueError, match=r"holds 0 of 4 candidates of .*shared run folder"):
        list(read_candidates(prompts, settings))
    assert len(list(read_candidates(prompts[:3], settings))) == 3
    draw_candidates(model, prompts, settings, progress=False)
    assert len(calls) == 4 + 2
    assert len(list(read_candidates(prompts, settings))) == 5


def test_ranks_share_the_captions(model: Model, make_settings: SettingsMaker) -> None:
    """A caption that no rank draws, or every rank."""
    settings = make_settings()
    prompts = read_prompts(settings)
    folder = Path(settings.run) / "draws"
    for rank in range(3):
        before = set(folder.glob("*.safetensors"))
        draw_candidates(model, prompts, settings, rank, 3, progress=False)
        new = set(folder.glob("*.safetensors")) - before
        assert new == {path_of(folder, p.caption) for p in prompts[rank::3]}


def test_candidates_of_other_settings(
    make_model: Any, model: Model, make_settings: SettingsMaker
) -> None:
    """Candidates of two models, or of two temperatures, in one curve."""
    settings = make_settings()
    prompts = read_prompts(settings)
    write_or_check_settings(model, settings, rank=1)
    assert not (Path(settings.run) / "draws" / "settings.json").exists()
    write_or_check_settings(model, settings)
    draw_candidates(model, prompts, settings, progress=False)
    for name, value in (("seed", 1), ("temperature", 0.5), ("top_k", 3), ("guidance", 2.0)):
        with pytest.raises(ValueError, match=f"other settings, {name} was .* and is "):
            write_or_check_settings(model, make_settings(**{name: value}), rank=1)
    with pytest.raises(ValueError, match="other settings, model was"):
        write_or_check_settings(make_model(seed=1), settings)
    write_or_check_settings(model, settings)
    path = path_of(Path(settings.run) / "draws", prompts[0].caption)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"damaged, remove it to draw its candidates again"):
        draw_candidates(model, prompts, settings, progress=False)


@pytest.mark.parametrize("name", [TOKENIZER, CLIP_TOKENIZER])
def test_candidates_of_another_tokenizer(
    name: str, model: Model, make_settings: SettingsMaker
) -> None:
    """Candidates of captions that another tokenizer read, in one curve, since it gives a few words
    of ours the same ids; those of an earlier release, which cannot be used any more."""
    settings = make_settings()
    write_or_check_settings(model, settings)
    reads_otherwise(Path(settings.model) / name)
    other = load(settings.model)
    assert model_fingerprint(other) == model_fingerprint(model)
    with pytest.raises(ValueError, match="other settings, tokenizers was"):
        write_or_check_settings(other, settings)
    path = Path(settings.run) / "draws" / "settings.json"
    kept = json.loads(path.read_text())
    del kept["tokenizers"]
    path.write_text(json.dumps(kept))
    write_or_check_settings(model, settings)


def test_checks() -> None:
    """What the checker says, under another attribute's name."""
    sample = shapes.make(3, 0, "test", 32)
    other = next(
        s
        for s in (shapes.make(3, i, "test", 32) for i in range(1, 200))
        if len(s.scene.things) != len(sample.scene.things)
    )
    right = check_image(to_tensor(sample.image), sample.caption)
    wrong = check_image(to_tensor(other.image), sample.caption)
    assert set(right) <= {1, NOT_CLAIMED} and wrong[ATTRIBUTES.index("count")] == 0
    assert [x == NOT_CLAIMED for x in right] == [x == NOT_CLAIMED for x in wrong]
    both = CaptionCandidates(
        torch.zeros(2, 4), torch.zeros(2), torch.tensor([right, wrong], dtype=torch.int8)
    )
    assert both.correct.tolist() == [True, False]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text_length", [1, 2])
def test_fingerprint_warns_of_nothing(
    model: Model, monkeypatch: pytest.MonkeyPatch, text_length: int
) -> None:
    """A warning about captions that the user has never written."""
    before = model_fingerprint(model)
    monkeypatch.setattr(model, "tokenizer", model.tokenizer.resized(text_length))
    assert model_fingerprint(model) != before


def test_files(model: Model, make_settings: SettingsMaker) -> None:
    """Names within the files that candidates of earlier releases do not have."""
    settings = make_settings()
    prompts = read_prompts(settings)[:1]
    write_or_check_settings(model, settings)
    draw_candidates(model, prompts, settings, progress=False)
    folder = Path(settings.run) / "draws"
    kept = json.loads((folder / "settings.json").read_text())
    assert list(kept) == [
        *("seed", "temperature", "top_k", "top_p", "guidance", "dtype", "judged", "model"),
        "tokenizers",
    ]
    tensors = load_file(path_of(folder, prompts[0].caption))
    assert set(tensors) == {"tokens", "scores", "verdicts"}
    assert tensors["tokens"].dtype == torch.int16 and tensors["verdicts"].dtype == torch.int8

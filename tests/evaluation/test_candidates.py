"""Draws that are kept: complete, never drawn twice, never those of another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle1 import Model
from dalle1.common.images import to_tensor
from dalle1.data import shapes
from dalle1.evaluation.candidates import (
    ATTRIBUTES,
    NOT_CLAIMED,
    Draws,
    claim,
    draw_all,
    path_of,
    read_draws,
    verdict,
)
from dalle1.evaluation.prompts import read_prompts
from dalle1.generation.generator import Generator, draw
from dalle1.generation.images import decode
from dalle1.generation.options import candidate_uniforms
from tests.evaluation.conftest import SettingsMaker


def count_draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes the candidates that each draw makes."""
    plain, drawn = Generator.draw, []

    def noted(self: Generator, text: Tensor, uniforms: Tensor, *rest: Any) -> Tensor:
        drawn.append(uniforms.shape[0] * uniforms.shape[1])
        return plain(self, text, uniforms, *rest)

    monkeypatch.setattr(Generator, "draw", noted)
    return drawn


def test_draws_are_the_candidates(model: Model, make_settings: SettingsMaker) -> None:
    """Tokens or scores of another caption, or in another order."""
    settings = make_settings(seed=5)
    prompts = read_prompts(settings)
    draw_all(model, prompts, settings, progress=False)
    assert model.ranker is not None
    for prompt, found in zip(prompts, read_draws(prompts, settings), strict=True):
        text = model.tokenizer.encode(prompt.caption)[0]
        uniforms = candidate_uniforms(5, prompt.caption, 0, 4, 16)
        assert torch.equal(found.tokens, draw(model.transformer, text, uniforms))
        images = decode(model.codec, found.tokens, (4, 4))
        scores = model.ranker.score([prompt.caption], images)[0]
        torch.testing.assert_close(found.scores, scores)
        assert found.verdicts.shape == (4, 0) and bool(found.correct.all())


def test_nothing_is_drawn_twice(
    model: Model, make_settings: SettingsMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run that begins anew, or more candidates that are not those after the first."""
    whole = make_settings(candidates=6, run=make_settings().run + "-whole")
    prompts = read_prompts(whole)
    draw_all(model, prompts, whole, progress=False)
    drawn = count_draws(monkeypatch)
    few = make_settings(candidates=2)
    draw_all(model, prompts[:3], few, progress=False)
    assert sum(drawn) == 6
    draw_all(model, prompts[:3], few, progress=False)
    assert sum(drawn) == 6
    more = make_settings(candidates=6)
    draw_all(model, prompts, more, progress=False)
    assert sum(drawn) == 30
    for a, b in zip(read_draws(prompts, more), read_draws(prompts, whole), strict=True):
        assert torch.equal(a.tokens, b.tokens)
        torch.testing.assert_close(a.scores, b.scores)
    fewer = list(read_draws(prompts, make_settings(candidates=3)))
    assert all(len(d.tokens) == len(d.scores) == len(d.verdicts) == 3 for d in fewer)


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
        draw_all(model, prompts, settings, progress=False)
    with pytest.raises(ValueError, match=r"holds 0 of 4 candidates of .*shared run folder"):
        list(read_draws(prompts, settings))
    assert len(list(read_draws(prompts[:3], settings))) == 3
    draw_all(model, prompts, settings, progress=False)
    assert len(calls) == 4 + 2
    assert len(list(read_draws(prompts, settings))) == 5


def test_ranks_share_the_captions(model: Model, make_settings: SettingsMaker) -> None:
    """A caption that no rank draws, or every rank."""
    settings = make_settings()
    prompts = read_prompts(settings)
    folder = Path(settings.run) / "draws"
    for rank in range(3):
        before = set(folder.glob("*.safetensors"))
        draw_all(model, prompts, settings, rank, 3, progress=False)
        new = set(folder.glob("*.safetensors")) - before
        assert new == {path_of(folder, p.caption) for p in prompts[rank::3]}


def test_draws_of_something_else(
    make_model: Any, model: Model, make_settings: SettingsMaker
) -> None:
    """Candidates of two models, or of two temperatures, in one curve."""
    settings = make_settings()
    prompts = read_prompts(settings)
    claim(model, settings, rank=1)
    assert not (Path(settings.run) / "draws" / "settings.json").exists()
    claim(model, settings)
    draw_all(model, prompts, settings, progress=False)
    for name, value in (("seed", 1), ("temperature", 0.5), ("top_k", 3), ("guidance", 2.0)):
        with pytest.raises(ValueError, match=f"another {name}"):
            claim(model, make_settings(**{name: value}), rank=1)
    with pytest.raises(ValueError, match="another model"):
        claim(make_model(seed=1), settings)
    claim(model, settings)
    path = path_of(Path(settings.run) / "draws", prompts[0].caption)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"damaged, remove it to draw anew"):
        draw_all(model, prompts, settings, progress=False)


def test_verdicts() -> None:
    """What the checker says, under another attribute's name."""
    sample = shapes.make(3, 0, "test", 32)
    other = next(
        s
        for s in (shapes.make(3, i, "test", 32) for i in range(1, 200))
        if len(s.scene.things) != len(sample.scene.things)
    )
    from PIL import Image

    right = verdict(to_tensor(Image.fromarray(sample.image)), sample.caption)
    wrong = verdict(to_tensor(Image.fromarray(other.image)), sample.caption)
    assert set(right) <= {1, NOT_CLAIMED} and wrong[ATTRIBUTES.index("count")] == 0
    assert [x == NOT_CLAIMED for x in right] == [x == NOT_CLAIMED for x in wrong]
    both = Draws(torch.zeros(2, 4), torch.zeros(2), torch.tensor([right, wrong], dtype=torch.int8))
    assert both.correct.tolist() == [True, False]

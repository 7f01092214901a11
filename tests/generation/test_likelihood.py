"""Ranking by the model's own likelihood, against enumeration and by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import dalle1
from dalle1 import Model, Tokenizer, Transformer
from dalle1.common.images import to_pil
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.run import prepare, run
from dalle1.generation import likelihood
from dalle1.generation.likelihood import (
    LikelihoodConfig,
    LikelihoodRanker,
    perplexity,
    stepped_log_probs,
)
from tests.conftest import ModelMaker, TransformerMaker
from tests.fakes import PALETTE, PaletteCodec, PaletteConfig, UnigramConfig, UnigramPrior

CAPTION = "a red cat"
SETTINGS = {"candidates": 24, "keep": 6, "progress": False}


@pytest.fixture
def model(make_model: ModelMaker) -> Model:
    """A model of its own, whose ranker may be changed: 2 x 2 tokens of 3 codes."""
    return make_model(grid=2, codes=3)


def ranked(model: Model, measure: str = "log_prob") -> LikelihoodRanker:
    ranker = LikelihoodRanker(LikelihoodConfig.model_validate({"measure": measure}))
    model.ranker = ranker
    assert isinstance(model.ranker, LikelihoodRanker)
    return model.ranker


def conditionals(model: Model, caption: str, image: Sequence[int]) -> list[float]:
    """p of each token given those before it, by summing over all images that begin alike."""
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    p = torch.tensor([model.log_prob(caption, x.view(2, 2)) for x in every]).double().exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    result = []
    for k in range(4):
        before = (every[:, :k] == torch.tensor(image[:k], dtype=torch.int64)).all(dim=1)
        here = before & (every[:, k] == image[k])
        result.append((p[here].sum() / p[before].sum()).item())
    return result


@pytest.mark.parametrize("image", [(0, 1, 2, 0), (2, 2, 2, 2)])
def test_measures_against_enumeration(model: Model, image: tuple[int, ...]) -> None:
    """A token scored by the position before or behind it; the first one counted in the
    perplexity, or its exponential taken of the mean."""
    chances = conditionals(model, CAPTION, image)
    tokens = torch.tensor([image])
    log_prob = ranked(model).score_tokens([CAPTION], tokens)
    assert log_prob.shape == (1, 1) and log_prob.dtype == torch.float32
    assert log_prob.item() == pytest.approx(sum(map(math.log, chances)), rel=1e-4)
    score = ranked(model, "perplexity").score_tokens([CAPTION], tokens)
    assert score.item() == pytest.approx(-sum(1 / p for p in chances[1:]) / 3, rel=1e-4)


def test_perplexity_leaves_out_what_is_certain() -> None:
    """Terms of 0 that count, as exp(0) = 1 or as 0; a division by none."""
    log_probs = torch.tensor([[-9.0, -1.0, 0.0, -2.0], [-3.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([(math.exp(1) + math.exp(2)) / 2, 1.0])
    torch.testing.assert_close(perplexity(log_probs), expected)


def test_candidates_are_sorted_by_their_tokens(model: Model) -> None:
    """Images that are encoded again: other tokens than those that were drawn."""
    ranked(model)
    result = dalle1.sample([CAPTION, "the blue cat"], model, **SETTINGS)  # type: ignore[arg-type]
    for caption, tokens, scores in zip(result.captions, result.tokens, result.scores, strict=True):
        expected = torch.stack([model.log_prob(caption, x) for x in tokens])
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)
    every = dalle1.sample(CAPTION, model, **{**SETTINGS, "keep": 24})  # type: ignore[arg-type]
    assert every.scores[0, 0] == result.scores[0, 0]


def test_scores_do_not_depend_on_what_is_scored_at_once(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions or parts in another order."""
    tokens = torch.tensor(list(itertools.product(range(3), repeat=4)))[::5]
    captions = [CAPTION, "one small mat"]
    for measure in ("log_prob", "perplexity"):
        ranker = ranked(model, measure)
        expected = ranker.score_tokens(captions, tokens)
        assert expected.shape == (2, len(tokens)) and not torch.equal(expected[0], expected[1])
        for rows in (1, 5):
            monkeypatch.setattr(likelihood, "MAX_ROWS", rows)
            torch.testing.assert_close(
                ranker.score_tokens(captions, tokens), expected, rtol=1e-4, atol=1e-4
            )


def test_images_are_encoded(model: Model) -> None:
    """Images of another size that are refused or stretched; those of files, that have no tokens."""
    ranked(model)
    tokens = torch.tensor([[0, 1], [2, 0]])[None]
    with torch.no_grad():
        pixels = model.codec.decode(tokens)
        codes = model.codec.encode(pixels)
    expected = model.log_prob(CAPTION, codes[0])
    assert dalle1.rank(CAPTION, pixels, model).item() == pytest.approx(expected.item(), rel=1e-5)
    black = Image.new("RGB", (64, 48))
    zeros = model.log_prob(CAPTION, model.codec.encode(torch.zeros(1, 3, 4, 4))[0])
    assert dalle1.rank(CAPTION, black, model).item() == pytest.approx(zeros.item(), rel=1e-5)
    file = to_pil(pixels[0]).resize((64, 64), Image.Resampling.NEAREST)
    assert dalle1.rank(CAPTION, [file, black], model).shape == (2,)


def test_an_image_is_read_at_the_codecs_size(tokenizer: Tokenizer) -> None:
    """Images that are written twice as large as they are read, encoded as they are written."""
    torch.manual_seed(0)
    prior = UnigramPrior(UnigramConfig(text_vocab=tokenizer.vocab_size, text_length=10, side=2))
    model = Model(tokenizer, prior, PaletteCodec(PaletteConfig()), LikelihoodRanker())
    tokens = torch.tensor([[3, 1, 4, 0]])
    images = torch.tensor(PALETTE).float()[tokens].movedim(-1, 1).view(1, 3, 2, 2)
    images = torch.nn.functional.interpolate(images, scale_factor=4.0)  # a token's 4 x 4 pixels
    expected = model.log_prob(CAPTION, tokens.view(2, 2))
    assert dalle1.rank(CAPTION, images, model).item() == pytest.approx(expected.item(), rel=1e-5)


def test_steps_give_what_one_pass_gives(make_transformer: TransformerMaker) -> None:
    """Tokens that are fed one position late, where a prior has no pass over all of them."""
    transformer = make_transformer()
    text = torch.tensor([3, 1, 13, 14, 15, 16])
    image = torch.randint(9, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = transformer.token_log_probs(text.expand(3, -1), image)
        got = stepped_log_probs(transformer, text, image)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_prior_without_a_pass_over_all_tokens(tokenizer: Tokenizer) -> None:
    """A ranker that asks for what only the paper's prior has."""
    torch.manual_seed(0)
    prior = UnigramPrior(UnigramConfig(text_vocab=tokenizer.vocab_size, text_length=10))
    ranker = LikelihoodRanker(LikelihoodConfig(measure="perplexity"))
    model = Model(tokenizer, prior, PaletteCodec(PaletteConfig()), ranker)
    tokens = torch.randint(5, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = prior.tilt(tokenizer.encode(CAPTION)[:, 0]).softmax(-1)[0]
    expected = -(1 / p[tokens[:, 1:]]).mean(dim=1)
    assert isinstance(model.ranker, LikelihoodRanker)
    torch.testing.assert_close(model.ranker.score_tokens([CAPTION], tokens)[0], expected)


def test_a_folder_and_a_name(model: Model, tmp_path: Path) -> None:
    """A measure that is forgotten; a name that opens the folder's own ranker."""
    ranked(model, "perplexity")
    model.save(tmp_path)
    again = dalle1.load(tmp_path)
    assert isinstance(again.ranker, LikelihoodRanker)
    assert again.ranker.config.measure == "perplexity" and again.ranker.model is again
    by_name = dalle1.load(tmp_path, ranker="likelihood").ranker
    assert isinstance(by_name, LikelihoodRanker) and by_name.config.measure == "log_prob"
    assert dalle1.load(tmp_path, ranker="none").ranker is None


def test_a_ranker_of_several_models(make_model: ModelMaker, model: Model) -> None:
    """Images sorted by the likelihood of the model that took the ranker last."""
    ranker = ranked(model)
    before = ranker.score_tokens([CAPTION], torch.tensor([[0, 1, 2, 0]]))
    other = make_model(seed=1, grid=2, codes=3)
    other.ranker = ranker
    after = ranker.score_tokens([CAPTION], torch.tensor([[0, 1, 2, 0]]))
    assert torch.equal(before, after) and ranker.model is model
    assert isinstance(other.ranker, LikelihoodRanker) and other.ranker.model is other
    assert not torch.equal(
        other.ranker.score_tokens([CAPTION], torch.tensor([[0, 1, 2, 0]])), before
    )
    with pytest.raises(ValueError, match="expected a model whose likelihood ranks, got none"):
        LikelihoodRanker().score([CAPTION], torch.rand(1, 3, 8, 8))


def test_a_ranking_benchmark_by_likelihood(model: Model, tmp_path: Path) -> None:
    """A benchmark that ranks by the folder's own ranker, or that encodes what was drawn again;
    candidates of another ranker that are taken for its own."""
    model.save(tmp_path / "model")
    (tmp_path / "captions.txt").write_text("a red cat\none small mat\n")
    settings = RankSettings(
        model=str(tmp_path / "model"),
        ranker="likelihood",
        run=str(tmp_path / "run"),
        data=str(tmp_path / "captions.txt"),
        candidates=6,
        blur=[0],
        bootstrap=10,
    )
    page = run(prepare(settings), settings)
    assert page is not None and page.exists()
    for file in (tmp_path / "run" / "draws").glob("*.safetensors"):
        held = load_file(file)
        tokens = held["tokens"].long().view(6, 2, 2)
        both = [model.log_prob(caption, tokens) for caption in ("a red cat", "one small mat")]
        assert any(torch.allclose(held["scores"], x, rtol=1e-4, atol=1e-4) for x in both)
    other = settings.model_copy(update={"ranker": "perplexity"})
    with pytest.raises(ValueError, match="holds candidates of other settings"):
        run(prepare(other), other)


def test_log_prob_is_the_sum_over_tokens(make_transformer: TransformerMaker) -> None:
    """Log-probabilities of tokens that are not those of the image."""
    transformer: Transformer = make_transformer()
    text = torch.tensor([[3, 1, 13, 14, 15, 16]])
    image: Tensor = torch.randint(9, (1, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        each = transformer.token_log_probs(text, image)
        total = transformer.log_prob(text, image)
    assert each.shape == (1, 16) and bool((each < 0).all())
    torch.testing.assert_close(each.sum(1), total)

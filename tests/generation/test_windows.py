"""Windows of tokens in one pass: the sequential image, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dalle1 import Transformer
from dalle1.generation.generator import Generator
from dalle1.generation.options import SamplingOptions, candidate_uniforms
from dalle1.transformer.sequence import PATTERNS, Pattern
from tests.conftest import TransformerMaker

TEXT = torch.tensor([[3, 1, 13, 14, 15, 16], [7, 7, 7, 14, 15, 16]])
OPTIONS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"top_k": 3},
    {"top_p": 0.6},
    {"guidance": 2.0},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "guidance": 1.5},
]


def drawn(
    transformer: Transformer,
    window: int,
    captions: int,
    candidates: int,
    prefix: Tensor | None = None,
    **settings: float,
) -> tuple[Tensor, int]:
    """Tokens [c, b, m], and how many passes they took."""
    options = SamplingOptions(window=window, **settings)  # type: ignore[arg-type]
    generator = Generator(transformer, captions, candidates, options, static=False)
    passes, step = 0, generator.state.step

    def counted(tokens: Tensor, position: int | Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return step(tokens, position)

    generator.state.step = counted  # type: ignore[method-assign]
    length = transformer.config.grid**2
    uniforms = torch.stack(
        [candidate_uniforms(5, str(i), 0, candidates, length) for i in range(captions)]
    )
    return generator.draw(TEXT[:captions], uniforms, prefix), passes


@pytest.mark.parametrize("settings", OPTIONS, ids=str)
@pytest.mark.parametrize("window", [2, 3, 5, 16, 99])
def test_windows_draw_the_sequential_image(
    make_transformer: TransformerMaker, window: int, settings: dict[str, float]
) -> None:
    """A token that is final before what it was drawn from, or drawn with another's number."""
    transformer = make_transformer(layers=5, grid=5)
    for captions, candidates, given in ((1, 1, 0), (1, 3, 7), (2, 2, 0), (2, 1, 24)):
        prefix = torch.arange(given) % 7 if given else None
        expected, steps = drawn(transformer, 1, captions, candidates, prefix, **settings)
        found, passes = drawn(transformer, window, captions, candidates, prefix, **settings)
        assert torch.equal(found, expected)
        assert steps == 25 - given and passes <= steps


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("grid", "kernel"), [(1, 3), (2, 1), (4, 3), (5, 5), (6, 11)])
def test_windows_of_each_pattern(
    make_transformer: TransformerMaker, pattern: Pattern, grid: int, kernel: int
) -> None:
    """A ring that loses what an earlier position of the window still reads."""
    transformer = make_transformer(layers=2, grid=grid, conv_kernel=kernel)
    for layer in transformer.layers:
        layer.attention.pattern = pattern  # type: ignore[union-attr]
    for window in (2, 4, 2 * grid + 1):
        for candidates in (1, 2):
            expected, _ = drawn(transformer, 1, 1, candidates)
            assert torch.equal(drawn(transformer, window, 1, candidates)[0], expected)


def test_likely_tokens_need_few_passes(make_transformer: TransformerMaker) -> None:
    """Windows that advance by one position whatever their drafts are."""
    transformer = make_transformer(layers=2, grid=6)
    with torch.no_grad():  # the token 3 is nearly certain everywhere
        transformer.image_head.weight.zero_()
        transformer.image_head.bias.zero_()
        transformer.image_head.bias[3] = 50.0
    tokens, passes = drawn(transformer, 9, 1, 2)
    # The first drafts are wrong; from then on each is the last token, or the one above.
    assert (tokens == 3).all() and passes <= 5


def test_rows_are_told_in_order_and_when_they_are_done(make_transformer: TransformerMaker) -> None:
    """A preview of rows that are drafts, a row that is left out or told twice."""
    transformer = make_transformer(layers=3, grid=5)
    uniforms = candidate_uniforms(1, "x", 0, 3, 25)[None]
    generator = Generator(transformer, 1, 3, SamplingOptions(window=7), static=False)
    told: list[tuple[int, Tensor]] = []
    final = generator.draw(TEXT[:1], uniforms, None, lambda n, t: told.append((n, t.clone())))
    assert [n for n, _ in told] == [5, 10, 15, 20, 25]
    for n, tokens in told:
        assert torch.equal(tokens[..., :n], final[..., :n])
    again = generator.draw(TEXT[1:], uniforms)  # and a generator may draw again
    alone = Generator(transformer, 1, 3, SamplingOptions(window=1), static=False)
    assert torch.equal(again, alone.draw(TEXT[1:], uniforms))


def test_windows_are_chosen_for_few_rows(make_transformer: TransformerMaker) -> None:
    """Windows where a batch is fast already, or none where somebody waits for one image."""
    transformer = make_transformer()
    assert Generator(transformer, 1, 1).window > 1
    assert Generator(transformer, 2, 64).window == 1
    assert Generator(transformer, 1, 1, static=True).window == 1
    assert Generator(transformer, 2, 64, SamplingOptions(window=3)).window == 3


@pytest.mark.parametrize("window", [0, -1, 2.5, "4", True])
def test_a_window_that_is_none(window: object) -> None:
    """A window of no positions, which would never end."""
    with pytest.raises(ValueError, match="window: expected"):
        SamplingOptions(window=window)  # type: ignore[arg-type]


def test_a_static_step_has_no_window(make_transformer: TransformerMaker) -> None:
    """A window that is asked for and silently left out."""
    with pytest.raises(ValueError, match=r"window: expected 1 or None for a static step"):
        Generator(make_transformer(), 1, 1, SamplingOptions(window=4), static=True)


class OneByOne(nn.Module):
    """A prior of somebody else's, without `WindowPrior`."""

    def __init__(self, inner: Transformer) -> None:
        super().__init__()
        self.inner = inner
        self.grid, self.image_vocab = inner.grid, inner.image_vocab
        self.start, self.empty_caption = inner.start, inner.empty_caption


def test_a_prior_without_steps_of_several_positions(make_transformer: TransformerMaker) -> None:
    """A window that a prior of somebody else's takes for one position."""
    prior: Any = OneByOne(make_transformer())
    assert Generator(prior, 1, 1).window == 1
    with pytest.raises(ValueError, match=r"window: expected 1 or None for OneByOne.*got 4"):
        Generator(prior, 1, 1, SamplingOptions(window=4))


@pytest.mark.parametrize("largest", [1, 3, 12])
def test_steps_in_any_order(make_transformer: TransformerMaker, largest: int) -> None:
    """A ring that forgets how far it was written once a row went back: what is behind reads keys
    of later positions as its own."""
    transformer = make_transformer(layers=5, grid=6)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(9, (2, 36), generator=generator)
    state = transformer.start(1, 2)
    state.prefill(TEXT[:1])
    known = torch.zeros(2, 0, dtype=torch.int64)  # what was fed, without the start
    for turn in range(60):
        # One step of the largest window first, which decides what is held.
        count = largest if not turn else int(torch.randint(1, largest + 1, (), generator=generator))
        length = known.shape[1] + bool(turn)
        first = int(torch.randint(0, min(length, 36 - count) + 1, (), generator=generator))
        new = tokens[:, torch.randperm(36, generator=generator)][:, :count]
        fed = new.clone()
        if first == 0:
            fed[:, 0] = 9  # the start
        known = torch.cat([known[:, : max(0, first - 1)], fed if first else fed[:, 1:]], dim=1)
        logits = state.step(fed, first)
        image = torch.cat([known, torch.zeros(2, 1, dtype=torch.int64)], dim=1)
        _, expected = transformer(TEXT[:1].expand(2, -1), image[:, :36])
        torch.testing.assert_close(logits, expected[:, first : first + count], rtol=1e-4, atol=1e-4)

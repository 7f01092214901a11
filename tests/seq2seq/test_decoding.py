"""The decoding state: cached steps against the full pass, and drawing with guidance."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle1.generation.decoding import Generator, SamplingOptions, candidate_uniforms, draw
from dalle1.seq2seq.decoding import cache_bytes
from dalle1.seq2seq.model import Seq2Seq
from tests.parity.dalle_mini import Restated

from .test_model import captions, images

START = 40


def before(image: Tensor) -> Tensor:
    """What stands before each image token [n, m]: the start, then the tokens but the last."""
    return F.pad(image[:, :-1], (1, 0), value=START)


def full_pass(prior: Seq2Seq, text: Tensor, image: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = prior(text, image)
    return logits


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("count", "candidates", "given"), [(1, 1, 0), (3, 2, 0), (2, 3, 5)])
def test_cached_steps(
    prior: Seq2Seq, count: int, candidates: int, given: int, static: bool
) -> None:
    """A cache of the wrong layer, caption or candidate; padding that is read; first tokens that
    leave other caches than steps would."""
    text, image = captions(count), images(count * candidates)
    image[:, :given] = image[0, :given]
    expected = full_pass(prior, text.repeat_interleave(candidates, 0), image)
    state = prior.start(count, candidates, static)
    for _ in range(2):  # a state serves many batches
        if static:
            state.step(before(image)[:, :1], torch.tensor([0]))  # tried before it reads a caption
        state.prefill(text, image[0, :given] if given else None)
        for p in range(given, 16):
            logits = state.step(before(image)[:, p : p + 1], torch.tensor([p]) if static else p)
            torch.testing.assert_close(logits[:, 0], expected[:, p], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [2, 5, 16])
@pytest.mark.parametrize("given", [0, 3])
def test_steps_of_several_positions(prior: Seq2Seq, size: int, given: int) -> None:
    """Positions of one step that see each other's future, or not each other."""
    text, image = captions(2), images(4)
    image[:, :given] = image[0, :given]
    expected = full_pass(prior, text.repeat_interleave(2, 0), image)
    state = prior.start(2, 2)
    state.prefill(text, image[0, :given])
    for first in range(given, 16, size):
        part = before(image)[:, first : first + size]
        logits = state.step(part, torch.tensor([first]) if first % 2 else first)
        torch.testing.assert_close(logits, expected[:, first : first + size], rtol=0, atol=1e-5)


def test_rows_at_positions_of_their_own_and_back(prior: Seq2Seq) -> None:
    """What was fed wrongly and stays, or a row that is read where another one is."""
    text, image = captions(2), images(4)
    expected = full_pass(prior, text.repeat_interleave(2, 0), image)
    state = prior.start(2, 2)
    state.prefill(text)
    g = torch.Generator().manual_seed(0)
    state.step(torch.randint(40, (4, 12), generator=g), 0)  # all of it is wrong
    for first in ([0, 3, 0, 1], [5, 2, 4, 4], [1, 1, 1, 1], [6, 0, 2, 3], [10, 9, 8, 4]):
        at = torch.tensor(first)
        rows = torch.arange(4)[:, None]
        index = at[:, None] + torch.arange(3)
        state.step(before(image)[:, :10], 0)  # whatever stands before them is right again
        logits = state.step(before(image)[rows, index], at)
        torch.testing.assert_close(logits, expected[rows, index], rtol=0, atol=1e-5)
        state.step(torch.full((4, 2), 7), at)  # and is written over
        again = state.step(before(image)[rows, index], at)
        torch.testing.assert_close(again, logits, rtol=0, atol=1e-6)


def test_positions_that_cannot_be_fed(prior: Seq2Seq) -> None:
    """A position behind one that was never fed, which would read zeros."""
    state = prior.start(1, 2)
    state.prefill(captions(1))
    tokens = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="position: expected at most the next one, 0, got 1"):
        state.step(tokens, 1)
    state.step(tokens.expand(-1, 15), 0)
    with pytest.raises(ValueError, match="expected at most 14 for 2 tokens, got 15"):
        state.step(tokens.expand(-1, 2), 15)
    with pytest.raises(ValueError, match="text: expected 1 captions, got 2"):
        state.prefill(captions(2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("size", [1, 4])
def test_weights_in_16_bits(
    prior: Seq2Seq, dtype: torch.dtype, tolerance: float, size: int
) -> None:
    """A kernel that lacks the type, or a sum that is formed in it."""
    narrow = copy.deepcopy(prior).to(dtype)
    text, image = captions(2), images(4)
    expected = full_pass(prior, text.repeat_interleave(2, 0), image)
    assert narrow(text.repeat_interleave(2, 0), image).dtype == torch.float32
    state = narrow.start(2, 2)
    state.prefill(text)
    for first in range(0, 16, size):
        logits = state.step(before(image)[:, first : first + size], first)
        error = (logits - expected[:, first : first + size]).norm() / expected[:, first].norm()
        assert logits.dtype == torch.float32 and float(error) < tolerance


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_greedy_images_equal_the_restatements_loop(
    pair: tuple[Seq2Seq, Restated], guidance: float, static: bool
) -> None:
    """Guidance with another empty caption or the sides swapped; a token beyond the codec's."""
    prior, restated = pair
    text = captions()
    empty = torch.tensor([0, 2] + 7 * [1]).expand(3, -1)
    expected = restated.draw_greedily(text, empty, guidance)
    options = SamplingOptions(temperature=0, guidance=guidance)
    generator = Generator(prior, 3, 1, options, static=static)
    tokens = generator.draw(text, torch.zeros(3, 1, 16))
    assert torch.equal(tokens[:, 0], expected)


@pytest.mark.parametrize("window", [1, 2, 8, 16])
def test_windows_draw_the_same_images(prior: Seq2Seq, window: int) -> None:
    """A window that changes a token."""
    uniforms = candidate_uniforms(0, "a", 0, 3, 16)
    expected, tokens = (
        draw(prior, captions(1)[0], uniforms, SamplingOptions(guidance=2.0, window=w))
        for w in (1, window)
    )
    assert torch.equal(tokens, expected)


def test_candidates_do_not_depend_on_the_batch(prior: Seq2Seq) -> None:
    """A candidate that reads another one's keys."""
    uniforms = candidate_uniforms(0, "a", 0, 5, 16)
    every = draw(prior, captions(1)[0], uniforms)
    for i in range(5):
        assert torch.equal(draw(prior, captions(1)[0], uniforms[i : i + 1])[0], every[i])


def test_given_tokens_stay(prior: Seq2Seq) -> None:
    """A completed image whose given rows are drawn over, or are not read."""
    uniforms = candidate_uniforms(0, "a", 0, 2, 16)
    prefix = images(1)[0, :8]
    tokens = draw(prior, captions(1)[0], uniforms, prefix=prefix)
    assert torch.equal(tokens[:, :8], prefix.expand(2, -1))
    assert not torch.equal(tokens, draw(prior, captions(1)[0], uniforms))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_that_are_foretold(prior: Seq2Seq, dtype: torch.dtype) -> None:
    """Batches that are chosen by another memory than is taken."""
    prior = copy.deepcopy(prior).to(dtype)
    state = prior.start(2, 3)
    held = sum(x.numel() * x.element_size() for c in state.layers for x in (c.text, c.image))
    shared, each = cache_bytes(prior.config, dtype)
    assert held == 2 * shared + 6 * each
    assert prior.decoding_bytes()[0] == shared and prior.decoding_bytes()[1] > each
    assert prior.window_bytes(4) > prior.window_bytes(1) > shared + each

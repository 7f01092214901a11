"""Drawing: the cached steps against the full forward pass, the draws against enumeration."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle1 import Transformer
from dalle1.generation.generator import Generator, complete_text, draw
from dalle1.generation.options import SamplingOptions, candidate_uniforms, sample_token
from tests.conftest import TransformerMaker

DRAWS = 20_000


def test_likeliest_tokens(make_transformer: TransformerMaker) -> None:
    """Temperature 0 that draws; a token that is fed one position late."""
    transformer = make_transformer()
    text = torch.tensor([3, 1, 13, 14, 15, 16])
    steps: list[int] = []
    uniforms, greedy = torch.rand(2, 16), SamplingOptions(temperature=0)
    tokens = draw(transformer, text, uniforms, greedy, on_step=lambda done, _: steps.append(done))
    assert tokens.shape == (2, 16) and tokens.dtype == torch.int64
    assert steps == [4, 8, 12, 16]
    with torch.no_grad():
        _, logits = transformer(text.expand(2, -1), tokens)
    assert torch.equal(tokens, logits.argmax(dim=-1))


def test_captions_are_drawn_from_the_text_side(make_transformer: TransformerMaker) -> None:
    """A text token drawn from the position before or behind; an end that is no end."""
    transformer = make_transformer()
    image = torch.zeros(1, 0, dtype=torch.int64)
    uniforms = candidate_uniforms(0, "x", 0, 40, 6)
    lengths = set()
    for row in uniforms:
        ids = complete_text(transformer, [3], row)
        assert ids[0] == 3 and 0 not in ids and len(ids) <= 6
        lengths.add(len(ids))
        padded = torch.tensor([ids + [11 + p for p in range(len(ids), 6)]])
        with torch.no_grad():
            logits = transformer(padded, image)[0][0]
        expected = sample_token(logits, row, SamplingOptions()).tolist()
        assert ids[1:] == expected[1 : len(ids)]
        if len(ids) < 6:
            assert expected[len(ids)] == 0  # the end, at the first position that is not kept
        # The numbers belong to positions, so more given text changes nothing that follows.
        assert complete_text(transformer, ids[:2], row) == ids or len(ids) == 1
    assert len(lengths) > 2
    with pytest.raises(ValueError, match="guidance"):
        complete_text(transformer, [3], uniforms[0], SamplingOptions(guidance=2.0))


def test_draws_do_not_depend_on_the_batch(make_transformer: TransformerMaker) -> None:
    """Random numbers that are shared by a batch: another batch size, other images."""
    transformer = make_transformer()
    text = torch.tensor([3, 1, 13, 14, 15, 16])
    before = text.clone()
    options = SamplingOptions(top_p=0.95, guidance=1.5)
    drawn = []
    for batch in (1, 3, 8):
        parts = [
            draw(transformer, text, candidate_uniforms(7, "x", i, min(batch, 8 - i), 16), options)
            for i in range(0, 8, batch)
        ]
        drawn.append(torch.cat(parts))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    assert len(drawn[0].unique(dim=0)) == 8
    assert torch.equal(text, before)  # guidance must not overwrite the caption


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_captions_drawn_together(
    make_transformer: TransformerMaker, guidance: float, static: bool
) -> None:
    """Captions that get each other's images, or what an earlier draw left in the caches."""
    transformer = make_transformer(layers=3)
    text = torch.tensor([[3, 1, 13, 14, 15, 16], [7, 7, 7, 14, 15, 16], [2, 12, 13, 14, 15, 16]])
    uniforms = torch.stack([candidate_uniforms(1, str(i), 0, 2, 16) for i in range(3)])
    options = SamplingOptions(guidance=guidance)
    prefix = torch.tensor([3, 1, 4])
    generator = Generator(transformer, 3, 2, options, static)
    first = generator.draw(text, uniforms)
    kept = first.clone()
    for given in (prefix, None):  # one generator, used again and again
        together = generator.draw(text, uniforms, given)
        assert torch.equal(first, kept)
        for i in range(3):
            alone = draw(transformer, text[i], uniforms[i], options, given)
            assert torch.equal(together[i], alone)
    assert len(together.flatten(0, 1).unique(dim=0)) == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_recorded_graph(make_transformer: TransformerMaker, guidance: float) -> None:
    """A graph that replays its first position, or tokens, for ever."""
    transformer = copy.deepcopy(make_transformer(layers=5)).cuda()
    garbage = torch.full((2**24,), math.nan, device="cuda")  # what fresh memory may hold
    del garbage
    text = torch.tensor([[3, 1, 13, 14, 15, 16], [7, 7, 7, 14, 15, 16]])
    uniforms = torch.stack([candidate_uniforms(1, str(i), 0, 3, 16) for i in range(2)])
    options = SamplingOptions(guidance=guidance)
    graph = Generator(transformer, 2, 3, options)
    assert graph.graph is not None
    plain = Generator(transformer, 2, 3, options, static=False)
    for given in (None, torch.tensor([3, 1, 4]), None):
        assert torch.equal(graph.draw(text, uniforms, given), plain.draw(text, uniforms, given))


def test_candidate_uniforms() -> None:
    """Candidates that share numbers, or depend on where their batch begins."""
    rows = candidate_uniforms(3, "a cat", 0, 50, 40)
    assert rows.shape == (50, 40) and rows.dtype == torch.float64
    assert float(rows.min()) >= 0 and float(rows.max()) < 1
    assert torch.equal(candidate_uniforms(3, "a cat", 17, 5, 40), rows[17:22])
    assert torch.equal(candidate_uniforms(3, "a cat", 0, 50, 30), rows[:, :30])
    assert len(rows.flatten().unique()) == 2000
    for other in ((4, "a cat"), (3, "a dog"), (3, ""), (-3, "a cat")):
        assert not bool(torch.isin(candidate_uniforms(*other, 0, 50, 40), rows).any())
    counts = torch.histc(rows, 20, 0, 1)
    assert float(((counts - 100) ** 2 / 100).sum()) < 50  # chi-square, 19 degrees of freedom


def tiny(make_transformer: TransformerMaker) -> tuple[Transformer, Tensor]:
    """Four positions of three tokens: 81 images, that can be enumerated; and a caption."""
    transformer = make_transformer(4, 0.25, grid=2, image_vocab=3, layers=3)
    return transformer, torch.tensor([3, 1, 13, 14, 15, 16])


def shaped(logits: np.ndarray, options: SamplingOptions) -> np.ndarray:
    """Probabilities of tokens [v] under the options, re-stated with sets."""
    p = np.exp(logits / options.temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = set(order[: options.top_k])
    p = np.array([x if i in kept else 0.0 for i, x in enumerate(p)])
    p /= p.sum()
    if options.top_p is not None:
        kept, mass = set(), 0.0
        for i in order:
            if mass < options.top_p:
                kept.add(i)
            mass += p[i]
        p = np.array([x if i in kept else 0.0 for i, x in enumerate(p)])
        p /= p.sum()
    return p


def enumerated(
    transformer: Transformer, text: Tensor, options: SamplingOptions, prefix: list[int]
) -> dict[tuple[int, ...], float]:
    """The probability of each of the 81 images, from the full forward pass."""
    images = list(itertools.product(range(3), repeat=4))
    every = torch.tensor(images)
    padding = torch.tensor([11 + p for p in range(6)])
    with torch.no_grad():
        conditional = transformer(text.expand(81, -1), every)[1].double().numpy()
        free = transformer(padding.expand(81, -1), every)[1].double().numpy()
    logits = free + options.guidance * (conditional - free)
    table = {}
    for i, image in enumerate(images):
        p = float(list(image[: len(prefix)]) == prefix)
        for position in range(len(prefix), 4):
            p *= shaped(logits[i, position], options)[image[position]]
        table[image] = p
    return table


@pytest.mark.parametrize(
    ("settings", "prefix"),
    [
        ({}, []),
        ({"temperature": 0.6}, []),
        ({"temperature": 2.0}, []),
        ({"top_k": 2}, []),
        ({"top_p": 0.8}, []),
        ({"guidance": 2.0}, []),
        ({"guidance": 0.0}, []),
        ({}, [2, 0]),
        ({"temperature": 1.3, "top_k": 2, "top_p": 0.9, "guidance": 1.5}, [1]),
        ({"window": 1}, []),
        ({"window": 3}, []),
        ({"window": 4, "temperature": 1.3, "top_k": 2, "guidance": 1.5}, [1]),
    ],
)
def test_frequencies(
    make_transformer: TransformerMaker, settings: dict[str, Any], prefix: list[int]
) -> None:
    """Draws of another law: a bias, an option with no effect, a prefix that is not read."""
    transformer, text = tiny(make_transformer)
    options = SamplingOptions(**settings)
    table = enumerated(transformer, text, options, prefix)
    assert sum(table.values()) == pytest.approx(1)
    plain = enumerated(transformer, text, SamplingOptions(), [])
    given = torch.tensor(prefix) if prefix else None
    uniforms = candidate_uniforms(0, str(settings), 0, DRAWS, 4)
    tokens = draw(transformer, text, uniforms, options, given)
    images, counts = tokens.unique(dim=0, return_counts=True)
    seen = {tuple(image.tolist()): int(n) for image, n in zip(images, counts, strict=True)}
    assert all(table[image] > 0 for image in seen), "an image of probability 0 was drawn"

    def misfit(expected: dict[tuple[int, ...], float]) -> tuple[float, int]:
        """Chi-square and its degrees of freedom, rare images taken together."""
        common = [image for image, p in expected.items() if DRAWS * p >= 5]
        bins = [(seen.get(image, 0), DRAWS * expected[image]) for image in common]
        rare = DRAWS - sum(n for n, _ in bins), DRAWS - sum(e for _, e in bins)
        if rare[1] >= 5:
            bins.append(rare)
        return sum((n - e) ** 2 / e for n, e in bins), len(bins) - 1

    chi_square, freedom = misfit(table)
    assert freedom >= 5
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)
    if set(settings) - {"window"} or prefix:  # the test can tell the options apart
        chi_square, freedom = misfit(plain)
        assert chi_square > 3 * freedom


def chosen(uniforms: list[float], **settings: Any) -> list[int]:
    """Tokens that `choose` takes of p = 0.05, 0.5, 0.15, 0.3 at the given uniforms."""
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().expand(len(uniforms), -1)
    before = logits.clone()
    tokens = sample_token(
        logits, torch.tensor(uniforms, dtype=torch.float64), SamplingOptions(**settings)
    )
    assert torch.equal(logits, before)
    return tokens.tolist()


def test_choose_by_hand() -> None:
    """SamplingOptions in another order, a set too small or too large, a point off its interval."""
    # p = 0.05, 0.5, 0.15, 0.3: ends of the intervals 0.05, 0.55, 0.7, 1.
    points = [0.0, 0.049, 0.051, 0.549, 0.551, 0.699, 0.701, 1 - 2**-53]
    assert chosen(points) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert chosen([0.0, 0.3, 0.999], temperature=0) == [1, 1, 1]
    assert chosen([0.0, 0.3, 0.999], top_k=1) == [1, 1, 1]
    # top_k 2: 0.5 and 0.3 of 0.8: the first ends at 0.625.
    assert chosen([0.0, 0.624, 0.626, 0.999], top_k=2) == [1, 1, 3, 3]
    assert chosen(points, top_k=4) == chosen(points, top_k=100) == chosen(points)
    # top_p: the smallest set that holds the mass; 0.79 needs two tokens, 0.81 three.
    assert chosen([0.0, 0.624, 0.626, 0.999], top_p=0.79) == [1, 1, 3, 3]
    # 0.5, 0.15, 0.3 of 0.95: ends 0.526, 0.684, 1.
    assert chosen([0.0, 0.52, 0.53, 0.68, 0.69], top_p=0.81) == [1, 1, 2, 2, 3]
    assert chosen(points, top_p=1.0) == chosen(points)
    for tiny in (1e-9, 1e-46, 5e-324):  # below 1e-45 it is 0 in 32 bits
        assert chosen([0.0, 0.5, 0.999], top_p=tiny) == [1, 1, 1]
    # Temperature 1/2 squares: 0.0025, 0.25, 0.0225, 0.09 of 0.365: ends 0.0068, 0.6918, 0.7534.
    assert chosen([0.006, 0.007, 0.691, 0.692, 0.753, 0.754], temperature=0.5) == [
        0, 1, 1, 2, 2, 3,
    ]  # fmt: skip
    # top_k first: of 0.526, 0.158, 0.316 two hold 0.84; of the untruncated it takes three.
    assert chosen([0.624, 0.626, 0.7], top_k=3, top_p=0.83) == [1, 3, 3]
    # Temperature before top_p: squared, 0.685 + 0.247 hold 0.9.
    assert chosen([0.73, 0.74], temperature=0.5, top_p=0.9) == [1, 3]


def test_ties_are_cut_to_exactly_k_from_the_lowest_id() -> None:
    """More than k tokens where several equal the k-th, as is common in 16 bits."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 50, generator=rng).mul(3).round() / 2  # nearly all have equals
    points = torch.rand(64, 400, dtype=torch.float64, generator=rng)
    for k in (1, 2, 3, 10, 49):
        # Python's sort is stable: of equal tokens the lowest ids come first.
        ranked = [sorted(range(50), key=lambda i: -row[i]) for row in logits.tolist()]
        allowed = [set(order[:k]) for order in ranked]
        options, drawn = SamplingOptions(top_k=k), [set[int]() for _ in range(400)]
        for uniforms in points:
            for row, token in enumerate(sample_token(logits, uniforms, options).tolist()):
                drawn[row].add(token)
        assert all(found <= kept for found, kept in zip(drawn, allowed, strict=True))
        assert sum(map(len, drawn)) > 400 * min(k, 3) * 0.7  # and not fewer
    greedy = sample_token(logits, points[0], SamplingOptions(temperature=0))
    for same in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-40}):
        assert torch.equal(sample_token(logits, points[0], SamplingOptions(**same)), greedy)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30, 3e38])
@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-40, 1e-38, 1e-30, 1e-10])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float, scale: float) -> None:
    """Logits that overflow to infinity and NaN, and an index beyond the vocabulary."""
    logits = torch.tensor([[-1.0, 0.25, 1.0, 0.5], [0.5, -1.0, -0.5, -torch.inf]]) * scale
    for point in (0.0, 0.5, 1 - 2**-53):
        uniforms = torch.full((2,), point, dtype=torch.float64)
        for other in ({}, {"top_k": 3}, {"top_p": 0.9}):
            options = SamplingOptions(temperature=temperature, **other)  # type: ignore[arg-type]
            assert sample_token(logits, uniforms, options).tolist() == [2, 0]


def test_a_huge_temperature_draws_what_is_not_ruled_out_alike() -> None:
    """A token of probability 0 that comes back, or NaN, where the temperature overflows."""
    logits = torch.tensor([[9.0, -torch.inf, -9.0, 0.0]]).expand(4, -1)
    points = torch.tensor([0.3, 0.34, 0.66, 0.67], dtype=torch.float64)
    for temperature in (1e30, 1e39, 1e300):
        options = SamplingOptions(temperature=temperature)
        assert sample_token(logits, points, options).tolist() == [0, 2, 2, 3]


def test_the_largest_number_draws_a_token_that_is_possible() -> None:
    """A number that is rounded up to the total, and a token without probability behind it."""
    logits = torch.tensor([[0.1, 0.2, 0.7, -torch.inf, -torch.inf]])
    for dtype in (torch.float64, torch.float32):
        for point in (1 - 2**-53, 1.0):
            uniforms = torch.tensor([point], dtype=dtype)
            assert sample_token(logits, uniforms, SamplingOptions()).tolist() == [2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}, {"guidance": 3.0}],
)
def test_logits_that_are_no_numbers_are_refused(bad: float, settings: dict[str, float]) -> None:
    """An IndexError, or tokens drawn of NaN, where activations overflow a 16-bit dtype."""
    logits = torch.zeros(3, 5, dtype=torch.float16)
    uniforms, options = torch.full((3,), 0.5), SamplingOptions(**settings)  # type: ignore[arg-type]
    assert sample_token(logits, uniforms, options).shape == (3,)
    logits[1, 2] = bad
    named = r"^dtype: .*torch\.float16" + (".*guidance than 3" if "guidance" in settings else "")
    with pytest.raises(ValueError, match=named):
        sample_token(logits, uniforms, options)
    with pytest.raises(ValueError, match=r"^dtype"):
        sample_token(torch.full((1, 5), -torch.inf), uniforms[:1], options)


@pytest.mark.parametrize("static", [False, True])
def test_overflow_while_drawing_is_refused_before_anything_is_shown(
    make_transformer: TransformerMaker, static: bool
) -> None:
    """Images of tokens that were drawn of NaN; an error that comes after all positions."""
    transformer = copy.deepcopy(make_transformer())
    text = torch.tensor([[3, 1, 13, 14, 15, 16]])
    uniforms = candidate_uniforms(0, "x", 0, 2, 16)[None]
    generator = Generator(transformer, 1, 2, static=static)
    generator.draw(text, uniforms)
    transformer.image_embedding.weight.data.fill_(math.nan)
    shown: list[int] = []
    with pytest.raises(ValueError, match=r"^dtype: expected finite logits.*torch\.float32"):
        generator.draw(text, uniforms, on_step=lambda done, _: shown.append(done))
    assert not shown


def test_drawn_tokens_train(make_transformer: TransformerMaker) -> None:
    """Tensors of the inference mode, which no loss accepts."""
    transformer = make_transformer()
    text = torch.tensor([3, 1, 13, 14, 15, 16])
    tokens = draw(transformer, text, candidate_uniforms(0, "x", 0, 2, 16))
    assert not tokens.is_inference()
    transformer.loss(text.expand(2, -1), tokens).image.backward()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"guidance": -1.0},
        {"guidance": math.nan},
        {"guidance": math.inf},
    ],
)
def test_options_errors(settings: dict[str, float]) -> None:
    """An option out of its range that gives NaN logits instead of an error with its name."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        SamplingOptions(**settings)  # type: ignore[arg-type]

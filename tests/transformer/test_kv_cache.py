"""The transformer's decoding state: cached steps against the full forward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle1 import Transformer, TransformerConfig
from dalle1.transformer.kv_cache import KVCache, SlotBuffer, cache_bytes
from dalle1.transformer.masks import cache_length, slots, step_keys
from dalle1.transformer.prepacked_linear import (
    PrepackedLinear,
    can_prepack,
    prepacked,
    prepacked_linear,
)
from dalle1.transformer.sequence import PATTERNS, Pattern
from tests.conftest import TransformerMaker


def before(image: Tensor, start: int) -> Tensor:
    """What stands before each image token [n, m]: the start, then the tokens but the last."""
    return F.pad(image[:, :-1], (1, 0), value=start)


def check_steps(
    transformer: Transformer, captions: int, candidates: int, given: int, static: bool
) -> None:
    """Logits of every cached step against the full forward pass, each row with its own image."""
    c = transformer.config
    g = torch.Generator().manual_seed(captions + given)
    m, rows = c.grid**2, captions * candidates
    text = torch.randint(1, c.text_vocab, (captions, c.text_length), generator=g)
    text[:, 4:] = c.text_vocab + torch.arange(4, c.text_length)
    image = torch.randint(c.image_vocab, (rows, m), generator=g)
    image[:, :given] = image[0, :given]
    with torch.inference_mode():
        _, expected = transformer(text.repeat_interleave(candidates, dim=0), image)
        state = transformer.start(captions, candidates, static)
        state.prefill(text, image[0, :given])
        inputs = before(image, c.image_vocab)
        for p in range(given, m):
            logits = state.step(inputs[:, p : p + 1], torch.tensor([p]) if static else p)
            torch.testing.assert_close(logits[:, 0], expected[:, p], rtol=0, atol=1e-4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("grid", "kernel"), [(1, 3), (2, 1), (3, 3), (5, 5), (6, 3), (7, 11)])
def test_cached_steps_of_each_pattern(
    make_transformer: TransformerMaker, pattern: Pattern, grid: int, kernel: int, static: bool
) -> None:
    """A cache that holds the wrong position or reads the wrong keys, in one pattern alone."""
    transformer = make_transformer(layers=1, grid=grid, text_length=7, conv_kernel=kernel)
    transformer.layers[0].attention.pattern = pattern  # type: ignore[union-attr]
    check_steps(transformer, 1, 3, 0, static)
    check_steps(transformer, 1, 2, grid, static)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("kernel", [3, 11])
def test_cached_steps_of_stacks(
    make_transformer: TransformerMaker, layers: int, kernel: int, static: bool
) -> None:
    """A cache that holds the wrong layer, caption or candidate."""
    transformer = make_transformer(layers=layers, grid=6, text_length=10, conv_kernel=kernel)
    check_steps(transformer, 1, 3, 0, static)
    check_steps(transformer, 3, 2, 0, static)


@pytest.mark.parametrize("given", [1, 5, 6, 13, 35])
def test_cached_steps_after_given_tokens(make_transformer: TransformerMaker, given: int) -> None:
    """First tokens run in one pass that leave other caches than steps would, ring or grid."""
    transformer = make_transformer(layers=5, grid=6, conv_kernel=3)
    check_steps(transformer, 2, 3, given, static=False)
    check_steps(transformer, 2, 3, given, static=True)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid", [2, 3, 4, 6, 7])
@pytest.mark.parametrize("kernel", [1, 3, 5, 11])
def test_slots_hold_what_is_read(pattern: Pattern, grid: int, kernel: int) -> None:
    """A slot that is written over too early, a slice where slots are not evenly spaced."""
    where = slots(pattern, grid, kernel)
    assert where.length == cache_length(pattern, grid, kernel)
    for static in (False, True):
        buffer = SlotBuffer(torch.full((2, where.length, 1), -1), 0, 1, where)
        for p, keys in enumerate(step_keys(pattern, grid, kernel)):
            at = torch.tensor([p]) if static else p
            buffer.write(torch.full((2, 1), p), at)
            part, counts = buffer.read(at)
            assert (counts is None) != static
            seen = part[0, :, 0] if counts is None else part[0, counts, 0]
            assert sorted(seen.tolist()) == keys.tolist()


def test_rows_and_columns_are_read_without_a_copy() -> None:
    """Reading that copies the keys of each step, where a view would do."""
    for pattern in ("row", "column"):
        assert all(isinstance(r, slice) and r.step == 1 for r in slots(pattern, 32).reads)  # type: ignore[arg-type]


def test_prepacked_maps(make_transformer: TransformerMaker) -> None:
    """Prepacked weights that differ, change the model they come from, or miss a map."""
    mlp = make_transformer(width=64, heads=8).layers[0].mlp
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        plain = copy.deepcopy(mlp).to(dtype)
        before = {name: p.clone() for name, p in plain.state_dict().items()}
        twin = prepacked(plain, 3)
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.inference_mode():
            torch.testing.assert_close(twin(x), plain(x), rtol=tolerance, atol=tolerance)
        assert isinstance(plain.up, torch.nn.Linear)
        for name, p in plain.state_dict().items():
            assert torch.equal(p, before[name])
        assert twin.norm.weight is plain.norm.weight
        if can_prepack(plain.up.weight):
            assert isinstance(twin.up, PrepackedLinear) and isinstance(twin.down, PrepackedLinear)
    double = copy.deepcopy(mlp).double()
    assert prepacked(double, 3) is double  # no kernel: left as it is
    y = prepacked_linear(double.up.weight, double.up.bias, 3)(torch.ones(2, 64).double())
    assert torch.equal(y, double.up(torch.ones(2, 64).double()))


def test_cpus_prepack() -> None:
    """Slow products without a word, because torch has given its kernels other names."""
    if torch.backends.mkldnn.is_available():
        assert can_prepack(torch.zeros(2, 2))


@pytest.fixture(params=[3, 11], ids=lambda kernel: f"kernel {kernel}")
def deep(make_transformer: TransformerMaker, request: pytest.FixtureRequest) -> Transformer:
    """Every pattern, on a grid that rings do not span."""
    return make_transformer(layers=6, grid=6, text_length=7, conv_kernel=request.param)


def case(transformer: Transformer, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Texts of two captions, the images of three candidates each, inputs and expected logits."""
    c = transformer.config
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(1, c.text_vocab, (2, c.text_length), generator=g)
    image = torch.randint(c.image_vocab, (6, c.grid**2), generator=g)
    with torch.no_grad():
        _, expected = transformer(text.repeat_interleave(3, dim=0), image)
    return text, image, before(image, c.image_vocab), expected


@pytest.mark.parametrize("count", [1, 2, 5, 36])
def test_steps_of_several_positions(deep: Transformer, count: int) -> None:
    """Positions of one step that do not see each other, or see what lies behind them."""
    text, _, inputs, expected = case(deep, 0)
    state = deep.start(2, 3)
    state.prefill(text)
    for p in range(0, 36, count):
        logits = state.step(inputs[:, p : p + count], p)
        torch.testing.assert_close(logits, expected[:, p : p + count], rtol=0, atol=1e-4)


@pytest.mark.parametrize("back", [1, 2, 7, 20])
def test_what_is_fed_again_is_written_over(deep: Transformer, back: int) -> None:
    """A ring that has lost what an earlier position reads; rejected tokens that are still seen."""
    text, _, inputs, expected = case(deep, 1)
    wrong = (inputs + 1) % deep.config.image_vocab
    state = deep.start(2, 3)
    state.prefill(text)
    for p in range(0, 36 - back, back):
        state.step(inputs[:, p : p + 1], p)  # right, and then drafts that turn out wrong
        state.step(wrong[:, p + 1 : p + 1 + back], p + 1)
        logits = state.step(inputs[:, p + 1 : p + 1 + back], p + 1)
        torch.testing.assert_close(logits, expected[:, p + 1 : p + 1 + back], rtol=0, atol=1e-4)
    state.step(wrong[:, :3], 0)
    torch.testing.assert_close(state.step(inputs, 0), expected, rtol=0, atol=1e-4)


def test_going_back_after_a_prefix(deep: Transformer) -> None:
    """Given tokens that are forgotten when a row goes back to the first position behind them."""
    text, image, _, _ = case(deep, 2)
    image[:, :8] = image[0, :8]
    inputs = before(image, deep.config.image_vocab)
    with torch.no_grad():
        _, expected = deep(text.repeat_interleave(3, dim=0), image)
    state = deep.start(2, 3)
    state.prefill(text, image[0, :8])
    state.step(inputs[:, 8:20], 8)
    for first in (8, 5):
        logits = state.step(inputs[:, first:24], first)
        torch.testing.assert_close(logits, expected[:, first:24], rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3])
def test_rows_at_different_positions(deep: Transformer, count: int) -> None:
    """Rows that advance at different speeds and are read at each other's position."""
    text, _, inputs, expected = case(deep, 3)
    state = deep.start(2, 3)
    state.prefill(text)
    at = torch.zeros(6, dtype=torch.int64)
    g = torch.Generator().manual_seed(0)
    while int(at.min()) + count <= 36:
        first = at.clamp(max=36 - count)
        index = first[:, None] + torch.arange(count)
        logits = state.step(inputs.gather(1, index), first)
        rows = torch.arange(6)[:, None]
        torch.testing.assert_close(logits, expected[rows, index], rtol=0, atol=1e-4)
        at = first + torch.randint(0, count + 1, (6,), generator=g)  # some are fed again


@pytest.mark.parametrize(
    ("count", "position", "message"),
    [(1, 5, "at most the next one, 3, got 5"), (1, -1, "got -1"), (40, 3, "for 40 tokens")],
)
def test_positions_that_cannot_be_fed(
    deep: Transformer, count: int, position: int, message: str
) -> None:
    """A gap whose logits are of nothing; an index error far from the mistake."""
    text, _, inputs, _ = case(deep, 0)
    state = deep.start(2, 3)
    with pytest.raises(ValueError, match=r"text: expected \[2, 7\], got \[1, 7\]"):
        state.prefill(text[:1])
    state.prefill(text)
    state.step(inputs[:, :3], 0)
    with pytest.raises(ValueError, match=message):
        state.step(inputs[:, :1].expand(-1, count), position)


def test_decoding_bytes_are_what_is_held(deep: Transformer) -> None:
    """A batch that is planned with less memory than its caches take."""
    caption, candidate = deep.decoding_bytes()
    held = deep.start(3, 5).cache.bytes
    assert 3 * caption < held <= 3 * caption + 15 * candidate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_the_caches(make_transformer: TransformerMaker, dtype: torch.dtype) -> None:
    """A count that is not what is really held, or a cache of another type than the weights."""
    transformer = make_transformer().to(dtype)
    config = transformer.config
    three = KVCache(transformer.layers, config, 3, 5)
    assert three.bytes == 3 * cache_bytes(config, 5, dtype)
    cache = KVCache(transformer.layers, config, 1, 5)
    held = [x for layer in cache.layers for x in (layer.text, layer.image.held)]
    assert all(x.dtype == dtype for x in held)
    assert sum(x.numel() * x.element_size() for x in held) == cache.bytes
    assert cache_bytes(config, 5, dtype) == cache.bytes


def test_cache_bytes() -> None:
    """A caption counted once for each candidate; whole images held where a row is enough."""
    paper = TransformerConfig()
    text = 2 * 64 * 3968 * 256 * 2  # keys and values, layers, width, positions, bytes
    # Keys and values of 47 row layers of 33; states of 16 column layers of 1,024 and of the last
    # layer's 5 rows + 5 + 1.
    each = 3968 * (2 * 47 * 33 + 16 * 1024 + 166) * 2
    assert cache_bytes(paper, 1, torch.float16) == text + each
    assert cache_bytes(paper, 512, torch.bfloat16) == text + 512 * each
    assert cache_bytes(paper, 3, torch.float32) == 2 * (text + 3 * each)
    assert each <= 156e6 and text <= 261e6

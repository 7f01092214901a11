"""Sparse attention against the boolean mask in float64, at odd sizes; what each key can reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from dalle1.transformer import attention as module
from dalle1.transformer import layers
from dalle1.transformer.attention import dense_attention, sparse_attention, sparse_pays
from dalle1.transformer.masks import allowed
from dalle1.transformer.sequence import Pattern
from tests.conftest import TransformerMaker

PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
SIZES = [(10, 6, 11), (10, 6, 3), (7, 5, 3), (1, 2, 3), (3, 1, 3), (24, 8, 11), (64, 16, 11)]


@pytest.fixture(params=[7, 16, 64])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks that cut rows, columns and the text at odd places."""
    monkeypatch.setattr(module, "CHUNK", request.param)
    module._chunks.cache_clear()
    yield
    module._chunks.cache_clear()


def heads(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    q, k, v = 1.5 * torch.randn(3, 2, 3, n, 8, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("text", "grid", "kernel"), SIZES)
def test_equal_to_the_mask(pattern: Pattern, text: int, grid: int, kernel: int) -> None:
    """A key lost or added at a chunk's edge, columns turned back the wrong way, gradients that
    miss a chunk or count the text once."""
    n = text + grid * grid
    mask = allowed(pattern, text, grid, kernel)
    exact = [x.double().requires_grad_() for x in heads(n)]
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(weight.double())
    for run in (sparse_attention, dense_attention):
        own = [x.requires_grad_() for x in heads(n)]
        y = run(*own, pattern, text, grid, kernel)
        assert float((y.detach().double() - expected.detach()).abs().max()) <= 1e-5
        y.backward(weight)
        for x, reference in zip(own, exact, strict=True):
            assert x.grad is not None and reference.grad is not None
            assert float((x.grad.double() - reference.grad).abs().max()) <= 1e-4


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("run", [sparse_attention, dense_attention])
def test_each_key_reaches_whom_it_may(pattern: Pattern, run: Callable[..., Tensor]) -> None:
    """A leak from the future or from another column, and an allowed key without influence."""
    text, grid, kernel = 10, 6, 3
    n = text + grid * grid
    mask = allowed(pattern, text, grid, kernel)
    q, k, v = heads(n)
    before = run(q, k, v, pattern, text, grid, kernel)
    for j in range(n):
        for changed in (k, v):
            held = changed[:, :, j].clone()
            changed[:, :, j] += torch.randn(held.shape, generator=torch.Generator().manual_seed(j))
            after = run(q, k, v, pattern, text, grid, kernel)
            changed[:, :, j] = held
            moved = (after != before).any(dim=3).any(dim=1).any(dim=0)
            sees = mask[:, j].clone()
            if changed is k:
                sees &= mask.sum(dim=1) > 1  # a lone key's weight is 1 whatever it is
            assert torch.equal(moved, sees), j


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("text", "grid", "kernel"), [(10, 6, 3), (24, 8, 11)])
def test_block_masks(
    pattern: Pattern, text: int, grid: int, kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's path without CUDA: a mask for another order of the states, a block left out."""
    monkeypatch.setattr(module, "BLOCK", 16)
    module._block_mask.cache_clear()
    monkeypatch.setattr(module, "_compiled", lambda pattern: flex_attention)
    n = text + grid * grid
    q, k, v = heads(n)
    expected = dense_attention(q, k, v, pattern, text, grid, kernel)
    blocks = module._block_mask(pattern, text, grid, kernel, "cpu")
    if pattern == "column":
        turned = (module.by_column(x, text, grid) for x in (q, k, v))
        y = module.by_column(module._on_cuda(*turned, pattern, blocks), text, grid)
    else:
        y = module._on_cuda(q, k, v, pattern, blocks)
    assert float((y - expected).abs().max()) <= 1e-5
    order = list(range(text))
    cells = [(r, c) for c in range(grid) for r in range(grid)]
    if pattern != "column":
        cells = sorted(cells)
    order += [text + r * grid + c for r, c in cells]
    mask = allowed(pattern, text, grid, kernel)[order][:, order]
    side = -(-n // 16)
    padded = F.pad(mask, (0, 16 * side - n, 0, 16 * side - n))
    touched = padded.view(side, 16, side, 16).any(dim=3).any(dim=1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), touched)
    module._block_mask.cache_clear()


def test_blocks_at_the_papers_size() -> None:
    """A column mask in raster order, which touches every block that causal attention touches."""
    causal = 10 * 11 // 2  # blocks of 128 x 128 of 1,280 positions
    for pattern, most in (("row", 34), ("column", 27), ("conv", 40)):
        blocks = module._block_mask(pattern, 256, 32, 11, "cpu")
        assert int(blocks.to_dense().sum()) <= most < causal, pattern


@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_memory_layout(pattern: Pattern) -> None:
    """Heads whose numbers do not lie side by side, read as if they did."""
    rest = (10, 6, 3)
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in heads(46))
    assert q.stride(-1) != 1
    expected = dense_attention(q, k, v, pattern, *rest)
    torch.testing.assert_close(sparse_attention(q, k, v, pattern, *rest), expected)


def test_masks_of_inference_serve_training() -> None:
    """Masks that are first made in inference mode and then refuse a backward pass."""
    module._block_mask.cache_clear()
    module._chunks.cache_clear()
    with torch.inference_mode():
        sparse_attention(*heads(46), "column", 10, 6, 3)
        blocks = module._block_mask("column", 10, 6, 3, "cpu")
    assert not blocks.kv_num_blocks.is_inference()
    q, k, v = (x.requires_grad_() for x in heads(46))
    sparse_attention(q, k, v, "column", 10, 6, 3).sum().backward()
    assert q.grad is not None


def test_the_whole_stream_alone() -> None:
    """A stream cut short that is run with the wrong grid."""
    q, k, v = heads(12)
    with pytest.raises(ValueError, match="whole stream of 14, got 12"):
        sparse_attention(q, k, v, "row", 5, 3, 3)


def test_what_pays() -> None:
    """A choice that sends float64, or the demo's small grid, through the blocks."""
    assert sparse_pays(torch.empty(1, 1280, 8), 8)
    assert not sparse_pays(torch.empty(1, 88, 8), 8)
    assert not sparse_pays(torch.empty(1, 1280, 8, dtype=torch.float64), 8)


def test_masks_stay_outside_of_compiled_graphs(
    make_transformer: TransformerMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention traced into the graph of a compiled block, which would make its masks anew."""
    traced: list[bool] = []

    def attend(q: Tensor, *arguments: Any) -> Tensor:
        traced.append(torch.compiler.is_compiling())
        return q

    monkeypatch.setattr(layers, "dense_attention", attend)
    attention = make_transformer(layers=1).layers[0].attention
    attention.compile(backend="eager")
    x = torch.randn(1, 22, attention.heads * attention.head_size)
    for _ in range(3):
        attention(x)
    assert traced == [False] * 3

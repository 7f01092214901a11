"""The attention patterns against masks written out, counts in closed form, and float64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from dalle1.tokenizer import padding_id
from dalle1.transformer.attention import dense_attention
from dalle1.transformer.masks import allowed, cache_length, image_allowed, step_keys
from dalle1.transformer.sequence import Pattern, layer_pattern

PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
TEXT, GRID, KERNEL = 6, 4, 3

# Appendix B.1 on a 4 x 4 grid: row q, column k, "1" where query q may read key k.
GOLDEN = {
    "row": """
        1000 0000 0000 0000
        1100 0000 0000 0000
        1110 0000 0000 0000
        1111 0000 0000 0000
        1111 1000 0000 0000
        0111 1100 0000 0000
        0011 1110 0000 0000
        0001 1111 0000 0000
        0000 1111 1000 0000
        0000 0111 1100 0000
        0000 0011 1110 0000
        0000 0001 1111 0000
        0000 0000 1111 1000
        0000 0000 0111 1100
        0000 0000 0011 1110
        0000 0000 0001 1111
    """,
    "column": """
        1000 0000 0000 0000
        0100 0000 0000 0000
        0010 0000 0000 0000
        0001 0000 0000 0000
        1000 1000 0000 0000
        0100 0100 0000 0000
        0010 0010 0000 0000
        0001 0001 0000 0000
        1000 1000 1000 0000
        0100 0100 0100 0000
        0010 0010 0010 0000
        0001 0001 0001 0000
        1000 1000 1000 1000
        0100 0100 0100 0100
        0010 0010 0010 0010
        0001 0001 0001 0001
    """,
    # Kernel 3: distances 0, 1 in the query's row and 3, 4, 5 in the row above, with wraparound.
    "conv": """
        1000 0000 0000 0000
        1100 0000 0000 0000
        0110 0000 0000 0000
        1011 0000 0000 0000
        1101 1000 0000 0000
        1110 1100 0000 0000
        0111 0110 0000 0000
        0011 1011 0000 0000
        0001 1101 1000 0000
        0000 1110 1100 0000
        0000 0111 0110 0000
        0000 0011 1011 0000
        0000 0001 1101 1000
        0000 0000 1110 1100
        0000 0000 0111 0110
        0000 0000 0011 1011
    """,
    "full": """
        1000 0000 0000 0000
        1100 0000 0000 0000
        1110 0000 0000 0000
        1111 0000 0000 0000
        1111 1000 0000 0000
        1111 1100 0000 0000
        1111 1110 0000 0000
        1111 1111 0000 0000
        1111 1111 1000 0000
        1111 1111 1100 0000
        1111 1111 1110 0000
        1111 1111 1111 0000
        1111 1111 1111 1000
        1111 1111 1111 1100
        1111 1111 1111 1110
        1111 1111 1111 1111
    """,
    # ruDALL-E v3, kernel 3: a window of rows and columns that ends at the image's edges.
    "conv_2d": """
        1000 0000 0000 0000
        1100 0000 0000 0000
        0110 0000 0000 0000
        0011 0000 0000 0000
        1100 1000 0000 0000
        1110 1100 0000 0000
        0111 0110 0000 0000
        0011 0011 0000 0000
        0000 1100 1000 0000
        0000 1110 1100 0000
        0000 0111 0110 0000
        0000 0011 0011 0000
        0000 0000 1100 1000
        0000 0000 1110 1100
        0000 0000 0111 0110
        0000 0000 0011 0011
    """,
    # ruDALL-E v2: the same, going on at the opposite edges, from the last row to the first too.
    "conv_torus": """
        1000 0000 0000 0000
        1100 0000 0000 0000
        0110 0000 0000 0000
        1011 0000 0000 0000
        1101 1000 0000 0000
        1110 1100 0000 0000
        0111 0110 0000 0000
        1011 1011 0000 0000
        0000 1101 1000 0000
        0000 1110 1100 0000
        0000 0111 0110 0000
        0000 1011 1011 0000
        1101 0000 1101 1000
        1110 0000 1110 1100
        0111 0000 0111 0110
        1011 0000 1011 1011
    """,
}


# The six text queries, the same in every pattern: text columns, then image columns.
GOLDEN_TEXT = """
    100000 0000 0000 0000 0000
    110000 0000 0000 0000 0000
    111000 0000 0000 0000 0000
    111100 0000 0000 0000 0000
    111110 0000 0000 0000 0000
    111111 0000 0000 0000 0000
"""


def parsed(rows: str) -> Tensor:
    lines = [line.replace(" ", "") for line in rows.split("\n") if line.strip()]
    return torch.tensor([[c == "1" for c in line] for line in lines])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_golden_masks(pattern: Pattern) -> None:
    """A pattern off by one, without wraparound, or whose row stops at the picture's edge."""
    mask = allowed(pattern, TEXT, GRID, KERNEL)
    n = TEXT + GRID * GRID
    assert mask.shape == (n, n) and mask.dtype == torch.bool
    assert torch.equal(mask[:TEXT], parsed(GOLDEN_TEXT))
    assert torch.equal(mask[TEXT:, :TEXT], torch.ones(16, 6, dtype=torch.bool))
    assert torch.equal(mask[TEXT:, TEXT:], parsed(GOLDEN[pattern]))
    if pattern == "conv":  # the paper's kernel reaches over all of so small a grid
        assert torch.equal(allowed("conv", TEXT, GRID), allowed("full", TEXT, GRID))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_text_part(pattern: Pattern) -> None:
    """Text that sees images or later text; image queries that miss a part of the caption."""
    mask = allowed(pattern, TEXT, GRID, KERNEL)
    assert torch.equal(mask[:TEXT, :TEXT], torch.ones(TEXT, TEXT).tril().bool())
    assert not bool(mask[:TEXT, TEXT:].any())
    assert bool(mask[TEXT:, :TEXT].all())


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("row", 528 + 992 * 33),  # 1 + ... + 32 in the first row, then 33 for each query
        ("column", 32 * 528),  # in each column 1 + ... + 32
        # Distances 0 ... 5 and, for a = 1 ... 5, 32 a - 5 ... 32 a + 5: each d fits 1024 - d times.
        ("conv", 61 * 1024 - 15 - 11 * 32 * 15),
        ("full", 1024 * 1025 // 2),
        # Half of all pairs, and the diagonal: 11 rows and columns each, fewer near the edges.
        ("conv_2d", ((32 * 11 - 2 * 15) ** 2 + 1024) // 2),
        ("conv_torus", ((32 * 11) ** 2 + 1024) // 2),
    ],
)
def test_counts_at_the_papers_size(pattern: Pattern, count: int) -> None:
    """A pattern that is right on a small grid alone; a kernel other than 11."""
    mask = allowed(pattern)
    assert mask.shape == (1280, 1280)
    assert int(mask[256:, 256:].sum()) == count
    assert int(mask.sum()) == 256 * 257 // 2 + 1024 * 256 + count


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("kernel", [1, 3, 11])
def test_formulas(pattern: Pattern, grid: int, kernel: int) -> None:
    """A mask that leaks the future or hides the query itself, at any grid or kernel."""
    n, h = grid * grid, kernel // 2
    reach = {grid * a + b for a in range(h + 1) for b in range(-h, h + 1)}
    rules = {
        "row": lambda q, k: q - k <= grid,
        "column": lambda q, k: q % grid == k % grid,
        "conv": lambda q, k: q - k in reach,
        "full": lambda q, k: True,
        "conv_2d": lambda q, k: all(abs(d) <= h for d in apart(q, k)),
        "conv_torus": lambda q, k: all(
            any((d + i) % grid == 0 for i in range(-h, h + 1)) for d in apart(q, k)
        ),
    }

    def apart(q: int, k: int) -> tuple[int, int]:
        return q // grid - k // grid, q % grid - k % grid

    expected = [[k <= q and rules[pattern](q, k) for k in range(n)] for q in range(n)]
    assert all(row[q] for q, row in enumerate(expected))
    assert allowed(pattern, 2, grid, kernel)[2:, 2:].tolist() == expected


def test_layer_patterns() -> None:
    """A sequence counted from 0, a column layer misplaced, a last layer that is not conv."""
    names = {"r": "row", "c": "column", "v": "conv"}
    sequence = "rcrrrcrrrcrv"
    assert [layer_pattern(i, 12) for i in range(1, 13)] == [names[c] for c in sequence]
    paper = [layer_pattern(i, 64) for i in range(1, 65)]
    assert paper.count("conv") == 1 and paper[63] == "conv"
    assert [i for i, p in enumerate(paper, 1) if p == "column"] == list(range(2, 64, 4))
    assert paper.count("row") == 64 - 1 - 16
    assert layer_pattern(1, 1) == "conv" and layer_pattern(2, 2) == "conv"
    assert [layer_pattern(i, 3, "full") for i in (1, 2, 3)] == ["full"] * 3
    for rule, conv in (("rudalle", "conv_2d"), ("rudalle_v2", "conv_torus")):
        for layers in (24, 64):  # Malevich, Kandinsky
            theirs = [
                "column" if (i - 1) % 4 == 0 else "row" if i < layers - 1 else conv
                for i in range(layers)
            ]
            ours = [layer_pattern(i, layers, rule) for i in range(1, layers + 1)]  # type: ignore[arg-type]
            assert ours == theirs
        assert layer_pattern(6, 6, rule) == "column"  # type: ignore[arg-type]
    for layer in (0, 13):
        with pytest.raises(ValueError, match=f"1 to 12, got {layer}"):
            layer_pattern(layer, 12)


def test_padding_ids() -> None:
    """A padding that falls into the vocabulary, or one for all positions."""
    assert [padding_id(16384, p) for p in (0, 1, 255)] == [16384, 16385, 16639]


def test_errors() -> None:
    """An unknown pattern that silently means full attention; an even kernel; an empty grid."""
    with pytest.raises(ValueError, match=r"row, column, conv, full, .*, got 'rows'"):
        allowed("rows")  # type: ignore[arg-type]
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="diagonal"):
        image_allowed("diagonal", zero, zero, 4, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="odd number, got 4"):
        allowed("conv", 6, 4, 4)
    with pytest.raises(ValueError, match="got 0 and 4"):
        allowed("row", 0, 4)
    with pytest.raises(ValueError, match="got 6 and 0"):
        allowed("row", 6, 0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid", [2, 5])
def test_step_keys_are_the_masks_rows(pattern: Pattern, grid: int) -> None:
    """A cached step that reads other keys than training did, or reads them in another order."""
    mask = allowed(pattern, 1, grid, KERNEL)[1:, 1:]
    keys = step_keys(pattern, grid, KERNEL)
    assert len(keys) == grid * grid
    for row, read in zip(mask.tolist(), keys, strict=True):
        assert read.tolist() == [k for k, allows in enumerate(row) if allows]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("grid", "kernel"), [(1, 3), (4, 3), (5, 3), (7, 11), (32, 11)])
def test_cache_length(pattern: Pattern, grid: int, kernel: int) -> None:
    """A ring one too short, which loses the oldest key, or longer than the pattern reaches."""
    keys = step_keys(pattern, grid, kernel)
    furthest = max(p - int(read[0]) for p, read in enumerate(keys))
    held = cache_length(pattern, grid, kernel)
    assert held == (grid * grid if pattern in ("column", "full") else furthest + 1)
    assert furthest < held


def test_cache_length_at_the_papers_size() -> None:
    """A row layer that holds the whole image; a conv layer that forgets the wraparound."""
    lengths = [cache_length(pattern, 32) for pattern in PATTERNS]
    conv = 5 * 32 + 5 + 1
    assert lengths == [33, 1024, conv, 1024, conv, 1024]


def heads(b: int, s: int, n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = 2 * torch.randn(3, b, s, n, d, generator=generator)
    return q, k, v


def restated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the allowed keys, one query at a time, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    for p in range(q.shape[2]):
        keys = mask[p].nonzero()[:, 0]
        scores = (q[:, :, p, None] * k[:, :, keys]).sum(dim=-1) / q.shape[-1] ** 0.5
        weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
        out[:, :, p] = (weights[..., None] * v[:, :, keys]).sum(dim=2)
    return out


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("n", [TEXT, TEXT + 1, TEXT + 7, TEXT + 16])
def test_dense_attention(pattern: Pattern, n: int) -> None:
    """A wrong scale, two softmaxes (text and image apart), a stream cut at the wrong end."""
    q, k, v = heads(2, 3, n, 8)
    mask = allowed(pattern, TEXT, GRID, KERNEL)[:n, :n]
    out = dense_attention(q, k, v, pattern, TEXT, GRID, KERNEL)
    torch.testing.assert_close(out.double(), restated(q, k, v, mask), rtol=1e-4, atol=1e-5)


def test_mask_of_inference_serves_training() -> None:
    """A mask cached in inference mode that a later backward pass cannot use."""
    with torch.inference_mode():
        q, k, v = heads(1, 1, 5, 4)
        dense_attention(q, k, v, "column", 2, 3, 5)
    q, k, v = (x.requires_grad_() for x in heads(1, 1, 5, 4))
    dense_attention(q, k, v, "column", 2, 3, 5).sum().backward()
    assert q.grad is not None and bool(q.grad.isfinite().all())

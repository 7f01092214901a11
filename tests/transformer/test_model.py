"""The transformer: its stream, its targets, its loss, and a float64 re-statement of it all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle1 import Transformer, TransformerConfig
from dalle1.transformer.config import Execution
from dalle1.transformer.masks import allowed
from dalle1.transformer.sequence import layer_pattern
from dalle1.transformer.tokens import text_targets
from tests.conftest import TransformerMaker

# The fixture's shape: 11 text tokens at 6 positions, 9 image tokens on a 4 x 4 grid.
TEXT, TEXT_VOCAB, IMAGE, IMAGE_VOCAB = 6, 11, 16, 9


def tokens(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Captions without padding, images without a gap."""
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(1, TEXT_VOCAB, (batch, TEXT), generator=g)
    return text, torch.randint(IMAGE_VOCAB, (batch, IMAGE), generator=g)


def padded(*captions: list[int]) -> Tensor:
    return torch.tensor([ids + [TEXT_VOCAB + p for p in range(len(ids), TEXT)] for ids in captions])


def changed(before: Tensor, after: Tensor) -> list[bool]:
    """Which positions [b, n, v] differ by more than rounding."""
    return ((before - after).abs().amax(dim=(0, 2)) > 1e-5).tolist()


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_image_shift(make_transformer: TransformerMaker, layers: int) -> None:
    """A position that sees the token it predicts, or a token that is fed too late."""
    transformer = make_transformer(layers=layers)
    text, image = tokens(1)
    with torch.no_grad():
        text_logits, image_logits = transformer(text, image)
        for j in range(IMAGE):
            other = image.clone()
            other[0, j] = (other[0, j] + 1) % IMAGE_VOCAB
            text_after, image_after = transformer(text, other)
            assert torch.equal(text_logits, text_after)  # text never sees the image
            moved = changed(image_logits, image_after)
            assert not any(moved[: j + 1]), j
            if layers == 6:
                assert all(moved[j + 1 :]), j
            elif j + 1 < IMAGE:
                assert moved[j + 1], j


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_text_shift(make_transformer: TransformerMaker, layers: int) -> None:
    """Text that sees itself, images that miss a text token; the last token is a target only."""
    transformer = make_transformer(layers=layers)
    text, image = tokens(1)
    with torch.no_grad():
        text_logits, image_logits = transformer(text, image)
        for j in range(TEXT):
            other = text.clone()
            other[0, j] = other[0, j] % (TEXT_VOCAB - 1) + 1
            text_after, image_after = transformer(other, image)
            moved = changed(text_logits, text_after)
            assert moved == [p > j for p in range(TEXT)], j
            assert changed(image_logits, image_after) == [j < TEXT - 1] * IMAGE, j


def test_batch_rows_do_not_mix(make_transformer: TransformerMaker) -> None:
    """A caption or an image that reaches another row of the batch."""
    transformer = make_transformer()
    text, image = tokens(3)
    with torch.no_grad():
        together = transformer(text, image)
        for i in range(3):
            alone = transformer(text[i : i + 1], image[i : i + 1])
            for a, b in zip(alone, together, strict=True):
                torch.testing.assert_close(a[0], b[i], rtol=1e-4, atol=1e-5)


def restated(transformer: Transformer, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Sections 2.2 and B.1 in float64, one sample, head and query at a time."""
    c = transformer.config
    w = {key: value.double() for key, value in transformer.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        centered = x - x.mean(dim=-1, keepdim=True)
        scale = (centered.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return centered / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]

    states = [w["start_of_text"], *(w["text_embedding.weight"][t] for t in text[:-1])]
    states = [x + w["text_position.weight"][p] for p, x in enumerate(states)]
    fed = [w["start_of_image"], *(w["image_embedding.weight"][z] for z in image[:-1])]
    for p, x in enumerate(fed):
        row, column = w["row_position.weight"][p // c.grid], w["column_position.weight"]
        states.append(x + row + column[p % c.grid])
    x = torch.stack(states)  # [n, w]
    for i in range(c.layers):
        mask = allowed(layer_pattern(i + 1, c.layers), c.text_length, c.grid, c.conv_kernel)
        y = linear(norm(x, f"layers.{i}.attention.norm"), f"layers.{i}.attention.qkv")
        q, k, v = y[:, : c.width], y[:, c.width : 2 * c.width], y[:, 2 * c.width :]
        out = torch.zeros_like(x)
        for h in range(c.heads):
            part = slice(h * c.head_size, (h + 1) * c.head_size)
            for p in range(len(x)):
                keys = mask[p, : len(x)].nonzero()[:, 0]
                scores = k[keys, part] @ q[p, part] / math.sqrt(c.head_size)
                out[p, part] = scores.softmax(dim=0) @ v[keys, part]
        x = x + linear(out, f"layers.{i}.attention.out")
        y = linear(norm(x, f"layers.{i}.mlp.norm"), f"layers.{i}.mlp.up")
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + linear(y, f"layers.{i}.mlp.down")
    x = norm(x, "norm")
    return linear(x[: c.text_length], "text_head"), linear(x[c.text_length :], "image_head")


@pytest.mark.parametrize("layers", [1, 3, 7])
def test_forward_against_restatement(make_transformer: TransformerMaker, layers: int) -> None:
    """Rows and columns exchanged, post-norm, heads split the wrong way, a shift by one."""
    transformer = make_transformer(layers=layers)
    text, image = padded([3, 1, 4]), tokens(1)[1]
    with torch.no_grad():
        text_logits, image_logits = transformer(text, image)
        expected = restated(transformer, text[0], image[0])
    torch.testing.assert_close(text_logits[0].double(), expected[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(image_logits[0].double(), expected[1], rtol=1e-3, atol=1e-4)


def test_padding_is_not_token_zero(make_transformer: TransformerMaker) -> None:
    """Padding confused with token 0, or masked so that its embedding has no effect."""
    transformer = make_transformer()
    image = tokens(1)[1]
    short, zero = padded([5, 7]), padded([5, 7, 0])
    with torch.no_grad():
        assert all(changed(transformer(short, image)[1], transformer(zero, image)[1]))


def test_each_position_has_its_padding(make_transformer: TransformerMaker) -> None:
    """One padding embedding for all positions: each id must matter at its position alone."""
    image = tokens(1)[1]
    for p in range(1, TEXT):
        transformer = make_transformer()
        short, long = padded([4] * p), padded([4] * min(p + 1, TEXT))
        with torch.no_grad():
            before = transformer(short, image)[1], transformer(long, image)[1]
            transformer.text_embedding.weight[TEXT_VOCAB + p] += torch.randn(16)
            after = transformer(short, image)[1], transformer(long, image)[1]
        # The last position's padding is never fed: its target is, and nothing comes behind it.
        assert changed(before[0], after[0]) == [p < TEXT - 1] * IMAGE, p
        assert torch.equal(before[1], after[1]), p


def test_text_targets() -> None:
    """Padding that is a target, an end that is missing, a caption's own 0 that is dropped."""
    end, no = 0, -100
    text = padded([5, 7], [1, 2, 3, 4, 5], [9], [3, 0, 3])
    config, image = TransformerConfig(text_vocab=TEXT_VOCAB, text_length=TEXT), tokens(4)[1]
    assert text_targets(config, text, image).tolist() == [
        [5, 7, end, no, no, no],
        [1, 2, 3, 4, 5, end],
        [9, end, no, no, no, no],
        [3, 0, 3, end, no, no],
    ]
    full = torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert torch.equal(text_targets(config, full, image[:1]), full)


def test_loss_by_hand(make_transformer: TransformerMaker) -> None:
    """Weights exchanged, means of means for each caption, padding counted in the divisor."""
    transformer = make_transformer()
    text = padded([5], [1, 2, 3, 4, 5])  # 2 and 6 targets
    image = tokens(2)[1]
    with torch.no_grad():
        losses = transformer.loss(text, image)
        text_logits, image_logits = (x.double().numpy() for x in transformer(text, image))

    def cost(logits: np.ndarray, target: int) -> float:
        return float(np.log(np.exp(logits).sum()) - logits[target])

    targets = [[5, 0], [1, 2, 3, 4, 5, 0]]
    text_costs = [
        cost(text_logits[i, p], t) for i, row in enumerate(targets) for p, t in enumerate(row)
    ]
    image_costs = [
        cost(image_logits[i, p], int(image[i, p])) for i in range(2) for p in range(IMAGE)
    ]
    assert (len(text_costs), len(image_costs)) == (8, 32)
    text_loss, image_loss = sum(text_costs) / 8, sum(image_costs) / 32
    assert losses.text.item() == pytest.approx(text_loss, rel=1e-5)
    assert losses.image.item() == pytest.approx(image_loss, rel=1e-5)
    assert losses.loss.item() == pytest.approx(text_loss / 8 + image_loss * 7 / 8, rel=1e-5)


def test_loss_weight(make_transformer: TransformerMaker) -> None:
    """A loss weight in the config that does nothing."""
    transformer = make_transformer(text_loss_weight=0.25)
    with torch.no_grad():
        losses = transformer.loss(*tokens(2))
    expected = 0.25 * losses.text.item() + 0.75 * losses.image.item()
    assert losses.loss.item() == pytest.approx(expected, rel=1e-6)


def test_every_parameter_learns(make_transformer: TransformerMaker) -> None:
    """A parameter that is built but not used, or a gradient that is not finite."""
    transformer = make_transformer()
    transformer.loss(padded([1, 2], [3, 4, 5, 6, 7]), tokens(2)[1]).loss.backward()
    for name, parameter in transformer.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
        assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize(("given", "positions"), [(0, 1), (1, 1), (5, 5), (16, 16)])
def test_logits_shapes(make_transformer: TransformerMaker, given: int, positions: int) -> None:
    """An image cut short that gives other logits than the whole one; none that fails."""
    transformer = make_transformer()
    text, image = tokens(2)
    with torch.no_grad():
        text_logits, image_logits = transformer(text, image[:, :given])
        whole = transformer(text, image)
    assert text_logits.shape == (2, TEXT, TEXT_VOCAB)
    assert image_logits.shape == (2, positions, IMAGE_VOCAB)
    torch.testing.assert_close(text_logits, whole[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(image_logits, whole[1][:, :positions], rtol=1e-4, atol=1e-5)


def test_logits_are_in_32_bits(make_transformer: TransformerMaker) -> None:
    """Logits in 16 bits, whose softmax loses the tail (section 2.4)."""
    transformer = make_transformer().bfloat16()
    for logits in transformer(*tokens(1)):
        assert logits.dtype == torch.float32


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize(("layers", "grid"), [(1, 5), (7, 5), (3, 6)])
def test_nothing_is_seen_too_early(
    make_transformer: TransformerMaker, attention: Any, layers: int, grid: int
) -> None:
    """A leak that only the whole stack shows, at sizes that no chunk divides: a token may change
    later positions alone, and exactly those that a path of allowed keys leads to."""
    plain = make_transformer(layers=layers, grid=grid)
    transformer = Transformer(plain.config, Execution(attention=attention)).eval()
    transformer.load_state_dict(plain.state_dict())
    n = TEXT + grid * grid
    reach = torch.eye(n, dtype=torch.bool)  # [query, key]: a path through the layers so far
    for i in range(layers):
        step = allowed(layer_pattern(i + 1, layers), TEXT, grid, 3)
        reach = (step.float() @ reach.float()) > 0
    g = torch.Generator().manual_seed(5)
    text, image = tokens(1)[0], torch.randint(IMAGE_VOCAB, (1, grid * grid), generator=g)
    with torch.no_grad():
        before = transformer(text, image)
        for j in range(n):
            changed_text, changed_image = text.clone(), image.clone()
            if j < TEXT:
                changed_text[0, j] = text[0, j] % (TEXT_VOCAB - 1) + 1
            else:
                changed_image[0, j - TEXT] = (image[0, j - TEXT] + 1) % IMAGE_VOCAB
            after = transformer(changed_text, changed_image)
            moved = changed(before[0], after[0]) + changed(before[1], after[1])
            # Token j is fed at position j + 1 of its segment; the last of a segment never is.
            fed = j + 1 not in (TEXT, n)
            expected = reach[:, j + 1].tolist() if fed else [False] * n
            assert moved == expected, j


EXECUTIONS = [
    Execution(attention="dense"),
    Execution(attention="sparse"),
    Execution(attention="sparse", checkpointing=True),
    pytest.param(Execution(attention="sparse", compile=True), marks=pytest.mark.slow),
    pytest.param(Execution(checkpointing=True, compile=True), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
def test_executions_agree(make_transformer: TransformerMaker, execution: Execution) -> None:
    """An option that changes losses or gradients, or weights' names."""
    plain = make_transformer(layers=6, grid=6)
    other = Transformer(plain.config, execution)
    other.load_state_dict(plain.state_dict())
    g = torch.Generator().manual_seed(3)
    image = torch.randint(IMAGE_VOCAB, (2, 36), generator=g)
    text = padded([5], [1, 2, 3, 4, 5])
    losses = []
    for transformer in (plain, other):
        loss = transformer.train().loss(text, image).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():  # an image cut short, as in evaluation
        for a, b in zip(plain(text, image[:, :9]), other(text, image[:, :9]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_checkpointing_keeps_less(make_transformer: TransformerMaker) -> None:
    """A flag that does nothing: only the blocks' inputs may wait for the backward pass."""
    config = make_transformer(layers=6).config
    kept = []
    for checkpointing in (False, True):
        transformer = Transformer(config, Execution(checkpointing=checkpointing))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.numel()) or x,  # type: ignore[misc]
            lambda x: x,
        ):
            transformer.loss(*tokens(2))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


def test_papers_size() -> None:
    """A default that is not the paper's 12 billion; a head or table of another shape."""
    with torch.device("meta"):
        transformer = Transformer()
    count = sum(p.numel() for p in transformer.parameters())
    assert 12.0e9 < count < 12.4e9
    d, layers = 3968, 64
    block = 12 * d * d + 13 * d  # attention 4 d^2 + 4 d, MLP 8 d^2 + 5 d, two norms of 2 d
    tables = (16384 + 256) + 256 + 8192 + 32 + 32 + 2  # tokens, positions, starts
    heads = (16384 + 8192) * (d + 1)
    assert count == layers * block + tables * d + 2 * d + heads
    with torch.device("meta"):
        small = Transformer(TransformerConfig(width=1920, heads=30))
    assert 2.7e9 < sum(p.numel() for p in small.parameters()) < 3.0e9


def test_initialization() -> None:
    """A map that starts at torch's default, or residual maps without 1 / sqrt(2 L)."""
    torch.manual_seed(0)
    config = TransformerConfig(
        width=64, heads=4, head_size=16, layers=8, text_vocab=50, text_length=8, grid=8,
        image_vocab=60,
    )  # fmt: skip
    for name, w in Transformer(config).named_parameters():
        if name.endswith("bias"):
            assert not w.any(), name
        elif "norm" in name:
            assert bool((w == 1).all()), name
        else:
            ends = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / 4 if ends else 0.02
            assert abs(w.std().item() - std) < 5 * std / math.sqrt(2 * w.numel()), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 4000}, "62 x 64 = 3968, got 4000"),
        ({"conv_kernel": 4}, "odd, got 4"),
        ({"layers": 0}, "layers"),
        ({"text_loss_weight": 1.5}, "text_loss_weight"),
        ({"depth": 3}, "depth"),
    ],
)
def test_config_errors(changes: dict[str, Any], message: str) -> None:
    """A config that does not fit, or an unknown setting that is swallowed."""
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**changes)


@pytest.mark.parametrize(
    ("text", "image", "message"),
    [
        (torch.full((1, 6), 11 + 3), None, "padding 11 \\+ p; got 14"),  # of another position
        (torch.full((1, 6), 17), None, "got 17"),
        (torch.full((1, 6), -1), None, "got -1"),
        (torch.ones(1, 5, dtype=torch.int64), None, "expected 6 positions.*got 5"),
        (torch.ones(1, 6), None, "text_tokens: expected int64.*float32"),
        (torch.ones(6, dtype=torch.int64), None, r"text_tokens.*\[6\]"),
        (torch.ones(2, 6, dtype=torch.int64), None, "differ in batch: 2 and 1"),
        (None, torch.full((1, 3), 9), r"\[0, 8\], got \[9, 9\]"),
        (None, torch.tensor([[3, -1]]), r"\[0, 8\], got \[-1, 3\]"),
        (None, torch.zeros(1, 17, dtype=torch.int64), "at most 16 positions, got 17"),
        (None, torch.zeros(1, 4, 4, dtype=torch.int64), r"image_tokens.*\[1, 4, 4\]"),
        (None, torch.zeros(1, 4, dtype=torch.int32), "image_tokens.*int32"),
    ],
)
def test_token_errors(
    make_transformer: TransformerMaker, text: Tensor | None, image: Tensor | None, message: str
) -> None:
    """A token outside its vocabulary, or a padding of another position, that is embedded."""
    right = tokens(1)
    with pytest.raises(ValueError, match=message):
        make_transformer()(right[0] if text is None else text, right[1] if image is None else image)

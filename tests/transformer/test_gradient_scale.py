"""Per-block gradient scales: the same gradients as without, in a range that 16 bits hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dalle1.transformer.config import Execution, TransformerConfig
from dalle1.transformer.gradient_scale import (
    FIRST,
    GROWTH,
    HIGHEST,
    LOWEST,
    PATIENCE,
    GradientScale,
    finite,
    load_scales,
    scales_state,
)
from dalle1.transformer.layers import Layer
from dalle1.transformer.model import Transformer

CONFIG = TransformerConfig(
    width=32, heads=2, head_size=16, layers=4, grid=4, text_length=6, text_vocab=20,
    image_vocab=20, conv_kernel=3, init_std=0.15,
)  # fmt: skip
TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of a gradient's norm
NARROW = pytest.mark.parametrize("dtype", list(TOLERANCES))


class Path(nn.Module):
    """A residual path with gains, biases and two maps."""

    def __init__(self, width: int, std: float = 0.3) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        for part in (self.up, self.down):
            nn.init.normal_(part.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return y


class Stack(nn.Module):
    """Residual blocks, with scales or without."""

    def __init__(self, blocks: int = 3, width: int = 8, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.paths = [Path(width) for _ in range(blocks)]
        self.parts = nn.ModuleList(self.paths)
        self.scales = [GradientScale(p, dtype=dtype) for p in self.paths] if dtype else []
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for i, path in enumerate(self.paths):
            if not self.scales:
                x = x + path(x)
            elif self.checkpointing:
                x = x + checkpoint(self.scales[i].run, path, x, use_reentrant=False)
            else:
                x = x + self.scales[i].run(path, x)
        return x


def gradients(model: nn.Module, weights: Tensor, x: Tensor) -> list[Tensor]:
    """Of the states that went in, and of all parameters."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    (model(x) * weights).sum().backward()
    found = [x.grad, *(p.grad for p in model.parameters())]
    assert all(g is not None and g.dtype == torch.float32 for g in found)
    return [g.double() for g in found if g is not None]


def farthest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest distance of a tensor, in its norm."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


@NARROW
def test_gradients_are_those_without_scales(dtype: torch.dtype) -> None:
    """A scale that is left in a gradient, or taken out twice; an identity path in 16 bits."""
    x, weights = torch.randn(5, 8), 1e-3 * torch.randn(5, 8)
    plain, model = Stack(), Stack(dtype=dtype)
    for i, scale in enumerate(model.scales):
        scale.value *= 2.0**i  # each its own
    assert model(x).dtype == torch.float32
    expected = gradients(plain, weights, x)
    assert farthest(gradients(model, weights, x), expected) < TOLERANCES[dtype]
    # 1 + 2^-13 is 1 in float16 and in bfloat16.
    fine = torch.full((1, 8), 2.0**-13, requires_grad=True)
    for path in model.paths:
        nn.init.zeros_(path.down.weight)
        nn.init.zeros_(path.down.bias)
    y = model(1 + fine)
    assert torch.equal(y, (1 + fine).detach())
    (y * (1 + 2.0**-13)).sum().backward()
    assert fine.grad is not None and torch.equal(fine.grad, torch.full((1, 8), 1 + 2.0**-13))


def test_norms_compute_in_32_bits() -> None:
    """States that a norm reads after they were rounded to 16 bits."""
    model = Stack(1, dtype=torch.float16)
    seen = []
    (path,), (scale,) = model.paths, model.scales
    path.norm.register_forward_hook(lambda _, given, out: seen.append((given[0].dtype, out.dtype)))
    path.up.register_forward_hook(lambda _, given, out: seen.append(out.dtype))
    scale.run(path, torch.randn(5, 8))
    assert seen == [(torch.float32, torch.float32), torch.float16]


def test_workers_share_the_scale() -> None:
    """The paper's scale M x 2^13 is for a loss divided by the whole batch; each of our M workers
    divides by its own share, whose gradients would overflow M times as early."""
    for workers in (1, 64):
        path = Path(8)
        scale, y = GradientScale(path, workers), torch.empty(0)

        def keep(_: nn.Module, __: object, out: Tensor) -> None:
            nonlocal y
            y = out
            y.retain_grad()

        path.down.register_forward_hook(keep)
        scale.run(path, torch.randn(5, 8)).backward(torch.full((5, 8), 2.0**-10))
        assert y.dtype == torch.float16 and y.grad is not None
        assert y.grad.unique().tolist() == [2.0**3]
        assert path.down.bias.grad is not None
        assert path.down.bias.grad.tolist() == [5 * 2.0**-10] * 8


def test_small_gradients_survive() -> None:
    """Gradients below the range of float16, which a block without a scale rounds to zero."""
    x, weights = torch.randn(5, 8), torch.full((5, 8), 1e-9)
    expected = gradients(Stack(1), weights, x)
    model = Stack(1, dtype=torch.float16)
    model.scales[0].value = 2.0**24
    assert farthest(gradients(model, weights, x), expected) < 0.02
    model.scales[0].value = 1.0
    assert all(float(g.abs().max()) == 0 for g in gradients(model, weights, x)[1:])


def test_filter() -> None:
    """A value that is not finite, let through to the blocks before or to the identity path."""
    numbers = torch.tensor([1.0, math.nan, math.inf, -math.inf, -2.0])
    assert finite(numbers).tolist() == [1.0, 0.0, 0.0, 0.0, -2.0]
    weights = torch.ones(5, 8)
    weights[0, 0] = 1e6  # times the scale beyond 65,504
    model = Stack(dtype=torch.float16)
    x, *_ = gradients(model, weights, torch.randn(5, 8))
    assert bool(x.isfinite().all())
    # The identity path is in 32 bits: the large value itself comes through.
    assert float(x[0, 0]) == pytest.approx(1e6, rel=1e-2)
    # The block that it is filtered out of goes on with all the others, and is not broken.
    one = Stack(1, dtype=torch.float16)
    x = torch.randn(5, 8)
    found = gradients(one, weights, x)[1:]
    assert not one.scales[0].take_broken()
    weights[0, 0] = 0.0
    assert farthest(found, gradients(one, weights, x)[1:]) == 0
    # Sums inside of the last block overflow, though all that goes in is finite.
    model = Stack(dtype=torch.float16)
    for scale, exponent in zip(model.scales, (7, 7, 15), strict=True):
        scale.value = 2.0**exponent
    x, *_ = gradients(model, torch.full((5, 8), 1.9), torch.randn(5, 8))
    assert bool(x.isfinite().all())
    assert [scale.take_broken() for scale in model.scales] == [False, False, True]


@pytest.mark.parametrize("workers", [1, 8])
def test_scales_follow_the_rules(workers: int) -> None:
    """A scale that grows after a broken update, falls twice at once, or leaves its bounds."""
    scale = GradientScale(Path(4), workers)
    assert scale.value == workers * FIRST == workers * 2.0**13
    scale.update(False)
    assert scale.value == pytest.approx(workers * FIRST * 2 ** (1 / 1000))
    assert pytest.approx(2) == GROWTH**1000
    for _ in range(2):
        before = scale.value
        scale.update(True)
        assert scale.value == pytest.approx(before / math.sqrt(2))
        before = scale.value
        for _ in range(PATIENCE - 1):  # broken again and again: skipped, but not divided
            scale.update(True)
            assert scale.value == before
    assert PATIENCE == 125
    before = scale.value
    for _ in range(3):  # growth does not wait
        scale.rest = PATIENCE
        scale.update(False)
    assert scale.value == pytest.approx(before * GROWTH**3)
    scale.value = workers * HIGHEST
    scale.update(False)
    assert scale.value == workers * HIGHEST == workers * 2.0**24
    scale.value, scale.rest = workers * LOWEST, 0
    scale.update(True)
    assert scale.value == workers * LOWEST == workers * 2.0**7


@pytest.mark.parametrize("checkpointing", [False, True])
def test_broken_gradients_are_noticed(checkpointing: bool) -> None:
    """An update of infinite gradients, or one skipped for another block's sake without a word."""
    x, model = torch.randn(5, 8), Stack(2, dtype=torch.float16)
    model.checkpointing = checkpointing
    first, second = model.scales
    (1e-3 * model(x)).sum().backward()
    assert not first.take_broken() and not second.take_broken()
    first.value, second.value = 2.0**7, 2.0**24  # 2e-3 times 2^24 still fits, the sums do not
    (2e-3 * model(x)).sum().backward()
    fine = [
        all(p.grad is not None and bool(p.grad.isfinite().all()) for p in path.parameters())
        for path in model.paths
    ]
    assert fine == [True, False]
    (1e-9 * model(x)).sum().backward()  # an update's later passes do not wipe it out
    assert not first.take_broken() and second.take_broken()
    assert not first.take_broken() and not second.take_broken()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("gradient", "value", "broken"),
    [
        (1e-3, 2.0**13, False),
        (100.0, 2.0**13, True),  # 819,200 where 65,504 is the largest
        (3.0, 2.0**24, True),
        (6e4, 2.0**7, True),
        (-100.0, 2.0**13, True),
        (1e6, 2.0**13, False),  # beyond float16 without the scale too
        (math.inf, 2.0**13, False),
        (math.nan, 2.0**24, False),
    ],
)
def test_overflow_by_the_own_scale_is_noticed(
    gradient: float, value: float, broken: bool, checkpointing: bool
) -> None:
    """A gradient that the block's own scale makes too large is zeroed and nobody hears of it, so
    that the scale grows on and on; or one that was handed down makes the scale fall."""
    torch.manual_seed(1)
    model = Stack(1, dtype=torch.float16)
    model.checkpointing = checkpointing
    scale, weights = model.scales[0], torch.zeros(5, 8)
    weights[2, 3], scale.value = gradient, value
    with torch.no_grad():  # small weights, so that the sums inside do not overflow
        for parameter in model.paths[0].parameters():
            parameter.mul_(1e-3)
    x = torch.randn(5, 8).requires_grad_()
    model(x).backward(weights)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert scale.take_broken() == broken


@pytest.mark.parametrize("frozen", [False, True])
def test_overflow_inside_a_block_is_noticed(frozen: bool) -> None:
    """A block without trained weights whose overflow cuts all blocks below off in silence."""
    model = Stack(1, dtype=torch.float16)
    path, scale = model.paths[0], model.scales[0]
    nn.init.constant_(path.down.weight, 30.0)  # sums of 8 x 30 x 1,024 are beyond 65,504
    scale.value = 2.0**10
    if frozen:
        path.requires_grad_(False)
        scale = model.scales[0] = GradientScale(path)
        scale.value = 2.0**10
    x = torch.randn(5, 8).requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    assert scale.take_broken()


@pytest.mark.parametrize("workers", [1, 8])
def test_lowest_scale_is_told(workers: int) -> None:
    """A scale at its lower bound that goes on skipping updates without end or word."""
    scale = GradientScale(Path(4), workers)
    told = [scale.update(True) for _ in range(14 * PATIENCE)]
    # 13 divisions by the root of 2 lead from 2^13 to below 2^7; the next is due 125 updates later.
    assert told.index(True) == 12 * PATIENCE and sum(told) == 2
    assert scale.value == workers * LOWEST
    scale.update(False)
    scale.rest = 0
    assert not scale.update(True)  # it had grown again, and is divided


@NARROW
def test_checkpointing_changes_nothing(dtype: torch.dtype) -> None:
    """Recomputation with another scale, in another type, or whose gradients are unscaled twice."""
    x, weights, model = torch.randn(5, 8), 1e-3 * torch.randn(5, 8), Stack(dtype=dtype)
    for i, scale in enumerate(model.scales):
        scale.value *= 2.0**i
    straight = gradients(model, weights, x)
    model.checkpointing = True
    assert farthest(gradients(model, weights, x), straight) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hooks_see_each_gradient_once(checkpointing: bool) -> None:
    """A gradient that is divided by the scale in parts and then again as a sum."""
    model, calls = Transformer(CONFIG, Execution(checkpointing=checkpointing), seed=0), 0

    def count(_: Tensor) -> None:
        nonlocal calls
        calls += 1

    weights = [p for layer in model.layers for p in layer.parameters()]
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.scale_gradients(1)
    for weight in weights:
        weight.register_hook(count)
    for passes in (1, 2):
        model.loss(*tokens()).loss.backward()
        assert calls == passes * len(weights)


def test_weights_and_gradients_stay_in_32_bits() -> None:
    """Weights, moments or gradients in 16 bits, or scales among the weights."""
    model = Stack(dtype=torch.float16)
    model(torch.randn(5, 8)).sum().backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert model.state_dict().keys() == Stack().state_dict().keys()


def test_state_of_another_number_of_workers() -> None:
    """Scales that a resumed run takes M times too large, or a division that comes too early."""
    saved = [GradientScale(Path(4), 8) for _ in range(3)]
    saved[1].update(True)
    saved[2].update(False)
    state = scales_state(saved)
    assert state[1] == [pytest.approx(FIRST / math.sqrt(2)), PATIENCE]
    for workers in (1, 8, 32):
        loaded = [GradientScale(Path(4), workers) for _ in range(3)]
        load_scales(loaded, state)
        assert [s.value * 8 / workers for s in loaded] == pytest.approx([s.value for s in saved])
        assert [s.rest for s in loaded] == [0, PATIENCE, 0]
        loaded[1].update(True)
        assert scales_state(loaded)[1] == [state[1][0], PATIENCE - 1]
    with pytest.raises(ValueError):
        load_scales(saved[:2], state)


def tokens() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    text = torch.randint(1, CONFIG.text_vocab, (2, CONFIG.text_length), generator=made)
    text[:, 4:] = CONFIG.text_vocab + torch.arange(4, CONFIG.text_length)
    return text, torch.randint(CONFIG.image_vocab, (2, 16), generator=made)


@pytest.mark.parametrize(("scaled", "checkpointing"), [(True, False), (True, True), (False, True)])
def test_transformer(scaled: bool, checkpointing: bool) -> None:
    """Blocks of a transformer whose scales are swapped, or which stay in 32 bits."""
    wide = Transformer(CONFIG, seed=0)
    narrow = Transformer(CONFIG, Execution(checkpointing=checkpointing), seed=0)
    scales = []
    for i, layer in enumerate(narrow.layers):
        assert isinstance(layer, Layer)
        if scaled:
            scales += layer.scale_gradients(1)
            scales[-2].value, scales[-1].value = 2.0 ** (10 + i), 2.0 ** (13 - i)
        else:
            layer.narrow = torch.bfloat16
    losses = [model.loss(*tokens()).loss for model in (wide, narrow)]
    for loss in losses:
        loss.backward()
    assert float(losses[0].detach()) != float(losses[1].detach())
    tolerance = TOLERANCES[torch.float16 if scaled else torch.bfloat16]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=tolerance / 10)
    found, expected = [
        [p.grad for p in model.parameters() if p.grad is not None] for model in (narrow, wide)
    ]
    assert farthest(found, [g.double() for g in expected]) < tolerance
    assert {g.dtype for g in found} == {torch.float32}
    assert not any(scale.take_broken() for scale in scales)

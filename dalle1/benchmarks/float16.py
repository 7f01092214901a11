"""float16 with one loss scale and with one scale for each residual block (paper section 2.4).

A deep narrow transformer trains in real float16 on gradients that span more than float16 holds. A
narrow model's own gradients do not, so the span is planted: on the way back the identity path is
multiplied by one factor at each layer. AdamW does not see the size of a gradient, so that in 32
bits nothing changes, and what does change in 16 is the format's doing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle1.evaluation.plots import Figure
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.gradient_scale import GradientScale
from dalle1.transformer.layers import Layer
from dalle1.transformer.model import Transformer

FLOAT32 = "float32"
STREAM16 = "one scale, 16-bit identity path"
STREAM32 = "one scale, 32-bit identity path"
BLOCKS = "a scale for each block"
WAYS = {FLOAT32: "black", STREAM16: "tab:red", STREAM32: "tab:orange", BLOCKS: "tab:blue"}

# All rules of moving scales run so many times as fast, since a run here is short: growth and
# patience of the blocks' scales, and the updates after which GradScaler doubles its one.
CLOCK = 25
FIRST, INTERVAL = 2.0**16, 2000  # GradScaler's own
ABOVE = 3  # of the planted span in powers of two, above 1; the rest is below
HEAD, BATCH, WARM_UP, LEARNING_RATE = 16, 4, 30, 3e-3
# AdamW's epsilon: below all gradients, else it sees their size. Its square need not be a number.
EPSILON = 1e-20
COUNTS = 20  # updates at the end over which zeros are averaged


@dataclass
class Run:
    """What one way of training gave; blocks go from the first to the last."""

    losses: list[float] = field(default_factory=list)  # by update, nats an image token
    scales: list[list[float]] = field(default_factory=list)  # by update, log2 of all there are
    zeros: list[list[float]] = field(default_factory=list)  # shares by block, of the last updates
    skipped: int = 0
    seconds: float = 0.0
    sizes: list[float] = field(default_factory=list)  # median gradient that enters each block

    def loss(self) -> float:
        """Mean of the last tenth."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)

    def underflow(self) -> list[float]:
        """Mean share of zeros by block at the end."""
        return [sum(shares) / len(self.zeros) for shares in zip(*self.zeros, strict=True)]


class _Slope(torch.autograd.Function):
    """Nothing forward; backward the gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def _slope(x: Tensor, factor: float) -> Tensor:
    y: Tensor = _Slope.apply(x, factor)  # type: ignore[no-untyped-call]
    return y


def tiny(layers: int, width: int) -> TransformerConfig:
    """A transformer of this depth and width over 5 text and 16 image positions."""
    return TransformerConfig(
        width=width, heads=max(1, width // HEAD), head_size=min(width, HEAD), layers=layers, grid=4,
        text_length=5, text_vocab=32, image_vocab=32, conv_kernel=3, init_std=0.1,
    )  # fmt: skip


def draw_batch(c: TransformerConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Captions of random words, and images whose row r spells word r in a fixed code."""
    made = torch.Generator().manual_seed(seed)
    words = torch.randint(1, c.text_vocab, (BATCH, c.grid), generator=made)
    padding = torch.full((BATCH, 1), c.text_vocab + c.text_length - 1)
    code = torch.randint(
        c.image_vocab, (c.text_vocab, c.grid), generator=torch.Generator().manual_seed(0)
    )
    return torch.cat([words, padding], dim=1), code[words].flatten(1)


def plant(model: Transformer, span: float, narrow_stream: bool) -> list[float]:
    """Lets gradients grow by 2^span from the last layer to the first, 2^ABOVE there.

    narrow_stream: the identity path in float16 too. Returns each layer's factor.
    """
    layers = list(model.layers)
    above = min(ABOVE, span)
    last = 2.0 ** (above - span)
    step = 2.0 ** (span / max(1, len(layers) - 1))
    if narrow_stream:
        layers[0].register_forward_pre_hook(lambda _, given: (given[0].half(),))
    for layer in layers[1:]:
        layer.register_forward_pre_hook(lambda _, given: (_slope(given[0], step),))
    model.norm.register_forward_pre_hook(lambda _, given: (_slope(given[0].float(), last),))
    return [last * step ** (len(layers) - 1 - i) for i in range(len(layers))]


def train(way: str, c: TransformerConfig, updates: int, span: float) -> Run:
    """Trains from the same beginning on the same batches, in one of the WAYS."""
    model, run = Transformer(c, seed=0), Run()
    layers = [layer for layer in model.layers if isinstance(layer, Layer)]
    factors = plant(model, span, way == STREAM16)
    scales: list[GradientScale] = []
    one: torch.amp.GradScaler | None = None
    if way == FLOAT32:
        _measure(layers, factors, run)
    elif way == BLOCKS:
        scales = [scale for layer in layers for scale in layer.scale_gradients(1)]
    else:
        for layer in layers:
            layer.narrow = torch.float16
        one = torch.amp.GradScaler("cpu", init_scale=FIRST, growth_interval=INTERVAL // CLOCK)
    # No decay and no clipping, which would weigh gradients of one block against another's.
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, (0.9, 0.96), EPSILON, weight_decay=0.0
    )
    begun = time.perf_counter()
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (update + 1) / WARM_UP)
        optimizer.zero_grad()
        losses = model.loss(*draw_batch(c, 1 + update))
        run.losses.append(float(losses.image.detach()))
        values = [one.get_scale()] if one else [scale.value for scale in scales]
        run.scales.append([math.log2(value) for value in values])
        if one is not None:
            one.scale(losses.loss).backward()
            one.step(optimizer)
            one.update()
            broken = one.get_scale() < values[0]
        else:
            losses.loss.backward()
            broken = _move(scales)
            if not broken:
                optimizer.step()
        run.skipped += broken
        if not broken:  # infinities are no measure
            run.zeros = [*run.zeros[1 - COUNTS :], _zeros(layers)]
    run.seconds = time.perf_counter() - begun
    run.zeros = run.zeros or [_zeros(layers)]
    return run


def _move(scales: list[GradientScale]) -> bool:
    """Moves each scale by its own block; whether the update must be left out."""
    broken = [scale.take_broken() for scale in scales]
    for scale, b in zip(scales, broken, strict=True):
        for _ in range(CLOCK):
            scale.update(b)
    return any(broken)


def _measure(layers: list[Layer], factors: list[float], run: Run) -> None:
    """Notes the last sizes of the gradients that enter the blocks, without the planted factors."""

    def note(block: int, last: nn.Module) -> None:
        def measure(_: nn.Module, __: Any, gradients: Any) -> None:
            run.sizes[block] = float(gradients[0].abs().median()) / factors[block // 2]

        last.register_full_backward_hook(measure)

    run.sizes = [0.0] * (2 * len(layers))
    for i, layer in enumerate(layers):
        note(2 * i, layer.attention.out)
        note(2 * i + 1, layer.mlp.down)


def _zeros(layers: Iterable[Layer]) -> list[float]:
    """Shares of zeros in the gradients of the weights that a block begins with, its smallest."""
    first = (map_.weight.grad for layer in layers for map_ in (layer.attention.qkv, layer.mlp.up))
    return [float((gradient == 0).float().mean()) for gradient in first if gradient is not None]


def report_half(layers: int, width: int, updates: int, span: float, out: Path) -> dict[str, Any]:
    """Trains in all ways, without the planted span and with it; prints a table, draws a figure.

    Raises ValueError for a size below 1 or a span below 0.
    """
    if min(layers, width, updates) < 1 or span < 0:
        raise ValueError("--layers, --width and --updates must be 1 or more, --span 0 or more")
    if width > HEAD and width % HEAD:
        raise ValueError(f"--width must be a multiple of {HEAD} or less, got {width}")
    c = tiny(layers, width)
    print(
        f"{layers} layers of width {width}, {c.sequence.length} positions, batch {BATCH}, "
        f"{updates} updates; all rules for scales run {CLOCK} times as fast"
    )
    runs: dict[float, dict[str, Run]] = {}
    for planted in sorted({0.0, span}):
        print(f"planted span 2^{planted:g}", flush=True)
        runs[planted] = {}
        for way in WAYS:
            runs[planted][way] = run = train(way, c, updates, planted)
            print(f"  {way:31} {_row(run)}", flush=True)
    sizes = runs[0.0][FLOAT32].sizes
    print(
        f"of its own, the gradient that enters a block falls by "
        f"2^{math.log2(sizes[0] / sizes[-1]):.1f} from the first block to the last"
    )
    plot(runs[span], span, out)
    print(f"figure: {out}")
    return {
        f"{planted:g}": {w: asdict(r) for w, r in ways.items()} for planted, ways in runs.items()
    }


def _row(run: Run) -> str:
    shares = run.underflow()
    third = math.ceil(len(shares) / 3)
    first, last = (sum(part) / third for part in (shares[:third], shares[-third:]))
    row = (
        f"image loss {run.loss():.2f}  skipped {run.skipped / len(run.losses):3.0%}  "
        f"zeros: first third of the blocks {first:4.0%}, last {last:4.0%}"
    )
    if run.scales[-1]:
        low, high = min(run.scales[-1]), max(run.scales[-1])
        row += f"  scale 2^{low:.1f}" + (f" to 2^{high:.1f}" if low < high else "")
    return f"{row}  {run.seconds:.0f} s"


def plot(runs: dict[str, Run], span: float, path: Path) -> None:
    """Losses, zeros by block, and scales, of one span."""
    with Figure(path, 3) as (losses, zeros, scales):
        for way, color in WAYS.items():
            losses.plot(_smooth(runs[way].losses), color=color, label=way)
            shares = [100 * share for share in runs[way].underflow()]
            zeros.plot(range(1, len(shares) + 1), shares, color=color, label=way)
        title = f"image loss, gradients over 2^{span:g}"
        losses.set(title=title, xlabel="update", ylabel="nats a token")
        losses.set_ylim(bottom=0)
        zeros.set(
            title="weight gradients that are zero",
            xlabel="residual block, first to last", ylabel="% of the entries, at the end",
        )  # fmt: skip
        zeros.set_ylim(-3, 108)
        blocks = list(zip(*runs[BLOCKS].scales, strict=True))
        for i, values in enumerate(blocks):
            label = {0: "first block's own", len(blocks) - 1: "last block's own"}.get(i)
            shade = _shade(i / max(1, len(blocks) - 1))
            scales.plot(values, color=shade, linewidth=1, label=label)
        for way in (STREAM16, STREAM32):
            scales.plot([s for (s,) in runs[way].scales], color=WAYS[way], label=way)
        scales.set(title="scales", xlabel="update", ylabel="log2 of the scale")
        for axes in (losses, zeros, scales):
            axes.grid(alpha=0.3)
        losses.legend(fontsize=7, loc="lower left")
        scales.legend(fontsize=7, loc="upper left")


def _smooth(values: list[float], over: int = 10) -> list[float]:
    """Means of the last `over` values."""
    parts = (values[max(0, i + 1 - over) : i + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def _shade(part: float) -> tuple[float, float, float]:
    """Dark blue to light."""
    return 0.6 * part, 0.2 + 0.6 * part, 0.5 + 0.45 * part

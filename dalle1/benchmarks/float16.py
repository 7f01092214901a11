"""float16 with one loss scale and with one scale for each residual block (paper section 2.4).

A deep narrow transformer trains in real float16 on gradients that span more than float16 holds. A
narrow model's own gradients do not, so the span is planted: in the backward pass the identity path
is multiplied by one factor at each layer. AdamW does not depend on the size of a gradient. In 32
bits nothing changes, therefore, and what changes in 16 bits is due to the format.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dalle1.evaluation.plots import Figure, check_ending
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
# patience of the blocks' scales, and the updates after which GradScaler doubles its scale.
CLOCK = 25
FIRST_SCALE, GROWTH_INTERVAL = 2.0**16, 2000  # GradScaler's defaults
ABOVE = 3  # powers of two of the planted span that lie above 1; the rest lies below
HEAD, BATCH, WARM_UP, LEARNING_RATE = 16, 4, 30, 3e-3
# AdamW's epsilon is below all gradients, or their size would matter. Its square may underflow.
EPSILON = 1e-20
COUNTS = 20  # updates at the end over which zeros are averaged


@dataclass
class Run:
    """The course of one way of training; blocks go from the first to the last."""

    losses: list[float] = field(default_factory=list)  # by update, nats an image token
    scales: list[list[float]] = field(default_factory=list)  # by update, log2 of each scale
    zeros: list[list[float]] = field(default_factory=list)  # share by block, of the last updates
    skipped: int = 0
    seconds: float = 0.0
    sizes: list[float] = field(default_factory=list)  # median gradient that enters each block

    def loss(self) -> float:
        """Mean of the last tenth of the updates."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)

    def underflow(self) -> list[float]:
        """Mean share of zeros by block at the end."""
        return [sum(shares) / len(self.zeros) for shares in zip(*self.zeros, strict=True)]


class _ScaleGradient(torch.autograd.Function):
    """The identity; in the backward pass the gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    y: Tensor = _ScaleGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return y


def tiny_config(layers: int, width: int) -> TransformerConfig:
    """A transformer of this depth and width over 5 text and 16 image positions."""
    return TransformerConfig(
        width=width, heads=max(1, width // HEAD), head_size=min(width, HEAD), layers=layers, grid=4,
        text_length=5, text_vocab=32, image_vocab=32, conv_kernel=3, init_std=0.1,
    )  # fmt: skip


def draw_batch(c: TransformerConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Captions of random words, and images whose row r holds word r in a fixed code.

    Returns text tokens [b, t] and image tokens [b, m].
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, c.text_vocab, (BATCH, c.grid), generator=generator)
    padding = torch.full((BATCH, 1), c.text_vocab + c.text_length - 1)
    code = torch.randint(
        c.image_vocab, (c.text_vocab, c.grid), generator=torch.Generator().manual_seed(0)
    )
    return torch.cat([words, padding], dim=1), code[words].flatten(1)


def plant_span(model: Transformer, span: float, narrow_stream: bool) -> list[float]:
    """Lets gradients grow by 2^span from the last layer to the first, where they are 2^ABOVE.

    Args:
        model: its layers get hooks.
        span: the growth as a power of two.
        narrow_stream: whether the identity path is in float16 too.

    Returns:
        The factor of each layer's gradients.
    """
    layers = list(model.layers)
    above = min(ABOVE, span)
    last = 2.0 ** (above - span)
    step = 2.0 ** (span / max(1, len(layers) - 1))
    if narrow_stream:
        layers[0].register_forward_pre_hook(lambda _, given: (given[0].half(),))
    for layer in layers[1:]:
        layer.register_forward_pre_hook(lambda _, given: (_scale_gradient(given[0], step),))
    model.norm.register_forward_pre_hook(
        lambda _, given: (_scale_gradient(given[0].float(), last),)
    )
    return [last * step ** (len(layers) - 1 - i) for i in range(len(layers))]


class _Method(Protocol):
    """One way of training's own part: the scales of its gradients."""

    def scales(self) -> list[float]:
        """All scales there are, before the update."""

    def update(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> bool:
        """Backward pass and update; whether the update was skipped for infinite gradients."""


class _Float32:
    """No scale: gradients in 32 bits."""

    def scales(self) -> list[float]:
        return []

    def update(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> bool:
        loss.backward()
        optimizer.step()
        return False


class _OneScale:
    """One scale of the loss, as torch's GradScaler moves it; the layers in float16."""

    def __init__(self, layers: list[Layer]) -> None:
        for layer in layers:
            layer.narrow = torch.float16
        interval = GROWTH_INTERVAL // CLOCK
        self._scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=interval)

    def scales(self) -> list[float]:
        return [self._scaler.get_scale()]

    def update(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> bool:
        before = self._scaler.get_scale()
        self._scaler.scale(loss).backward()
        self._scaler.step(optimizer)
        self._scaler.update()
        return self._scaler.get_scale() < before


class _BlockScales:
    """A scale for each residual block, as the paper has it; the layers in float16."""

    def __init__(self, layers: list[Layer]) -> None:
        self._scales: list[GradientScale] = [
            s for layer in layers for s in layer.scale_gradients(1)
        ]

    def scales(self) -> list[float]:
        return [scale.value for scale in self._scales]

    def update(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> bool:
        loss.backward()
        broken = [scale.take_broken() for scale in self._scales]
        for scale, b in zip(self._scales, broken, strict=True):
            for _ in range(CLOCK):
                scale.update(b)
        if any(broken):
            return True
        optimizer.step()
        return False


def train(way: str, c: TransformerConfig, updates: int, span: float) -> Run:
    """Trains in one of the WAYS; all of them begin with the same weights and get the same batches.

    span: the planted factor between the last layer's gradients and the first's, as a power of 2.
    """
    model, run = Transformer(c, seed=0), Run()
    layers = [layer for layer in model.layers if isinstance(layer, Layer)]
    factors = plant_span(model, span, way == STREAM16)
    method: _Method
    if way == FLOAT32:
        _record_gradient_sizes(layers, factors, run)
        method = _Float32()
    elif way == BLOCKS:
        method = _BlockScales(layers)
    else:
        method = _OneScale(layers)
    # No decay and no clipping, which would weigh gradients of one block against another's.
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, (0.9, 0.96), EPSILON, weight_decay=0.0
    )
    start = time.perf_counter()
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (update + 1) / WARM_UP)
        optimizer.zero_grad()
        losses = model.loss(*draw_batch(c, 1 + update))
        run.losses.append(float(losses.image.detach()))
        run.scales.append([math.log2(value) for value in method.scales()])
        skipped = method.update(losses.loss, optimizer)
        run.skipped += skipped
        if not skipped:  # infinite gradients say nothing about zeros
            run.zeros = [*run.zeros[1 - COUNTS :], _shares_of_zeros(layers)]
    run.seconds = time.perf_counter() - start
    run.zeros = run.zeros or [_shares_of_zeros(layers)]
    return run


def _record_gradient_sizes(layers: list[Layer], factors: list[float], run: Run) -> None:
    """Keeps in `run` the last sizes of the gradients that enter the blocks, factors taken out."""

    def record(block: int, last: nn.Module) -> None:
        def hook(_: nn.Module, __: Any, gradients: Any) -> None:
            run.sizes[block] = float(gradients[0].abs().median()) / factors[block // 2]

        last.register_full_backward_hook(hook)

    run.sizes = [0.0] * (2 * len(layers))
    for i, layer in enumerate(layers):
        record(2 * i, layer.attention.out)
        record(2 * i + 1, layer.mlp.down)


def _shares_of_zeros(layers: Iterable[Layer]) -> list[float]:
    """Shares of zeros in the gradients of each block's first weights, which are its smallest."""
    first = (linear.weight for layer in layers for linear in (layer.attention.qkv, layer.mlp.up))
    gradients = (weight.grad for weight in first)
    return [float((g == 0).float().mean()) for g in gradients if g is not None]


def report_float16(layers: int, width: int, updates: int, span: float, out: Path) -> dict[str, Any]:
    """Trains in all ways, without the planted span and with it; prints a table, draws a figure.

    Raises ValueError for a size below 1, a span below 0 or a width that heads do not divide.
    """
    if min(layers, width, updates) < 1 or span < 0:
        raise ValueError("--layers, --width and --updates must be 1 or more, --span 0 or more")
    if width > HEAD and width % HEAD:
        raise ValueError(f"--width: expected a multiple of {HEAD} or less, got {width}")
    check_ending(out, "--figure")
    c = tiny_config(layers, width)
    print(
        f"{layers} layers of width {width}, {c.sequence.length} positions, batch {BATCH}, "
        f"{updates} updates; all rules for scales run {CLOCK} times as fast"
    )
    runs = {planted: _train_all_ways(c, updates, planted) for planted in sorted({0.0, span})}
    sizes = runs[0.0][FLOAT32].sizes
    print(
        f"of its own, the gradient that enters a block falls by "
        f"2^{math.log2(sizes[0] / sizes[-1]):.1f} from the first block to the last"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    plot(runs[span], span, out)
    print(f"figure: {out}")
    return {
        f"{planted:g}": {way: asdict(run) for way, run in ways.items()}
        for planted, ways in runs.items()
    }


def _train_all_ways(c: TransformerConfig, updates: int, span: float) -> dict[str, Run]:
    """A run by way, each printed when it is done."""
    print(f"planted span 2^{span:g}", flush=True)
    runs = {}
    for way in WAYS:
        runs[way] = train(way, c, updates, span)
        print(f"  {way:31} {_row(runs[way])}", flush=True)
    return runs


def _row(run: Run) -> str:
    """The results of a run in a line."""
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
    """A figure of one span: losses, zeros by block, and scales."""
    with Figure(path, 3) as (losses, zeros, scales):
        _plot_losses(losses, runs, span)
        _plot_zeros(zeros, runs)
        _plot_scales(scales, runs)
        for axes in (losses, zeros, scales):
            axes.grid(alpha=0.3)
        losses.legend(fontsize=7, loc="lower left")
        scales.legend(fontsize=7, loc="upper left")


def _plot_losses(axes: Any, runs: dict[str, Run], span: float) -> None:
    for way, color in WAYS.items():
        axes.plot(_smooth(runs[way].losses), color=color, label=way)
    title = f"image loss, gradients over 2^{span:g}"
    axes.set(title=title, xlabel="update", ylabel="nats a token")
    axes.set_ylim(bottom=0)


def _plot_zeros(axes: Any, runs: dict[str, Run]) -> None:
    for way, color in WAYS.items():
        shares = [100 * share for share in runs[way].underflow()]
        axes.plot(range(1, len(shares) + 1), shares, color=color, label=way)
    axes.set(
        title="weight gradients that are zero",
        xlabel="residual block, first to last", ylabel="% of the entries, at the end",
    )  # fmt: skip
    axes.set_ylim(-3, 108)


def _plot_scales(axes: Any, runs: dict[str, Run]) -> None:
    blocks = list(zip(*runs[BLOCKS].scales, strict=True))
    for i, values in enumerate(blocks):
        label = {0: "first block's own", len(blocks) - 1: "last block's own"}.get(i)
        shade = _shade(i / max(1, len(blocks) - 1))
        axes.plot(values, color=shade, linewidth=1, label=label)
    for way in (STREAM16, STREAM32):
        axes.plot([s for (s,) in runs[way].scales], color=WAYS[way], label=way)
    axes.set(title="scales", xlabel="update", ylabel="log2 of the scale")


def _smooth(values: list[float], over: int = 10) -> list[float]:
    """Means of the last `over` values."""
    parts = (values[max(0, i + 1 - over) : i + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def _shade(part: float) -> tuple[float, float, float]:
    """Dark blue to light."""
    return 0.6 * part, 0.2 + 0.6 * part, 0.5 + 0.45 * part

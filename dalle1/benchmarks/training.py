"""Attention calls and training steps: boolean masks against ours, and 16 bits against 32.

On CPUs the variants of a training step are separate processes that take turns, step by step, so
that noise hits both and each one's peak memory is its own. On CUDA they run one after the other.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle1.benchmarks.timing import Measured, matmul_rate, timed
from dalle1.common.hardware import DTYPES, known_peak, peak_memory
from dalle1.training.planning.flops import training_flops
from dalle1.transformer.attention import dense_attention, sparse_attention
from dalle1.transformer.config import Execution, TransformerConfig
from dalle1.transformer.layers import Layer
from dalle1.transformer.model import Transformer
from dalle1.transformer.sequence import Pattern

CAUSAL, DENSE, OURS, OURS_FP32 = "causal", "dense mask", "ours", "ours, fp32"
PATTERNS: tuple[Pattern, ...] = ("row", "column", "conv")
FLOAT32_PRODUCTS = "high"  # TF32 on CUDA, where the logits stay in 32 bits
WARM_UP = 2  # turns that are not measured
MFU = (
    "MFU = FLOPs of the model a step / seconds / peak of the device; FLOPs a sample = 6 (12 w^2 n L"
    " + w (t V_text + m V_image)) + 12 w sum over layers of allowed (query, key) pairs: forward and"
    " backward, nothing counted for recomputation or for keys that the masks forbid; roofline ="
    " FLOPs a step / seconds / measured rate of a large matrix product of the type"
)


@dataclass
class _AttentionInputs:
    """Queries, keys, values and the output's gradient, all [b, s, n, d]."""

    q: Tensor
    k: Tensor
    v: Tensor
    gradient: Tensor

    @classmethod
    def random(
        cls, c: TransformerConfig, batch: int, dtype: torch.dtype, device: torch.device
    ) -> _AttentionInputs:
        generator = torch.Generator(device).manual_seed(0)
        shape = (batch, c.heads, c.sequence.length, c.head_size)
        q, k, v, gradient = (
            torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4)
        )
        return cls(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), gradient)

    def step(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """One call of the function, forward and backward."""
        self.q.grad = self.k.grad = self.v.grad = None
        attend(self.q, self.k, self.v).backward(self.gradient)


def _attention_variants(
    c: TransformerConfig, pattern: Pattern
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The ways to run a pattern, and causal attention for comparison, as a dense model has it."""
    sizes = (c.text_length, c.grid, c.conv_kernel)
    return {
        CAUSAL: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        DENSE: lambda q, k, v: dense_attention(q, k, v, pattern, *sizes),
        OURS: lambda q, k, v: sparse_attention(q, k, v, pattern, *sizes),
    }


def measure_attention(
    c: TransformerConfig, batch: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, dict[str, Measured]]:
    """Forward and backward of one attention call, for each pattern and each way to run it.

    Returns seconds by pattern and variant, and on CUDA the peak memory.
    """
    inputs = _AttentionInputs.random(c, batch, dtype, device)
    results: dict[str, dict[str, Measured]] = {}
    for pattern in PATTERNS:
        variants = _attention_variants(c, pattern)
        results[pattern] = found = {name: Measured([], None) for name in variants}
        for turn in range(WARM_UP + repeats):
            for name, attend in variants.items():
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                seconds = timed(lambda attend=attend: inputs.step(attend), device)  # type: ignore[misc]
                if device.type == "cuda":
                    found[name].memory = peak_memory(device)
                if turn >= WARM_UP:
                    found[name].seconds.append(seconds)
    return results


@dataclass(frozen=True)
class Variant:
    """One way to run a training step."""

    execution: Execution
    dtype: str  # of the blocks, as `parallel.precision` sets it


@dataclass(frozen=True)
class TrainingBenchmark:
    """What all variants of a training step have in common."""

    config: TransformerConfig
    batch: int
    device: torch.device

    def training_step(self, variant: Variant) -> Callable[[], None]:
        """A step of a new model on random tokens: loss, gradients, clipping, AdamW."""
        c = self.config
        with self.device:
            transformer = Transformer(c, variant.execution)
            text = torch.randint(1, c.text_vocab, (self.batch, c.text_length))
            image = torch.randint(c.image_vocab, (self.batch, c.sequence.image_length))
        if variant.dtype != "float32":
            for layer in transformer.layers:
                assert isinstance(layer, Layer)
                layer.narrow = DTYPES[variant.dtype]
        optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            transformer.loss(text, image).loss.backward()
            torch.nn.utils.clip_grad_norm_(transformer.parameters(), 4.0)
            optimizer.step()
            optimizer.zero_grad()

        return step


def _serve_steps(benchmark: TrainingBenchmark, variant: Variant, pipe: Connection) -> None:
    """The process of one variant: answers each "step" with its seconds, "end" with its memory.

    A step that does not fit into the GPU's memory is answered with None, and is the last.
    """
    device = benchmark.device
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(FLOAT32_PRODUCTS)
    step = benchmark.training_step(variant)
    turns = 0
    while pipe.recv() == "step":
        if turns == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # compilation has its own
        turns += 1
        try:
            pipe.send(timed(step, device))
        except torch.OutOfMemoryError:
            pipe.send(None)
            return
    pipe.send(peak_memory(device))


class _Steps:
    """A process that runs training steps of a variant when it is asked to."""

    def __init__(self, name: str, benchmark: TrainingBenchmark, variant: Variant) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.name, self.seconds = name, list[float]()
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(
            target=_serve_steps, args=(benchmark, variant, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    def step(self, measured: bool) -> bool:
        """Runs a step; whether it fitted into the memory."""
        self._pipe.send("step")
        seconds = self._pipe.recv()
        if seconds is not None and measured:
            self.seconds.append(seconds)
        return seconds is not None

    def result(self) -> Measured:
        """The seconds of all measured steps and the peak memory."""
        self._pipe.send("end")
        return Measured(self.seconds, self._pipe.recv())

    def join(self) -> None:
        """Waits for the end of the process."""
        self._process.join()


def measure_training(
    benchmark: TrainingBenchmark, variants: dict[str, Variant], repeats: int
) -> dict[str, Measured]:
    """Full training steps of each variant; one that runs out of memory is left out."""
    together = benchmark.device.type != "cuda"
    groups = [list(variants)] if together else [[name] for name in variants]
    results: dict[str, Measured] = {}
    for names in groups:
        started = [_Steps(name, benchmark, variants[name]) for name in names]
        running = started
        for turn in range(WARM_UP + repeats):
            fitted = [(v, v.step(measured=turn >= WARM_UP)) for v in running]
            for variant in (v for v, fits in fitted if not fits):
                print(f"  {variant.name:11} out of memory")
            running = [v for v, fits in fitted if fits]
        results |= {variant.name: variant.result() for variant in running}
        for variant in started:
            variant.join()
    return results


def report_attention(
    c: TransformerConfig, batch: int, dtype: str, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Prints, and returns for a JSON file, what `measure_attention` finds."""
    print(
        f"attention, forward and backward: batch {batch}, {c.heads} heads x {c.head_size}, "
        f"{c.text_length} + {c.grid}x{c.grid} positions, {dtype}"
    )
    results = measure_attention(c, batch, DTYPES[dtype], device, repeats)
    for pattern, variants in results.items():
        ours = variants[OURS].spread()[1]
        for name, measured in variants.items():
            ratio = ours / measured.spread()[1]
            print(f"  {pattern:7} {name:11} {measured.text()}  ours takes {ratio:.2f} of it")
    return {
        pattern: {name: asdict(measured) for name, measured in variants.items()}
        for pattern, variants in results.items()
    }


def report_training(
    c: TransformerConfig,
    execution: Execution,
    batch: int,
    dtype: str,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    """Prints, and returns for a JSON file, what `measure_training` finds of masks and of ours."""
    print(
        f"train step: batch {batch}, {c.layers} layers of width {c.width}, "
        f"{c.sequence.length} positions, {dtype}, "
        f"checkpointing {execution.checkpointing}, compile {execution.compile}"
    )
    benchmark = TrainingBenchmark(c, batch, device)
    ours = execution.model_copy(update={"attention": "auto"})
    variants = {
        DENSE: Variant(execution.model_copy(update={"attention": "dense"}), dtype),
        OURS: Variant(ours, dtype),
    }
    if dtype != "float32":
        variants[OURS_FP32] = Variant(ours, "float32")
    results = measure_training(benchmark, variants, repeats)
    rates = {d: _matmul_rate(device, d) for d in {v.dtype for v in variants.values()}}
    report = {name: _figures(benchmark, measured) for name, measured in results.items()}
    # The table of peaks is of 16-bit products.
    peak = known_peak(device)
    for name, figures in report.items():
        flops, own = figures["flops_per_second"], variants[name].dtype
        figures["roofline"] = flops / rates[own]
        speed = f"{figures['tokens_per_second']:10,.0f} tokens/s  {flops / 1e12:.3f} TFLOP/s"
        speed += f"  {figures['roofline']:.0%} of the roofline"
        speed += f"  {flops / peak:.1%} MFU" if peak and own != "float32" else ""
        print(f"  {name:11} {results[name].text()}  {speed}")
    for other in (DENSE, OURS_FP32):
        if other in results and OURS in results:
            _compare(results[OURS], results[other], other)
    print(f"  {MFU}")
    return report


def _matmul_rate(device: torch.device, dtype: str) -> float:
    """FLOP/s of a large product, in TF32 where the steps of float32 are."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(FLOAT32_PRODUCTS)
    try:
        return matmul_rate(device, DTYPES[dtype])
    finally:
        torch.set_float32_matmul_precision(before)


def _compare(ours: Measured, others: Measured, name: str) -> None:
    assert ours.memory and others.memory
    print(
        f"  ours takes {ours.spread()[1] / others.spread()[1]:.2f} of the time and "
        f"{ours.memory / others.memory:.2f} of the memory of {name!r}"
    )


def _figures(benchmark: TrainingBenchmark, measured: Measured) -> dict[str, Any]:
    """Seconds, memory and rates of a variant, by its median step."""
    c, seconds = benchmark.config, measured.spread()[1] / 1e3
    return {
        **asdict(measured),
        "tokens_per_second": benchmark.batch * c.sequence.length / seconds,
        "flops_per_second": benchmark.batch * training_flops(c) / seconds,
    }

"""Attention calls and whole training steps: boolean masks against ours.

On CPUs the variants of a training step are separate processes that take turns, step by step, so
that noise hits both and each one's peak memory is its own; on CUDA they run one after the other.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle1.benchmarks.timing import Measured, timed
from dalle1.common.hardware import DTYPES, known_peak, peak_memory
from dalle1.training.planning.flops import training_flops
from dalle1.transformer.attention import dense_attention, sparse_attention
from dalle1.transformer.config import Execution, TransformerConfig
from dalle1.transformer.model import Transformer
from dalle1.transformer.sequence import Pattern

DENSE, OURS = "dense mask", "ours"
MFU = (
    "MFU = FLOPs of the model a step / seconds / peak of the device; FLOPs a sample = 6 (12 w^2 n L"
    " + w (t V_text + m V_image)) + 12 w sum over layers of allowed (query, key) pairs: forward and"
    " backward, nothing counted for recomputation or for keys that the masks forbid"
)


WARM_UP = 2


def measure_attention(
    c: TransformerConfig, batch: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, dict[str, Measured]]:
    """Forward and backward of one call: of each pattern, of each way to run it."""
    n = c.stream.length
    made = torch.Generator(device).manual_seed(0)
    shape = (batch, c.heads, n, c.head_size)
    q, k, v, grad = (
        torch.randn(shape, generator=made, device=device, dtype=dtype) for _ in range(4)
    )
    for x in (q, k, v):
        x.requires_grad_()
    rest = (c.text_length, c.grid, c.conv_kernel)

    def causal(*_: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    patterns: tuple[Pattern, ...] = ("row", "column", "conv")
    results: dict[str, dict[str, Measured]] = {}
    for pattern in patterns:
        # One shared reference: causal attention, as a dense transformer would have.
        runs: dict[str, Callable[..., Tensor]] = {
            "causal": causal,
            DENSE: dense_attention,
            OURS: sparse_attention,
        }

        def step(run: Callable[..., Tensor], pattern: Pattern = pattern) -> None:
            q.grad = k.grad = v.grad = None
            run(q, k, v, pattern, *rest).backward(grad)

        seconds: dict[str, list[float]] = {name: [] for name in runs}
        memory: dict[str, int | None] = dict.fromkeys(runs)
        for turn in range(WARM_UP + repeats):
            for name, run in runs.items():
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                took = timed(lambda run=run: step(run), device)  # type: ignore[misc]
                if device.type == "cuda":
                    memory[name] = peak_memory(device)
                if turn >= WARM_UP:
                    seconds[name].append(took)
        results[pattern] = {name: Measured(seconds[name], memory[name]) for name in runs}
    return results


def _train_worker(
    config: dict[str, Any], execution: dict[str, Any], batch: int, dtype: str, kind: str, pipe: Any
) -> None:
    """A process of one variant: answers every "step" with its seconds, "end" with its memory."""
    device = torch.device(kind)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA, where the logits stay in 32 bits
    c = TransformerConfig(**config)
    with device:
        transformer = Transformer(c, Execution(**execution))
        text = torch.randint(1, c.text_vocab, (batch, c.text_length))
        image = torch.randint(c.image_vocab, (batch, c.stream.image_length))
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-4, fused=True)
    mixed = torch.autocast(kind, DTYPES[dtype]) if dtype != "float32" else contextlib.nullcontext()

    def step() -> None:
        with mixed:
            loss = transformer.loss(text, image).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 4.0)
        optimizer.step()
        optimizer.zero_grad()

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


def measure_train(
    c: TransformerConfig,
    variants: dict[str, Execution],
    batch: int,
    dtype: str,
    device: torch.device,
    repeats: int,
) -> dict[str, Measured]:
    """Whole training steps of each variant."""
    spawn = multiprocessing.get_context("spawn")
    groups = [[name] for name in variants] if device.type == "cuda" else [list(variants)]
    results = {}
    for group in groups:
        pipes, processes = {}, []
        for name in group:
            pipes[name], theirs = spawn.Pipe()
            settings = (c.model_dump(), variants[name].model_dump(), batch, dtype, device.type)
            process = spawn.Process(target=_train_worker, args=(*settings, theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
        seconds: dict[str, list[float]] = {name: [] for name in group}
        for turn in range(WARM_UP + repeats):
            for name in list(pipes):
                pipes[name].send("step")
                took = pipes[name].recv()
                if took is None:
                    print(f"  {name:11} out of memory")
                    del pipes[name]
                elif turn >= WARM_UP:
                    seconds[name].append(took)
        for name, pipe in pipes.items():
            pipe.send("end")
            results[name] = Measured(seconds[name], pipe.recv())
        for process in processes:
            process.join()
    return results


def report_attention(
    c: TransformerConfig, batch: int, dtype: str, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Prints, and returns, what `measure_attention` finds."""
    print(
        f"attention, forward and backward: batch {batch}, {c.heads} heads x {c.head_size}, "
        f"{c.text_length} + {c.grid}x{c.grid} positions, {dtype}"
    )
    results = measure_attention(c, batch, DTYPES[dtype], device, repeats)
    for pattern, ways in results.items():
        for name, m in ways.items():
            ratio = ways[OURS].spread()[1] / m.spread()[1]
            print(f"  {pattern:7} {name:11} {m.text()}  ours takes {ratio:.2f} of it")
    return {p: {n: asdict(m) for n, m in ways.items()} for p, ways in results.items()}


def report_train(
    c: TransformerConfig,
    execution: Execution,
    batch: int,
    dtype: str,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    """Prints, and returns, what `measure_train` finds of boolean masks and of ours."""
    variants = {
        DENSE: execution.model_copy(update={"attention": "dense"}),
        OURS: execution.model_copy(update={"attention": "auto"}),
    }
    print(
        f"train step: batch {batch}, {c.layers} layers of width {c.width}, "
        f"{c.stream.length} positions, {dtype}, "
        f"checkpointing {execution.checkpointing}, compile {execution.compile}"
    )
    results = measure_train(c, variants, batch, dtype, device, repeats)
    # The table of peaks is of 16-bit products.
    peak = None if dtype == "float32" else known_peak(device)
    report: dict[str, Any] = {}
    for name, m in results.items():
        middle = m.spread()[1] / 1e3
        flops = batch * training_flops(c) / middle
        tokens = batch * c.stream.length / middle
        share = f"  {flops / peak:.1%} MFU" if peak else ""
        speed = f"{tokens:10,.0f} tokens/s  {flops / 1e12:.3f} TFLOP/s{share}"
        print(f"  {name:11} {m.text()}  {speed}")
        report[name] = {**asdict(m), "tokens_per_second": tokens, "flops_per_second": flops}
    if len(results) == 2:
        dense, ours = results[DENSE], results[OURS]
        assert dense.memory and ours.memory
        print(
            f"  ours takes {ours.spread()[1] / dense.spread()[1]:.2f} of the time and "
            f"{ours.memory / dense.memory:.2f} of the memory"
        )
    print(f"  {MFU}")
    return report

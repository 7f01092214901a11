"""Measures speed and memory: dense boolean masks against ours.

    python launch/benchmark.py attention [CONFIG] [--batch 8] [--dtype bfloat16]
    python launch/benchmark.py train CONFIG [--batch 2] [key=value ...]
    python launch/benchmark.py sample CONFIG [--candidates 1,8,64,512] [key=value ...]

`attention` runs one attention call, forward and backward, of each pattern; `train` whole training
steps (loss, gradients, clipping, AdamW); `sample` whole pictures of one caption, with random
weights. Medians and min-max of the repeats (in `sample`: of the steps), after warm-up.
On CPUs the variants of `train` are separate processes that take turns, step by step, so that noise
hits both and each one's peak memory is its own; on CUDA they run one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle1.attention import allowed, dense_attention
from dalle1.decoding import Cache, Options, candidate_uniforms, choose
from dalle1.layout import Pattern
from dalle1.sparse_attention import sparse_attention
from dalle1.training.config import load_config
from dalle1.transformer import Execution, Transformer, TransformerConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Dense 16-bit matrix products of the SXM boards, as the makers give them: FLOP/s.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "V100": 125e12}
DENSE, OURS = "dense mask", "ours"
MFU = (
    "MFU = FLOPs of the model a step / seconds / peak of the device; FLOPs a sample = 6 (12 w^2 n L"
    " + w (t V_text + m V_image)) + 12 w sum over layers of allowed (query, key) pairs: forward and"
    " backward, nothing counted for recomputation or for keys that the masks forbid"
)


@dataclass
class Measured:
    """Seconds of each repeat, and the peak memory in bytes where it can be told apart."""

    seconds: list[float]
    memory: int | None

    def text(self) -> str:
        low, middle, high = self.spread()
        memory = "" if self.memory is None else f"  {self.memory / 2**20:8,.0f} MB"
        return f"{middle:9.2f} ms  ({low:.2f} to {high:.2f}){memory}"

    def spread(self) -> tuple[float, float, float]:
        """Milliseconds: min, median, max."""
        ms = [1e3 * s for s in self.seconds]
        return min(ms), statistics.median(ms), max(ms)


def step_flops(c: TransformerConfig) -> float:
    """FLOPs that one sample's training step needs, as `MFU` says."""
    n, t, m = c.stream.length, c.text_length, c.stream.image_length
    weights = 12 * c.width**2 * n * c.layers + c.width * (t * c.text_vocab + m * c.image_vocab)
    pairs = {p: int(allowed(p, t, c.grid, c.conv_kernel).sum()) for p in set(c.patterns)}
    return 6.0 * weights + 12.0 * c.width * sum(pairs[p] for p in c.patterns)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> int:
    """Bytes at most so far: of the device's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


WARM_UP = 2


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
    optimiser = torch.optim.AdamW(transformer.parameters(), lr=1e-4, fused=True)
    mixed = torch.autocast(kind, DTYPES[dtype]) if dtype != "float32" else contextlib.nullcontext()

    def step() -> None:
        with mixed:
            loss = transformer.loss(text, image).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 4.0)
        optimiser.step()
        optimiser.zero_grad()

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


class DenseCache:
    """The usual cache, for comparison: whole images in every layer, the caption once for each
    candidate, and all keys so far read under a mask."""

    def __init__(self, transformer: Transformer, text: Tensor, candidates: int) -> None:
        c = transformer.config
        self.masks = [
            allowed(p, c.text_length, c.grid, c.conv_kernel).to(text.device) for p in c.patterns
        ]
        x = transformer.embed_text(text.expand(candidates, -1))
        shape = (c.layers, 2, candidates, c.heads, c.stream.length, c.head_size)
        self.held = x.new_empty(shape)
        for i, layer in enumerate(transformer.layers):
            q, k, v = layer.attention.project(x)  # type: ignore[operator, union-attr]
            self.held[i, 0, :, :, : c.text_length] = k
            self.held[i, 1, :, :, : c.text_length] = v
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = layer.mlp(x + layer.attention.merge(y))  # type: ignore[operator, union-attr]
        self.text_length = c.text_length

    def step(self, transformer: Transformer, x: Tensor, position: int) -> Tensor:
        x, n = x[:, None], self.text_length + position
        for i, layer in enumerate(transformer.layers):
            q, k, v = layer.attention.project(x)  # type: ignore[operator, union-attr]
            self.held[i, 0, :, :, n] = k[:, :, 0]
            self.held[i, 1, :, :, n] = v[:, :, 0]
            k, v = self.held[i, :, :, :, : n + 1]
            mask = self.masks[i][n, None, : n + 1]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = layer.mlp(x + layer.attention.merge(y))  # type: ignore[operator, union-attr]
        logits: Tensor = transformer.image_head(transformer.norm(x[:, 0]))
        return logits.float()


@torch.inference_mode()
def measure_sample(
    transformer: Transformer, cache_type: type[Cache] | type[DenseCache], candidates: int
) -> tuple[Measured, Tensor]:
    """The seconds of each step of one caption's candidates, its cache in bytes, and the tokens."""
    c, device = transformer.config, transformer.start_of_image.device
    text = torch.randint(1, c.text_vocab, (c.text_length,), generator=torch.manual_seed(0))
    uniforms = candidate_uniforms(0, "benchmark", 0, candidates, c.stream.image_length).to(device)
    begin = time.perf_counter()
    given = text.to(device)
    if cache_type is DenseCache:
        given = given[None]
    cache = cache_type(transformer, given, candidates)
    before = time.perf_counter() - begin  # the caption's own cost belongs to the picture
    tokens = torch.empty(candidates, c.stream.image_length, dtype=torch.int64, device=device)
    positions, fed = transformer.grid_positions(), transformer.start_of_image.expand(candidates, -1)
    seconds = []
    for p in range(c.stream.image_length):

        def step(fed: Tensor = fed, p: int = p) -> None:
            logits = cache.step(transformer, fed + positions[p], p)
            tokens[:, p] = choose(logits, uniforms[:, p], Options())

        seconds.append(timed(step, device))
        fed = transformer.image_embedding(tokens[:, p])
    seconds[0] += before
    if isinstance(cache, Cache):
        held = [*cache.text_k, *cache.text_v, *cache.image]
    else:
        held = [cache.held]
    return Measured(seconds, sum(x.numel() * x.element_size() for x in held)), tokens.cpu()


@torch.inference_mode()
def recomputed_seconds(transformer: Transformer, candidates: int) -> float:
    """Seconds of a picture if every step ran the whole stream so far: from a few lengths and at
    most 2 candidates, summed over the lengths and multiplied."""
    c, device = transformer.config, transformer.start_of_image.device
    few = min(2, candidates)
    text = torch.ones(few, c.text_length, dtype=torch.int64, device=device)
    image = torch.zeros(few, c.stream.image_length, dtype=torch.int64, device=device)
    lengths = [1 + (c.stream.image_length - 1) * i // 4 for i in range(5)]
    points = []
    for length in lengths:
        runs = [timed(lambda n=length: transformer.states(text, image[:, :n]), device)  # type: ignore[misc]
                for _ in range(2)]  # fmt: skip
        points.append(min(runs))
    gaps = zip(lengths, lengths[1:], points, points[1:], strict=False)
    return candidates / few * sum((b - a) * (s + t) / 2 for a, b, s, t in gaps)


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def run_attention(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    c = _transformer(options)[0] if options.config else TransformerConfig()
    dtype = DTYPES[options.dtype]
    print(
        f"attention, forward and backward: batch {options.batch}, {c.heads} heads x {c.head_size}, "
        f"{c.text_length} + {c.grid}x{c.grid} positions, {options.dtype}"
    )
    results = measure_attention(c, options.batch, dtype, device, options.repeats)
    for pattern, ways in results.items():
        for name, m in ways.items():
            ratio = ways[OURS].spread()[1] / m.spread()[1]
            print(f"  {pattern:7} {name:11} {m.text()}  ours takes {ratio:.2f} of it")
    return {p: {n: asdict(m) for n, m in ways.items()} for p, ways in results.items()}


def run_train(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    c, execution = _transformer(options)
    variants = {
        DENSE: execution.model_copy(update={"attention": "dense"}),
        OURS: execution.model_copy(update={"attention": "auto"}),
    }
    print(
        f"train step: batch {options.batch}, {c.layers} layers of width {c.width}, "
        f"{c.stream.length} positions, {options.dtype}, "
        f"checkpointing {execution.checkpointing}, compile {execution.compile}"
    )
    results = measure_train(c, variants, options.batch, options.dtype, device, options.repeats)
    peak = next((p for name, p in PEAKS.items() if name in device_name(device)), None)
    if options.dtype == "float32":
        peak = None  # the table is of 16-bit products
    report: dict[str, Any] = {}
    for name, m in results.items():
        middle = m.spread()[1] / 1e3
        flops = options.batch * step_flops(c) / middle
        tokens = options.batch * c.stream.length / middle
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


def run_sample(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    c, dtype = _transformer(options)[0], DTYPES[options.dtype]
    torch.manual_seed(0)
    with device:
        transformer = Transformer(c).to(dtype).eval()
    m = c.stream.image_length
    print(
        f"sampling one caption: {c.layers} layers of width {c.width}, {c.text_length} + "
        f"{c.grid}x{c.grid} positions, {options.dtype}; a step is one token of every candidate"
    )
    report: dict[str, Any] = {}
    for candidates in options.candidates:
        ours, tokens = measure_sample(transformer, Cache, candidates)
        plain, same = measure_sample(transformer, DenseCache, candidates)
        agree = float((tokens == same).float().mean())
        whole = sum(ours.seconds)
        slow = recomputed_seconds(transformer, candidates)
        report[str(candidates)] = {"ours": asdict(ours), "plain cache": asdict(plain)}
        report[str(candidates)]["recomputed, extrapolated"] = slow
        assert ours.memory and plain.memory
        print(f"  {candidates} candidates, {agree:.1%} of the tokens equal in both caches")
        for name, result in (("ours", ours), ("plain cache", plain)):
            total = sum(result.seconds)
            print(
                f"    {name:12} {result.text()} of cache, a picture {total:.2f} s, "
                f"{candidates * m / total:,.0f} tokens/s, {candidates / total:.3f} pictures/s"
            )
        print(f"    recomputed   {slow:,.0f} s (extrapolated)")
        print(
            f"    ours is {sum(plain.seconds) / whole:.1f} times as fast as the plain cache and "
            f"{slow / whole:,.0f} times as fast as recomputing; "
            f"{plain.memory / ours.memory:.1f} times smaller than the plain cache",
            flush=True,
        )
    return report


def _transformer(options: argparse.Namespace) -> tuple[TransformerConfig, Execution]:
    config = load_config(options.config, options.overrides)
    if config.transformer is None:
        raise ValueError(f"{options.config}: stage {config.stage!r} has no transformer")
    return config.transformer, config.execution or Execution()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for a mistake in the settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["attention", "train", "sample"])
    parser.add_argument("config", nargs="?", help="a YAML file with a transformer")
    parser.add_argument("overrides", nargs="*", help="settings as key=value, after the file's")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--candidates", type=_numbers, default=[1, 8, 64, 512], help="1,8,64")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    options = parser.parse_intermixed_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device_name(device)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(
        f"$ python launch/benchmark.py {' '.join(sys.argv[1:] if arguments is None else arguments)}"
    )
    try:
        if min(options.batch, options.repeats, *options.candidates) < 1:
            raise ValueError("--batch, --repeats and --candidates must be 1 or more")
        if options.what != "attention" and not options.config:
            raise ValueError(f"{options.what} needs a config, such as configs/paper/250m.yaml")
        runs = {"attention": run_attention, "train": run_train, "sample": run_sample}
        run = runs[options.what]
        results = run(options, device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.out:
        beside = options.out.with_name(options.out.name + ".tmp")
        beside.write_text(json.dumps({"device": device_name(device), "results": results}, indent=1))
        beside.replace(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
